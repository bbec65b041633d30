"""A controller with two or three scripted hosts, a store in memory and a clock that stands still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

from transhume.farm.controller import Controller
from transhume.farm.host_link import HostLink
from transhume.farm.limits import Limits
from transhume.farm.members import Joined
from transhume.host.config import HostConfig
from transhume.model.host import Host
from transhume.model.migration import Migration, MigrationOptions, Outcome, Phase
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import Ownership, VmSpec, VmState
from transhume.sim.scripted_host import ScriptedHost
from transhume.store.interface import Store
from transhume.store.memory import MemoryStore
from transhume.trust.certificates import make_request
from transhume.trust.token import Token

MIB = 1 << 20


class Farm:
    """What a test of the controller needs at hand."""

    def __init__(self, *names: str, store: Store | None = None) -> None:
        self.now_s = 1_000_000.0
        self.hosts = {name: ScriptedHost(name) for name in names}
        self.store: Store = store or MemoryStore()
        self._ids = count(1)
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        own = HostConfig(name=next(iter(self.hosts)), state_dir=Path("/none"), address="192.0.2.10")
        return Controller(
            self.store,
            self.link,
            own,
            clock_s=lambda: self.now_s,
            new_id=lambda: f"m{next(self._ids)}",
            limits=Limits(sweep_interval_s=3600.0),
        )

    def link(self, host: Host) -> HostLink:
        return self.hosts[host.name]

    async def start(self) -> None:
        """Start the controller and let all hosts join and report."""
        await self.controller.start()
        for name in list(self.hosts)[1:]:
            await self.join(name, f"192.0.2.{len(name)}")
        await self.beat()

    async def join(self, name: str, address: str, token: str = "") -> Joined:
        """Let a host join, as it asks for it; without a token with a fresh one."""
        members = self.controller.members
        secret = Token.parse(token or (await members.invite()).token).secret
        return await members.join(secret, name, address, 7461, make_request()[1])

    async def restart(self) -> None:
        """A new controller on the same store."""
        await self.controller.close()
        self.controller = self.new_controller()
        await self.controller.start()

    async def beat(self, *names: str) -> None:
        for name in names or self.hosts:
            host = self.hosts[name]
            await self.controller.heartbeat(name, host.inventory_now, host.states)

    async def running_vm(self, name: str = "web", host: str = "alpha", memory_mib: int = 512) -> None:
        await self.controller.vms.create(VmSpec(name=name, memory_bytes=memory_mib * MIB, cpus=1), host)
        await self.controller.vms.start(name)

    async def migrate(self, vm: str = "web", to: str | None = "beta") -> Migration:
        return await self.controller.migrations.request(vm, to, MigrationOptions())

    async def begun(self, migration: Migration) -> Migration:
        """Wait until the source was told to begin and the controller knows it."""
        await until(lambda: migration.id in self.hosts[migration.source].begun)
        return await self.reached(migration, Phase.PREPARED)

    async def reached(self, migration: Migration, phase: Phase) -> Migration:
        async for event in self.controller.migrations.follow(migration.id):
            if list(Phase).index(event.migration.phase) >= list(Phase).index(phase):
                return event.migration
        raise AssertionError(f"{migration.id} ended before {phase}")

    async def ended(self, migration: Migration) -> Migration:
        """Follow to the end."""
        last = migration
        async for event in self.controller.migrations.follow(migration.id):
            last = event.migration
        assert last.outcome is not Outcome.RUNNING
        return last

    async def commit(self, migration: Migration) -> None:
        """What the destination's mover does at the switchover."""
        reply = await self.controller.swap_ownership(
            migration.vm,
            Ownership(owner=migration.source, epoch=migration.epoch),
            Ownership(owner=migration.destination, epoch=migration.epoch + 1),
        )
        assert reply.won
        self.hosts[migration.source].states[migration.vm] = VmState.STOPPED
        self.hosts[migration.destination].states[migration.vm] = VmState.RUNNING
        self.hosts[migration.destination].specs[migration.vm] = self.hosts[migration.source].specs[
            migration.vm
        ]

    async def report(self, migration: Migration, host: str, phase: Phase, **fields: object) -> None:
        update = MigrationUpdate(migration=migration.id, host=host, phase=phase)
        await self.controller.report(update.model_copy(update=fields))


@asynccontextmanager
async def farm(*names: str, store: Store | None = None) -> AsyncIterator[Farm]:
    made = Farm(*(names or ("alpha", "beta")), store=store)
    await made.start()
    try:
        yield made
    finally:
        await made.controller.close()


async def until(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    """Give the loop turns until the condition holds."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0)
