"""The controller: the farm's one place where it is decided which VM is where.

It is composed of its concerns and adds nothing of its own: `members` (hosts), `vms`, `migrations`, and the
register. To hosts and movers it is a `ControllerLink`; the API calls the concerns directly.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping

from transhume.farm.admission import Admission
from transhume.farm.audit import AuditLog
from transhume.farm.claims import Verdict, judge, raised
from transhume.farm.drain import Drains
from transhume.farm.events import EventLog
from transhume.farm.feed import Feed
from transhume.farm.fencing import Fencing
from transhume.farm.limits import Limits
from transhume.farm.members import Links, Members
from transhume.farm.migrations import Migrations
from transhume.farm.operations import Operations
from transhume.farm.overview import Overview
from transhume.farm.ownership import OwnershipRegister
from transhume.farm.records import FarmRecords
from transhume.farm.revival import Revivals
from transhume.farm.rulebook import Rulebook
from transhume.farm.users import Users
from transhume.farm.vms import Vms
from transhume.farm.watcher import Watcher
from transhume.host.config import HostConfig
from transhume.host.steady import again
from transhume.model.errors import NotFound, Unauthorized
from transhume.model.host import HostInventory
from transhume.model.migration import Migration
from transhume.model.orders import HeartbeatReply, MigrationUpdate, Renewed, SwapReply
from transhume.model.vm import Ownership, VmState
from transhume.store.interface import Store

log = logging.getLogger(__name__)


def random_id() -> str:
    """Short, because it is part of socket paths; the store makes sure that it is new."""
    return f"m{secrets.token_hex(4)}"


class Controller:
    """Satisfies `ControllerLink`. Call `start` before anything else and `close` at the end.

    `links` makes the way to a host; `own` is the config of the host that carries the controller. The store
    stays open after `close`: whoever opened it closes it.
    """

    def __init__(
        self,
        store: Store,
        links: Links,
        own: HostConfig,
        clock_s: Callable[[], float] = time.time,
        new_id: Callable[[], str] = random_id,
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self.store = store
        first_id = int(clock_s() * 1000) + 1
        self.feed = Feed(first_id, clock_s)
        self._watcher = Watcher(store, self.feed)
        records = FarmRecords(self._watcher.store)
        self._register = OwnershipRegister(records)
        # Numbers that begin with the clock in milliseconds go on rising after a restart.
        self.events = EventLog(first_id)
        self.members = Members(records, links, own, clock_s, self._limits)
        self.admission = Admission(records, self.members, clock_s)
        self.vms = Vms(records, self.members, clock_s, self.admission)
        self.migrations = Migrations(
            records, self.members, self.vms, self.events, clock_s, new_id, self._limits, self.admission
        )
        self.rules = Rulebook(records, self.admission)
        self.overview = Overview(records, self.members, self.admission)
        self.drains = Drains(
            records,
            self.members,
            self.vms,
            self.migrations,
            self.admission,
            self.events,
            clock_s,
            self._limits,
        )
        self.operations = Operations(records, self.migrations, self.drains, self.feed)
        self.fencing = Fencing(records, self.members, self.vms, clock_s)
        self.users = Users(records, clock_s)
        self.audit = AuditLog(records)
        self.revivals = Revivals(records, self.members, clock_s)
        self._sweeping: asyncio.Task[None] | None = None
        self._doubtful: dict[str, set[str]] = {}

    async def start(self) -> None:
        """Read the farm from the store and begin to watch over the migrations. Raises `StoreError`."""
        await self.members.start()
        await self._watcher.watch(self.members, self.events)
        await self.vms.load()
        await self.migrations.start()
        await self.drains.start()
        sweeping = again("look after migrations", self._limits.sweep_interval_s, self._sweep, at_once=False)
        self._sweeping = asyncio.create_task(sweeping, name="sweep migrations")

    async def close(self) -> None:
        """Stop watching and end all event streams. VMs and migrations go on."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
            self._sweeping = None
        await self.fencing.close()
        await self.drains.close()
        await self.migrations.close()
        self.events.close()
        await self._watcher.close()

    async def ownership(self, vm: str) -> Ownership:
        return await self._register.read(vm)

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        if expected.owner != wanted.owner:
            # Whether it is made or not: who loses a VM by it is asked for it at the next heartbeat.
            self._doubtful.setdefault(expected.owner, set()).add(vm)
        return await self._register.swap(vm, expected, wanted)

    async def demand_may_swap(self, vm: str, expected: Ownership, wanted: Ownership, caller: str) -> None:
        """Raises `Unauthorized` when a swap that host `caller` asks for would be won and is not its to make.

        A host makes what it gives or gets, and for its peer what belongs to the VM's migration under way. The
        others are let through to lose: their answer tells how it stands.
        """
        if caller in (expected.owner, wanted.owner) or await self._register.read(vm) != expected:
            return
        under_way = (await self.vms.show(vm)).migration
        if under_way:
            migration = await self.migrations.get(under_way)
            if caller in (migration.source, migration.destination):
                return
        raise Unauthorized(f"host {caller} neither gives nor gets VM {vm}: it cannot change its owner")

    async def migration(self, migration: str) -> Migration:
        return await self.migrations.get(migration)

    async def report(self, update: MigrationUpdate) -> None:
        await self.migrations.report(update)

    async def renew(self, host: str, request_pem: str, shown_serial: str = "") -> Renewed:
        """The next certificate of a member that has shown the one with this serial."""
        return await self.members.renew(host, request_pem, shown_serial)

    async def heartbeat(
        self,
        host: str,
        inventory: HostInventory,
        vm_states: Mapping[str, VmState],
        vm_epochs: Mapping[str, int] | None = None,
    ) -> HeartbeatReply:
        """Note that a host lives; tell it which of its VMs are another's.

        The register is read when the host was silent, or has others running than the last time: a VM that is
        taken from a host is taken from one that cannot be reached. It is read for a VM that a swap has taken
        from the host, which may have come back right before, and again until the host has ended what it was
        told to: the answer may be lost, or the VM's mover still at work there. And it is read for a VM of
        which the host does not know the epoch, which it then keeps (`farm.claims` tells what for).
        """
        claims = vm_epochs or {}
        fenced = self.members.fenced(host)
        back = fenced or self.members.silent(host)
        before = self.members.active_vms(host)
        await self.members.heartbeat(host, inventory, vm_states)
        now = self.members.active_vms(host)
        known = now & claims.keys()
        doubtful = now if back else (known - before) | (now & self._doubtful.get(host, set())) | (now - known)
        reply = HeartbeatReply()
        self._doubtful[host] = set()
        for vm in sorted(doubtful):
            try:
                reply = await self._judge(vm, host, claims.get(vm, 0), reply)
            except NotFound:
                continue  # a VM that the farm has forgotten is not the farm's to end
        if fenced and not self._doubtful[host]:
            # Only now: until it has ended what became another's, it gets nothing new to run.
            await self.members.configure(host, {"fence": None})
            # A VM may have been given away since the register was read: all are asked for once more.
            self._doubtful[host] = set(now)
            log.warning("host %s, which was fenced, is back", host)
        return reply.model_copy(update={"strict": self.vms.strict(now)})

    async def _judge(self, vm: str, host: str, claim: int, reply: HeartbeatReply) -> HeartbeatReply:
        """Compare what `host` runs with the register, and add what it must know of it."""
        held = await self._register.read(vm)
        owner_runs_it = not self.members.silent(held.owner) and vm in self.members.active_vms(held.owner)
        verdict = judge(held, host, claim, owner_runs_it)
        if verdict is Verdict.ITS_OWN:
            return reply if claim else reply.model_copy(update={"epochs": {**reply.epochs, vm: held.epoch}})
        self._doubtful.setdefault(host, set()).add(vm)
        if verdict is Verdict.DISOWNED:
            return reply.model_copy(update={"disowned": (*reply.disowned, vm)})
        if verdict is Verdict.CONTESTED:
            log.error("VM %s runs on %s (epoch %d) and on %s (%d)", vm, host, claim, held.owner, held.epoch)
            return reply
        wanted = raised(held, host, claim)
        if (await self.swap_ownership(vm, held, wanted)).won:
            log.warning("VM %s runs on %s, not on %s: the register was older", vm, host, held.owner)
        return reply.model_copy(update={"epochs": {**reply.epochs, vm: wanted.epoch}})

    async def _sweep(self) -> None:
        await self.migrations.sweep()
        self.drains.wake()
        self.fencing.wake()
