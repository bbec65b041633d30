"""The device state: what QEMU's own migration stream holds when guest RAM is left out of it.

This is what the patent calls non-memory state. QEMU leaves RAM out with the capability `x-ignore-shared`
when the RAM is a shared file, which ours is; what stays are the devices, the ROMs and the frame buffer.

The time it takes is downtime, so as much as possible happens while the VM still runs. QEMU begins its
migration early (a thread, its own dirty bitmaps, the first bytes of a ROM) and then hangs in a write,
since the socket between it and us has next to no buffer and nobody reads. The VM is stopped by us and not
by QEMU's migration, so that QEMU never lets it run again on its own account. When it is stopped we read,
and what is left for QEMU to do is to write the devices. (A socket and no pipe: only a write to a socket
can be broken off by a cancel.)

    prepare_save, OutgoingState.prepare      at leisure
    OutgoingState.start                      the VM runs on
    Monitor.stop                             the pause begins
    OutgoingState.release                    may overlap with the last pages: QEMU does not touch guest
                                             RAM any more (its own engine sends RAM before devices, too)
    OutgoingState.chunks, finish

"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from transhume.model.errors import TimedOut, VmmError
from transhume.vmm.migrate_command import QemuMigration, set_capabilities
from transhume.vmm.monitor import Monitor

STATE_LIMIT_BYTES = 64 << 20
"""More than this is no device state: ROMs and frame buffer have 10 MB at most."""

CHANNEL_BUFFER_BYTES = 4 << 20
HELD_BUFFER_BYTES = 4096
READ_BYTES = 1 << 20

SET_UP_LIMIT_S = 10.0

UNLIMITED_BYTES_S = 1 << 40
LONGEST_DOWNTIME_LIMIT_MS = 2_000_000
"""QEMU's own maximum: with it QEMU never holds back what is left."""


@dataclass(frozen=True)
class SavedState:
    """`size_bytes` went out; `qemu_ram_bytes` is the RAM in it (ROMs, frame buffer)."""

    size_bytes: int
    qemu_ram_bytes: int


async def prepare_save(monitor: Monitor) -> None:
    """Set capabilities and limits on the source, early: it costs round trips that are not downtime then."""
    await set_capabilities(monitor, "events", "x-ignore-shared")
    await monitor.qmp.execute(
        "migrate-set-parameters",
        max_bandwidth=UNLIMITED_BYTES_S,
        downtime_limit=LONGEST_DOWNTIME_LIMIT_MS,
    )


