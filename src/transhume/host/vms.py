"""The VMs of one host, as they stand on its disk and in its process table.

Nothing about a VM is remembered here that could not be found again: each question looks at the VM's
folder and process, so a restarted daemon, or a mover that changed something meanwhile, needs no word.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

from transhume.model.errors import Conflict, NotFound, Refused, TimedOut, VmmError
from transhume.model.vm import VmSpec, VmState
from transhume.vmm.added_memory import add_memory, settle_memory
from transhume.vmm.epoch import UNKNOWN, note_epoch, read_epoch
from transhume.vmm.launch import launch
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import QemuProcess, find_running, forget

LOG_LINES_LIMIT = 100_000


class LocalVms:
    """Starts, ends and answers for the VMs whose folders lie in `vms_dir`."""

    def __init__(self, vms_dir: Path, vm_user: str) -> None:
        self._vms_dir = vms_dir
        self._vm_user = vm_user
        self._monitors: dict[str, tuple[int, Monitor]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def paths(self, name: str) -> VmPaths:
        return VmPaths(self._vms_dir / name)

    def process(self, name: str) -> QemuProcess | None:
        """The VM's QEMU, or None when it does not run here. The caller closes it."""
        return find_running(self.paths(name))

    def spec(self, name: str) -> VmSpec:
        """What the VM was started with. `NotFound` when this host has none of that name."""
        try:
            return VmSpec.model_validate_json(self.paths(name).spec_file.read_text())
        except FileNotFoundError:
            raise NotFound(f"VM {name} is not on this host") from None

    def epochs(self) -> dict[str, int]:
        """Under which epoch each VM runs here, of those that run and whose epoch was noted."""
        found = {name: self.epoch(name) for name in self._names()}
        return {name: epoch for name, epoch in found.items() if epoch != UNKNOWN}

    def epoch(self, name: str) -> int:
        """Under which epoch the VM runs here; `UNKNOWN` when it does not run, or nobody noted it."""
        process = self.process(name)
        if process is None:
            return UNKNOWN
        process.close()
        return read_epoch(self.paths(name))

    def note_epoch(self, name: str, epoch: int) -> None:
        """Keep the epoch under which a VM runs here; of one that has ended meanwhile nothing is kept.

        Raises `VmmError` when the disk does not take it.
        """
        process = self.process(name)
        if process is None:
            return
        process.close()
        try:
            note_epoch(self.paths(name), epoch)
        except OSError as error:
            raise VmmError(f"the epoch of VM {name} cannot be kept on this host: {error.strerror}") from error

    async def start(self, spec: VmSpec) -> None:
        """Start the guest. `Conflict` when it runs; after `VmmError` nothing is left running."""
        async with self._lock(spec.name):
            running = self.process(spec.name)
            if running is not None:
                running.close()
                raise Conflict(f"VM {spec.name} runs already on this host")
            launched = await launch(spec, self.paths(spec.name), vm_user=self._vm_user)
            self._remember(spec.name, launched.process.pid, launched.monitor)
            launched.process.close()

    async def grow(self, name: str, memory_bytes: int) -> None:
        """Give a VM that runs RAM up to `memory_bytes` in all. Does nothing when it has that.

        Raises `Conflict` when it does not run here, `Refused` when it cannot have it, `VmmError` when QEMU
        refuses; it has what it had then.
        """
        process = self.process(name)
        if process is None:
            raise Conflict(f"VM {name} does not run on this host")
        try:
            monitor = await self.monitor(name)
            spec = await settle_memory(monitor, self.paths(name), self.spec(name))
            more_bytes = memory_bytes - spec.memory_bytes
            if more_bytes < 0:
                raise Refused(
                    f"VM {name} has {spec.memory_bytes >> 20} MiB, and memory is not taken from a VM that "
                    "runs: stop it first"
                )
            if more_bytes:
                await add_memory(monitor, process.pid, self.paths(name), spec, more_bytes)
        finally:
            process.close()

    async def stop(self, name: str, timeout_s: float) -> None:
        """Press the power button and wait until QEMU has ended; `TimedOut` leaves the VM running."""
        process = self.process(name)
        if process is None:
            return
        try:
            monitor = await self.monitor(name)
            await monitor.power_button()
            try:
                await process.wait(timeout_s)
            except TimedOut:
                raise TimedOut(
                    f"the guest of VM {name} did not power down within {timeout_s:g} s; "
                    f"it still runs. `transhume vm kill {name}` ends it at once"
                ) from None
        finally:
            process.close()
        self._forget(name)

    async def kill(self, name: str) -> None:
        """End QEMU at once. Does nothing when it does not run."""
        process = self.process(name)
        if process is None:
            return
        try:
            await process.kill()
        finally:
            process.close()
        self._forget(name)

    async def delete(self, name: str) -> None:
        """Remove the folder of a VM that does not run."""
        process = self.process(name)
        if process is not None:
            process.close()
            raise Conflict(f"VM {name} runs: stop it before it is deleted")
        self._monitors.pop(name, None)
        shutil.rmtree(self.paths(name).directory, ignore_errors=True)

    async def monitor(self, name: str) -> Monitor:
        """The daemon's connection to the VM's QEMU, made when it is first needed.

        Raises `Conflict` when the VM does not run here, `VmmError` when QEMU does not answer.
        """
        async with self._lock(name):
            process = self.process(name)
            if process is None:
                await self._drop(name)
                raise Conflict(f"VM {name} does not run on this host")
            pid = process.pid
            process.close()
            known = self._monitors.get(name)
            if known is not None and known[0] == pid and known[1].qmp.connected:
                return known[1]
            await self._drop(name)
            monitor = await Monitor.connect(self.paths(name).qmp_socket)
            self._remember(name, pid, monitor)
            return monitor

    async def state(self, name: str) -> VmState:
        """What the vCPUs do; UNKNOWN when QEMU lives but does not answer."""
        try:
            monitor = await self.monitor(name)
        except Conflict:
            return VmState.STOPPED
        except (VmmError, TimedOut):
            return VmState.UNKNOWN
        try:
            async with asyncio.timeout(5.0):
                return await monitor.state()
        except (VmmError, TimeoutError):
            return VmState.UNKNOWN

    async def states(self) -> Mapping[str, VmState]:
        """All VMs that have a folder here."""
        names = self._names()
        states = await asyncio.gather(*(self.state(name) for name in names))
        return dict(zip(names, states, strict=True))

    def _names(self) -> list[str]:
        if not self._vms_dir.is_dir():
            return []
        return sorted(path.name for path in self._vms_dir.iterdir() if path.is_dir())

    def log(self, name: str, serial: bool, lines: int) -> str:
        """The last `lines` of what the guest printed on its serial port, or of what QEMU itself said."""
        paths = self.paths(name)
        path = paths.serial_log if serial else paths.qemu_log
        try:
            text = path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-min(lines, LOG_LINES_LIMIT) :])

    async def close(self) -> None:
        """Let go of all VMs; they run on."""
        for name in list(self._monitors):
            await self._drop(name)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _remember(self, name: str, pid: int, monitor: Monitor) -> None:
        self._monitors[name] = (pid, monitor)

    async def _drop(self, name: str) -> None:
        known = self._monitors.pop(name, None)
        if known is not None:
            await known[1].close()

    def _forget(self, name: str) -> None:
        """Remove what a QEMU that has ended left, unless another one has started meanwhile."""
        process = self.process(name)
        if process is not None:
            process.close()
            return
        forget(self.paths(name))
