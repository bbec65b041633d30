"""A farm of real hosts for tests: daemons in network namespaces, driven through the API."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.e2e.boot_guest import assemble, make_disk, read_sweeps

from transhume.api.client import FarmClient
from transhume.api.http_calls import HttpCalls
from transhume.api.joining import enter
from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab, LabHost
from transhume.demo.observer import Observer
from transhume.host.config import DEFAULT_VM_USER, HostConfig
from transhume.migration.driver.job import MoverFolder, Role
from transhume.model.errors import HostLost, TranshumeError
from transhume.model.migration import Migration, MigrationOptions, Outcome, Phase
from transhume.model.orders import Adjustment
from transhume.model.vm import Accel, Disk, Vm, VmSpec
from transhume.trust.files import IdentityFiles
from transhume.trust.token import Token
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import find_running

POLL_S = 0.02
WAIT_LIMIT_S = 60.0


async def until(condition: Callable[[], Awaitable[Any]], what: str, limit_s: float = WAIT_LIMIT_S) -> Any:
    """Ask again until the answer is true, and return it."""
    deadline_s = time.monotonic() + limit_s
    while True:
        answer = await condition()
        if answer:
            return answer
        assert time.monotonic() < deadline_s, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


class Farm:
    """Hosts `alpha` (with the controller), `beta` and those that a larger lab has, and the folder of
    their disks, which they share.
    """

    def __init__(self, lab: Lab, disks: Path, guest: Guest) -> None:
        self.lab = lab
        self.disks = disks
        self.guest = guest
        self._sector = assemble(disks)
        self._calm_sector = assemble(disks, calm=True)

    # --- daemons -----------------------------------------------------------------------------------

    async def form(self) -> None:
        """Start all daemons as one farm."""
        first, *others = self.lab.hosts
        self._write_config(
            first,
            HostConfig(name=first.name, state_dir=first.state_dir, address=first.address),
        )
        await self.start_daemon(first.name)
        async with self.client(first.name) as client:
            for host in others:
                invitation = await client.invite()
                config = HostConfig(
                    name=host.name,
                    state_dir=host.state_dir,
                    address=host.address,
                    controller_address=first.address,
                )
                await self._enter(first, Token.parse(invitation.token), config)
                self._write_config(host, config)
                await self.start_daemon(host.name)

            async def all_known() -> bool:
                return len(await client.hosts()) == len(self.lab.hosts)

            await until(all_known, "all hosts are known to the controller")

    async def _enter(self, first: LabHost, token: Token, config: HostConfig) -> None:
        """Join by way of the first host's local socket: the hosts' network is not the tests'."""
        calls = HttpCalls("the first daemon", first.state_dir / "api.sock", "/v1")
        await enter(calls, token, config, IdentityFiles(first.state_dir).authority.read_text())
        await calls.close()

    def client(self, host: str = "alpha") -> FarmClient:
        """The API as a person on `host` uses it."""
        return FarmClient(self.lab[host].state_dir / "api.sock")

    async def start_daemon(self, name: str) -> None:
        """Start a host's daemon and wait until it answers."""
        host = self.lab[name]
        log = (host.state_dir / "daemon.log").open("ab")
        with log:
            host.start(
                *host.transhume_command()[:2],
                "transhume.daemon",
                "--state-dir",
                str(host.state_dir),
                stderr=log,
                start_new_session=True,
            )

        async def answers() -> bool:
            try:
                async with self.client(name) as client:
                    await client.ping()
            except TranshumeError:
                return False
            return True

        await until(answers, f"the daemon of {name} answers")

    def kill_daemon(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End a daemon, or stop and continue it."""
        os.kill(self.lab[name].daemon_pid(), number)

    async def daemon_gone(self, name: str) -> None:
        pid = self.lab[name].daemon_pid()
        await until(lambda: _gone(pid), f"the daemon of {name} has ended")

    # --- VMs ---------------------------------------------------------------------------------------

    async def boot(self, vm: str, host: str = "alpha", calm: bool = False, **changes: Any) -> VmSpec:
        """Create and start a boot-sector guest and wait until it sweeps."""
        disk = self.disks / f"{vm}.img"
        make_disk(disk, self._calm_sector if calm else self._sector, DEFAULT_VM_USER)
        fields: dict[str, Any] = {
            "name": vm,
            "memory_bytes": 48 << 20,
            "cpus": 1,
            "disks": (Disk(path=str(disk)),),
            "accel": Accel.TCG,
        }
        spec = VmSpec(**{**fields, **changes})
        async with self.client(host) as client:
            await client.create_vm(spec, host)
            await client.start_vm(vm)

        async def sweeps() -> bool:
            return (await read_sweeps(self.vm_dir(vm, host))).newest > 2

        await until(sweeps, f"the guest of {vm} sweeps")
        return spec

    async def boot_linux(self, vm: str, host: str = "alpha", append: str = "", **changes: Any) -> VmSpec:
        """Create and start a Linux guest with the workload; it is not awaited."""
        fields: dict[str, Any] = {
            "name": vm,
            "memory_bytes": 160 << 20,
            "cpus": 1,
            "kernel": str(self.guest.kernel),
            "initrd": str(self.guest.initrd),
            "append": f"{LINUX_APPEND} {append}",
            "accel": Accel.TCG,
        }
        spec = VmSpec(**{**fields, **changes})
        async with self.client(host) as client:
            await client.create_vm(spec, host)
            await client.start_vm(vm)
        return spec

    def vm_dir(self, vm: str, host: str) -> Path:
        return self.lab[host].vm_dir(vm)

    def qemu_pid(self, vm: str, host: str) -> int:
        process = find_running(VmPaths(self.vm_dir(vm, host)))
        assert process is not None, f"{vm} does not run on {host}"
        pid = process.pid
        process.close()
        return pid

    def runs_on(self, vm: str) -> list[str]:
        """The hosts that have a QEMU for the VM."""
        found = []
        for host in self.lab.hosts:
            process = find_running(VmPaths(host.vm_dir(vm)))
            if process is not None:
                process.close()
                found.append(host.name)
        return found

    async def vm(self, name: str) -> Vm:
        async with self.client() as client:
            return await client.vm(name)

    # --- migrations --------------------------------------------------------------------------------

    async def begin(self, vm: str, to: str, **options: Any) -> str:
        """Ask for a migration; its id."""
        async with self.client() as client:
            return (await client.migrate(vm, to, MigrationOptions(**options))).id

    async def ended(self, migration: str, limit_s: float = WAIT_LIMIT_S) -> Migration:
        """The record of a migration when it has ended and its movers have gone."""

        async def over() -> Migration | None:
            try:
                async with self.client() as client:
                    record = await client.migration(migration)
            except TranshumeError:
                return None
            return record if record.outcome is not Outcome.RUNNING else None

        record: Migration = await until(over, f"migration {migration} has ended", limit_s)
        try:
            await until(lambda: self._no_movers(migration), f"the movers of {migration} have gone", 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.traces()}") from None
        return record

    async def migrate(self, vm: str, to: str, **options: Any) -> Migration:
        return await self.ended(await self.begin(vm, to, **options))

    async def adjust(self, migration: str, adjustment: Adjustment) -> None:
        """Give a migration other limits as soon as its source's mover takes them, unless it ends before."""

        async def taken() -> bool:
            async with self.client() as client:
                try:
                    await client.adjust(migration, adjustment)
                except HostLost:
                    return False  # a mover that has only just begun
                except TranshumeError:
                    return (await client.migration(migration)).outcome is not Outcome.RUNNING
            return True

        await until(taken, "the source takes other limits, or has ended")

    async def hurry(self, migration: str) -> None:
        """Take the limit off its bandwidth."""
        await self.adjust(migration, Adjustment(bandwidth_bytes_s=0))

    async def in_phase(self, migration: str, *phases: Phase) -> Migration:
        """Wait until the migration was reported in one of the phases."""

        async def there() -> Migration | None:
            async with self.client() as client:
                record = await client.migration(migration)
            assert record.outcome is Outcome.RUNNING, f"it ended before: {record.error}"
            return record if record.phase in phases else None

        found: Migration = await until(there, f"migration {migration} is in {phases}")
        return found

    def mover_pid(self, migration: str, host: str, role: Role) -> int:
        folder = MoverFolder.of(self.lab[host].state_dir / "migrations", migration, role)
        return int(folder.pid_file.read_text())

    def traces(self) -> str:
        """What the movers that are still there left in their folders, for the reader of a failed test."""
        files = [
            path
            for host in self.lab.hosts
            for path in sorted((host.state_dir / "migrations").glob("*/*"))
            if path.suffix in (".jsonl", ".log")
        ]
        return "\n".join(f"{path}: {path.read_text()[-1500:]}" for path in files)

    async def _no_movers(self, migration: str) -> bool:
        return not any(
            path.name.startswith(f"{migration}-")
            for host in self.lab.hosts
            for path in (host.state_dir / "migrations").iterdir()
        )

    # --- judging -----------------------------------------------------------------------------------

    async def assert_sound(self, vm: str, host: str, at_least: int = 0) -> int:
        """The VM runs on `host` and nowhere else, its memory is whole and it goes on. Its newest sweep."""
        assert self.runs_on(vm) == [host]
        record = await self.vm(vm)
        assert record.ownership.owner == host
        first = await read_sweeps(self.vm_dir(vm, host))
        assert first.fault() == ""
        assert first.newest >= at_least

        async def goes_on() -> bool:
            return (await read_sweeps(self.vm_dir(vm, host))).newest > first.newest

        await until(goes_on, f"{vm} goes on")
        last = await read_sweeps(self.vm_dir(vm, host))
        assert last.fault() == ""
        return last.newest

    async def linux_goes_on(self, vm: str, host: str) -> None:
        """The Linux guest's workload verifies all its pages once more, and none is wrong."""
        with Observer([self.vm_dir(vm, host) / "serial.log"]) as observer:
            observer.wait_for(lambda timeline: len(timeline.ticks()) > 3, 60)
            assert {tick.corrupt for tick in observer.ask(lambda timeline: timeline.ticks())} == {0}

    async def assert_nothing_left(self, vm: str, host: str) -> None:
        """`host` keeps nothing of the VM or of migrations: no folder, no process."""
        state_dir = self.lab[host].state_dir
        assert not (state_dir / "vms" / vm).exists()
        await until(lambda: self._no_mover_folders(host), f"{host} has no mover folders")
        names = [_name_of(pid) for pid in self.lab[host].processes()]
        assert f"guest={vm}" not in " ".join(names)

    async def _no_mover_folders(self, host: str) -> bool:
        return not list((self.lab[host].state_dir / "migrations").iterdir())

    async def clear(self) -> None:
        """Make the farm as it was: links whole, daemons up, no VMs."""
        self.lab.restore()
        self.lab.shape()
        for host in self.lab.hosts:
            with suppress(OSError, ValueError):
                os.kill(host.daemon_pid(), signal.SIGCONT)
            if not await self._answers(host.name):
                await self.start_daemon(host.name)
        async with self.client() as client:
            for record in await client.vms():
                # The queued one first: it would begin when the other is over.
                for migration in filter(None, (record.queued, record.migration)):
                    with suppress(TranshumeError):
                        await client.cancel(migration)
                    await self.ended(migration)
                await client.kill_vm(record.spec.name)
                await client.delete_vm(record.spec.name)
        for host in self.lab.hosts:
            for leftover in (host.state_dir / "vms").iterdir():
                raise AssertionError(f"left over: {leftover}")

    async def _answers(self, name: str) -> bool:
        try:
            async with self.client(name) as client:
                await client.ping()
        except TranshumeError:
            return False
        return True

    def _write_config(self, host: LabHost, config: HostConfig) -> None:
        path = host.state_dir / "host.json"
        path.write_text(config.model_dump_json())
        path.chmod(0o600)


LINUX_APPEND = (
    "console=ttyS0 quiet mitigations=off tsc=reliable no_timer_check random.trust_cpu=on "
    "workload.memory_mib=48"
)


async def _gone(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] == "Z"


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