class OutgoingState:
    """A device state on its way out of a VM; see the head of this file for the order of the calls.

    `cancel` at any moment: a VM that ran goes on, and one that was stopped is paused and can be told to
    run again.
    """

    def __init__(
        self, monitor: Monitor, ours: socket.socket, qemus: socket.socket, migration: QemuMigration
    ) -> None:
        self._monitor = monitor
        self._channel = ours
        self._held = qemus
        self._migration = migration
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._size_bytes = 0
        self._ram_bytes = 0
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def prepare(cls, monitor: Monitor) -> OutgoingState:
        """Make the channel and give QEMU its end."""
        ours, qemus = _channel(HELD_BUFFER_BYTES)
        outgoing = cls(monitor, ours, qemus, QemuMigration(monitor))
        try:
            await outgoing._migration.lend_channel(qemus.fileno())
        except BaseException:
            outgoing._close()
            raise
        return outgoing

    @classmethod
    async def begin(cls, monitor: Monitor) -> OutgoingState:
        """`prepare` and `start` at once."""
        outgoing = await cls.prepare(monitor)
        try:
            await outgoing.start()
        except BaseException:
            # Nobody else has it yet. Without its channel, a QEMU that has begun fails and lets go.
            outgoing._close()
            raise
        return outgoing

    async def start(self) -> None:
        """Let QEMU set its migration up, and hold it there. Returns when it is set up; the VM runs on.

        Raises `VmmError` when QEMU refuses, or would not leave the guest's RAM out; the VM is as before
        then.
        """
        try:
            await self._migration.start("migrate")
            await self._migration.wait_active(SET_UP_LIMIT_S)
            numbers = await self._migration.query()
            self._ram_bytes = int(numbers.get("ram", {}).get("total", 0))
            if self._ram_bytes > STATE_LIMIT_BYTES:
                raise VmmError(
                    f"QEMU puts {self._ram_bytes} bytes of RAM into its device state: it does not take the "
                    "guest's RAM for a shared file, and this version of QEMU cannot be used"
                )
        except (TimedOut, VmmError):
            with contextlib.suppress(VmmError):
                await self.cancel()
            raise

    def release(self) -> None:
        """Read from now on: QEMU goes on and writes everything. The VM must be stopped."""
        if self._held.fileno() >= 0:
            # A larger buffer wakes QEMU, and lets it write without a pause for each piece.
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER_BYTES)
            self._held.close()
            self._loop.add_reader(self._channel, self._read)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The stream, in pieces as large as have come, while QEMU writes it; ends when QEMU has closed it.

        That the stream ended does not mean that it is whole: only `finish` tells.
        """
        self.release()
        ended = False
        while not ended:
            pieces = [await self._chunks.get()]
            while pieces[-1] and not self._chunks.empty():
                pieces.append(self._chunks.get_nowait())
            ended = not pieces[-1]
            if whole := b"".join(pieces):
                yield whole

    async def finish(self, timeout_s: float = 30.0) -> SavedState:
        """Wait until QEMU says that it has written everything.

        Raises `VmmError` with QEMU's reason; the VM is paused then, and `Monitor.cont` lets it go on.
        """
        self.release()
        try:
            status = await self._migration.wait_ended(timeout_s)
            if self._size_bytes > STATE_LIMIT_BYTES:
                raise VmmError(f"QEMU's device state is larger than {STATE_LIMIT_BYTES} bytes: RAM is in it")
            if status != "completed":
                raise VmmError(f"QEMU could not save its device state: {await self._migration.reason()}")
        except TimedOut as error:
            await self.cancel()
            raise VmmError(f"QEMU could not save its device state: {error.message}") from error
        finally:
            self._close()
        return SavedState(self._size_bytes, self._ram_bytes)

    async def cancel(self) -> None:
        """Give up: returns when QEMU has left its migration. Safe to call at any time.

        Raises `VmmError` when QEMU is gone, `TimedOut` when it cannot let go.
        """
        # With nobody left to read, a QEMU that hangs in a write gets an error and lets go.
        self._close_channel()
        try:
            await self._migration.cancel()
        finally:
            self._close()

    def _read(self) -> None:
        """Take what has come; an empty chunk marks the end."""
        try:
            chunk = self._channel.recv(READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            chunk = b""
        self._size_bytes += len(chunk)
        if self._size_bytes > STATE_LIMIT_BYTES:
            chunk = b""
        if chunk:
            self._chunks.put_nowait(chunk)
        else:
            self._close_channel()

    def _close_channel(self) -> None:
        self._held.close()
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel)
            self._channel.close()
            self._chunks.put_nowait(b"")

    def _close(self) -> None:
        self._close_channel()
        self._migration.close()


async def save(monitor: Monitor) -> bytes:
    """The whole device state at once, with the checks of `OutgoingState.finish`."""
    outgoing = await OutgoingState.begin(monitor)
    try:
        state = b"".join([chunk async for chunk in outgoing.chunks()])
        await outgoing.finish()
    finally:
        outgoing._close()
    return state


async def prepare_load(monitor: Monitor) -> None:
    """Set capabilities on a destination that was started with `incoming`.

    QEMU must announce nothing by itself, since it would do so before the VM runs here.
    """
    await set_capabilities(monitor, "events", "x-ignore-shared", "late-block-activate")
    await monitor.qmp.execute("migrate-set-parameters", announce_rounds=0)


class IncomingState:
    """A device state on its way into a VM that waits for it. Disks stay untouched until `Monitor.cont`."""

    def __init__(self, channel: socket.socket, migration: QemuMigration) -> None:
        self._channel = channel
        self._migration = migration

    @classmethod
    async def begin(cls, monitor: Monitor) -> IncomingState:
        """Let QEMU wait for the stream. May be called long before the first byte."""
        ours, qemus = _channel(CHANNEL_BUFFER_BYTES)
        migration = QemuMigration(monitor)
        try:
            await migration.lend_channel(qemus.fileno())
            await migration.start("migrate-incoming")
        except BaseException:
            ours.close()
            migration.close()
            raise
        finally:
            qemus.close()
        return cls(ours, migration)

    async def feed(self, chunk: bytes | memoryview) -> None:
        """Give QEMU the next piece.

        Raises `VmmError` when it does not take it any more; that QEMU is of no use, and all is closed here.
        """
        try:
            await asyncio.get_running_loop().sock_sendall(self._channel, chunk)
        except OSError as error:
            self.close()
            raise VmmError(f"QEMU did not take the device state: {await self._migration.reason()}") from error

    async def finish(self, timeout_s: float = 30.0) -> None:
        """Say that this was all, and wait until the VM is loaded and paused.

        Raises `VmmError` with QEMU's reason when the state does not fit; that QEMU is of no use any more.
        """
        try:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)
            status = await self._migration.wait_ended(timeout_s)
        except (TimedOut, VmmError) as error:
            raise VmmError(f"QEMU did not load the device state: {await self._migration.reason()}") from error
        finally:
            self.close()
        if status != "completed":
            raise VmmError(f"QEMU did not load the device state: {await self._migration.reason()}")

    def close(self) -> None:
        """Give up what is open. Safe to call at any time."""
        self._channel.close()
        self._migration.close()


def _channel(buffer_bytes: int) -> tuple[socket.socket, socket.socket]:
    """Our end, which does not block, and QEMU's, each with room for about this much on its way."""
    ours, qemus = socket.socketpair()
    for end in (ours, qemus):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    ours.setblocking(False)
    return ours, qemus
