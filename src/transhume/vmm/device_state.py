"""The device state: what QEMU's own migration stream holds when guest RAM is left out of it.

This is what the patent calls non-memory state. QEMU leaves RAM out with the capability `x-ignore-shared`
when the RAM is a shared file, which ours is; what stays are the devices, the ROMs and the frame buffer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from transhume.vmm.monitor import Monitor


@dataclass(frozen=True)
class SavedState:
    """`size_bytes` went out; `qemu_ram_bytes` is the RAM in it (ROMs, frame buffer)."""

    size_bytes: int
    qemu_ram_bytes: int


async def prepare_save(monitor: Monitor) -> None:
    """Set capabilities and limits on the source, early: it costs round trips that are not downtime then."""
    raise NotImplementedError


class OutgoingState:
    """A device state on its way out of a VM that is stopped.

    Read all `chunks`, then `finish`; or `cancel` at any moment, after which the VM is paused and can be
    told to run again.
    """

    @classmethod
    async def begin(cls, monitor: Monitor) -> OutgoingState:
        """Tell QEMU to write its state. Raises `VmmError` when it refuses; the VM is as before then."""
        raise NotImplementedError

    def chunks(self) -> AsyncIterator[bytes]:
        """The stream, piece by piece, while QEMU writes it; ends when QEMU has closed it.

        That the stream ended does not mean that it is whole: only `finish` tells.
        """
        raise NotImplementedError

    async def finish(self, timeout_s: float = 30.0) -> SavedState:
        """Wait until QEMU says that it has written everything, and check that RAM was left out.

        Raises `VmmError` with QEMU's reason; the VM is paused then, and `Monitor.cont` lets it go on.
        """
        raise NotImplementedError

    async def cancel(self) -> None:
        """Give up: returns when QEMU has left its migration. The VM is paused. Safe to call at any time."""
        raise NotImplementedError


async def save(monitor: Monitor) -> bytes:
    """The whole device state at once, with the checks of `OutgoingState.finish`."""
    raise NotImplementedError


async def prepare_load(monitor: Monitor) -> None:
    """Set capabilities on a destination that was started with `incoming`."""
    raise NotImplementedError


class IncomingState:
    """A device state on its way into a VM that waits for it. Disks stay untouched until `Monitor.cont`."""

    @classmethod
    async def begin(cls, monitor: Monitor) -> IncomingState:
        """Let QEMU wait for the stream. May be called long before the first byte."""
        raise NotImplementedError

    async def feed(self, chunk: bytes | memoryview) -> None:
        """Give QEMU the next piece. Raises `VmmError` when it does not take it any more."""
        raise NotImplementedError

    async def finish(self, timeout_s: float = 30.0) -> None:
        """Say that this was all, and wait until the VM is loaded and paused.

        Raises `VmmError` with QEMU's reason when the state does not fit; that QEMU is of no use any more.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Give up what is open. Safe to call at any time."""
        raise NotImplementedError
