"""The device state: what QEMU's own migration stream holds when guest RAM is left out of it.

This is what the patent calls non-memory state. QEMU leaves RAM out with the capability `x-ignore-shared`
when the RAM is a shared file, which ours is; what stays are the devices, the ROMs and the frame buffer.

The time it takes is downtime. So: capabilities and limits are set long before, the stream is read while
QEMU still writes it (through a socket pair, since QEMU can break off a write to a socket but not to a
pipe), and the end is learned from events. `OutgoingState.begin` may be called as soon as the VM is
stopped, before its last pages are sent: the stream is collected meanwhile, and QEMU does not touch guest
RAM while it writes (its own engine sends RAM before devices, too).
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
READ_BYTES = 1 << 20

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
    """A device state on its way out of a VM that is stopped.

    `prepare` early, `start` when the VM is stopped, read all `chunks`, then `finish`; or `cancel` at any
    moment, after which the VM is paused and can be told to run again.
    """

    def __init__(self, monitor: Monitor, channel: socket.socket, migration: QemuMigration) -> None:
        self._monitor = monitor
        self._channel = channel
        self._migration = migration
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._size_bytes = 0
        self._ram_bytes: asyncio.Task[int] | None = None
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def prepare(cls, monitor: Monitor) -> OutgoingState:
        """Make the channel and give QEMU its end, while the VM still runs."""
        ours, qemus = _channel()
        migration = QemuMigration(monitor)
        try:
            await migration.lend_channel(qemus.fileno())
        except BaseException:
            ours.close()
            migration.close()
            raise
        finally:
            qemus.close()
        return cls(monitor, ours, migration)

    @classmethod
    async def begin(cls, monitor: Monitor) -> OutgoingState:
        """`prepare` and `start` at once."""
        outgoing = await cls.prepare(monitor)
        await outgoing.start()
        return outgoing

    async def start(self) -> None:
        """Tell QEMU to write its state. Raises `VmmError` when it refuses; the VM is as before then.

        The command may follow `Monitor.stop` at once (`asyncio.gather(monitor.stop(), outgoing.start())`):
        QEMU carries out one after the other, and a round trip is saved.
        """
        self._loop.add_reader(self._channel, self._read)
        try:
            await self._migration.start("migrate")
        except VmmError:
            self._close()
            raise
        # Asked while QEMU writes, so that `finish` need not wait for the answer.
        self._ram_bytes = asyncio.create_task(self._ask_ram_bytes(), name="ask for the RAM in the stream")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The stream, piece by piece, while QEMU writes it; ends when QEMU has closed it.

        That the stream ended does not mean that it is whole: only `finish` tells.
        """
        while chunk := await self._chunks.get():
            yield chunk

    async def finish(self, timeout_s: float = 30.0) -> SavedState:
        """Wait until QEMU says that it has written everything, and check that RAM was left out.

        Raises `VmmError` with QEMU's reason; the VM is paused then, and `Monitor.cont` lets it go on.
        """
        assert self._ram_bytes is not None, "start comes first"
        try:
            async with asyncio.timeout(timeout_s):
                ram_bytes = await self._ram_bytes
                status = await self._migration.wait_ended()
            if self._size_bytes > STATE_LIMIT_BYTES:
                raise VmmError(f"QEMU's device state is larger than {STATE_LIMIT_BYTES} bytes: RAM is in it")
            if status != "completed":
                raise VmmError(f"QEMU could not save its device state: {await self._migration.reason()}")
            if ram_bytes > STATE_LIMIT_BYTES:
                raise VmmError(
                    f"QEMU put {ram_bytes} bytes of RAM into its device state: it does not take the guest's "
                    "RAM for a shared file, and this version of QEMU cannot be used"
                )
        except TimeoutError:
            await self.cancel()
            raise VmmError(f"QEMU did not save its device state within {timeout_s:g} s") from None
        finally:
            self._close()
        return SavedState(self._size_bytes, ram_bytes)

    async def cancel(self) -> None:
        """Give up: returns when QEMU has left its migration. The VM is paused. Safe to call at any time.

        Raises `VmmError` when QEMU is gone, `TimedOut` when it cannot let go.
        """
        # With nobody left to read, a QEMU that hangs in a write gets an error and lets go.
        self._close_channel()
        await self._stop_asking()
        try:
            await self._migration.cancel()
        finally:
            self._close()

    async def _ask_ram_bytes(self) -> int:
        """How much RAM QEMU counts as part of this migration."""
        await self._migration.wait_active()
        numbers = await self._migration.query()
        return int(numbers.get("ram", {}).get("total", 0))

    async def _stop_asking(self) -> None:
        if self._ram_bytes is not None:
            self._ram_bytes.cancel()
            await asyncio.gather(self._ram_bytes, return_exceptions=True)

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
        self._chunks.put_nowait(chunk)
        if not chunk:
            self._close_channel()

    def _close_channel(self) -> None:
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
    state = b"".join([chunk async for chunk in outgoing.chunks()])
    await outgoing.finish()
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
        ours, qemus = _channel()
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
        """Give QEMU the next piece. Raises `VmmError` when it does not take it any more."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._channel, chunk)
        except OSError as error:
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


def _channel() -> tuple[socket.socket, socket.socket]:
    """Our end and QEMU's. The buffer holds a whole usual state, so that neither waits for the other."""
    ours, qemus = socket.socketpair()
    for end in (ours, qemus):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER_BYTES)
    ours.setblocking(False)
    return ours, qemus
