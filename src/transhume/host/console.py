"""One serial console, many people: what the guest prints goes to all, what they type to the guest.

QEMU's socket takes one connection at a time, so the daemon holds that one and shares it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from transhume.model.errors import VmmError

CHUNK_BYTES = 4096
BACKLOG_CHUNKS = 256
"""A listener that falls further behind than this loses its connection rather than slow the guest."""


class _Line:
    """The connection to one VM's serial port and its listeners."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.listeners: list[asyncio.Queue[bytes | None]] = []
        self.pump = asyncio.create_task(self._pump(reader), name="console")

    async def _pump(self, reader: asyncio.StreamReader) -> None:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                for queue in list(self.listeners):
                    self._offer(queue, chunk)
        except OSError:
            pass  # QEMU went away: the end of the console, which the listeners are told below
        finally:
            for queue in list(self.listeners):
                self._offer(queue, None)

    def _offer(self, queue: asyncio.Queue[bytes | None], item: bytes | None) -> None:
        try:
            queue.put_nowait(item)
        except asyncio.QueueFull:
            if queue in self.listeners:
                self.listeners.remove(queue)
            queue.get_nowait()
            queue.put_nowait(None)


class Consoles:
    """The consoles of a host's VMs."""

    def __init__(self) -> None:
        self._lines: dict[Path, _Line] = {}
        self._lock = asyncio.Lock()

    async def join(self, socket: Path, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What the guest behind `socket` prints, while `received` is typed. Ends when QEMU ends."""
        line = await self._line(socket)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(BACKLOG_CHUNKS)
        line.listeners.append(queue)
        typist = asyncio.create_task(self._type(line, received), name="console-input")
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
        finally:
            typist.cancel()
            await asyncio.gather(typist, return_exceptions=True)
            if queue in line.listeners:
                line.listeners.remove(queue)
            if not line.listeners:
                await self._hang_up(socket, line)

    async def _line(self, socket: Path) -> _Line:
        async with self._lock:
            line = self._lines.get(socket)
            if line is not None and not line.pump.done():
                return line
            try:
                reader, writer = await asyncio.open_unix_connection(str(socket))
            except OSError as error:
                raise VmmError(f"the serial console at {socket} cannot be reached: {error}") from None
            line = self._lines[socket] = _Line(reader, writer)
            return line

    async def _type(self, line: _Line, received: AsyncIterator[bytes]) -> None:
        async for chunk in received:
            line.writer.write(chunk)
            await line.writer.drain()

    async def _hang_up(self, socket: Path, line: _Line) -> None:
        if self._lines.get(socket) is line:
            del self._lines[socket]
        line.pump.cancel()
        await asyncio.gather(line.pump, return_exceptions=True)
        line.writer.close()
