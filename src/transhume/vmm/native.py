"""QEMU's own migration engine, guest RAM included: the fall-back, and the yardstick.

Both ends get a connected TCP socket from us, so that who connects to whom is decided in one place for
both engines. The destination is started with `incoming` and stays paused when it has loaded: who runs is
decided by the register, not by QEMU.
"""

from __future__ import annotations

from dataclasses import dataclass

from transhume.vmm.monitor import Monitor


@dataclass(frozen=True)
class NativeOptions:
    """`max_bandwidth_bytes_s` None means as fast as possible. `downtime_limit_ms` is QEMU's promise."""

    downtime_limit_ms: int = 300
    max_bandwidth_bytes_s: int | None = None


@dataclass(frozen=True)
class NativeProgress:
    """QEMU's own numbers (`query-migrate`). Times that QEMU does not know yet are None."""

    status: str
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    dirty_pages_s: int = 0
    rate_bytes_s: float = 0.0
    iteration: int = 0
    expected_downtime_ms: int | None = None
    downtime_ms: int | None = None
    setup_ms: int | None = None
    total_ms: int | None = None
    error: str = ""


class NativeOutgoing:
    """The source of a migration by QEMU. QEMU stops the VM by itself when little enough is left."""

    @classmethod
    async def begin(cls, monitor: Monitor, socket_fd: int, options: NativeOptions) -> NativeOutgoing:
        """Start to send through the connected socket, of which QEMU gets a duplicate."""
        raise NotImplementedError

    async def progress(self) -> NativeProgress:
        raise NotImplementedError

    async def wait_stopped(self) -> float:
        """Return when QEMU has stopped the VM: the moment, on this host's monotonic clock, in seconds."""
        raise NotImplementedError

    async def finish(self) -> NativeProgress:
        """Wait until all was written. The VM is paused here then.

        Raises `VmmError` with QEMU's reason when it failed or was cancelled: QEMU lets a VM that ran
        before go on by itself in that case.
        """
        raise NotImplementedError

    async def cancel(self) -> None:
        """Give up; returns when QEMU has. The VM runs if it ran before."""
        raise NotImplementedError


class NativeIncoming:
    """The destination of a migration by QEMU."""

    @classmethod
    async def begin(cls, monitor: Monitor, socket_fd: int) -> NativeIncoming:
        raise NotImplementedError

    async def finish(self) -> None:
        """Wait until everything is loaded; the VM is paused then, its disks untouched.

        Raises `VmmError` when the stream was broken; that QEMU is of no use any more.
        """
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
