"""One serial port, many people: all hear the guest, and one who does not listen holds nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from transhume.host.console import BACKLOG_CHUNKS, CHUNK_BYTES, Consoles
from transhume.model.errors import VmmError

LIMIT_S = 20


class SerialPort:
    """QEMU's end: one connection at a time, as its socket has it."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def answered(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(self.lines.get(), LIMIT_S)


@asynccontextmanager
async def serial_port(path: Path) -> AsyncIterator[SerialPort]:
    port = SerialPort()
    open_writers: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.append(writer)
        await port.lines.put((reader, writer))

    server = await asyncio.start_unix_server(take, str(path))
    try:
        yield port
    finally:
        server.close()
        for writer in open_writers:
            writer.close()


class Person:
    """Somebody at the console."""

    def __init__(self, consoles: Consoles, socket: Path) -> None:
        self.keys: asyncio.Queue[bytes] = asyncio.Queue()
        self.heard = b""
        self._output = consoles.join(socket, self._typed())

    async def hears(self, text: bytes) -> None:
        """Until all of it has come."""
        async with asyncio.timeout(LIMIT_S):
            while text not in self.heard:
                self.heard += await anext(self._output)

    async def hears_the_end(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            async for chunk in self._output:
                self.heard += chunk

    async def leaves(self) -> None:
        assert isinstance(self._output, AsyncGenerator)
        await self._output.aclose()

    async def _typed(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.keys.get()


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "serial.sock"


async def first_words(port: SerialPort, *people: Person) -> asyncio.StreamWriter:
    """Let everybody join: a listener is there when it has heard something."""
    joining = [asyncio.create_task(person.hears(b"login:")) for person in people]
    _, writer = await port.answered()
    while not all(task.done() for task in joining):
        writer.write(b"login:")
        await writer.drain()
        await asyncio.wait(joining, timeout=0.05)
    await asyncio.gather(*joining)
    return writer


async def test_everybody_hears_what_the_guest_prints(path: Path) -> None:
    async with serial_port(path) as port:
        consoles = Consoles()
        people = [Person(consoles, path) for _ in range(3)]
        writer = await first_words(port, *people)
        writer.write(b"the news")
        for person in people:
            await person.hears(b"the news")
        assert port.lines.empty(), "one connection serves all"
        for person in people:
            await person.leaves()


async def test_what_anybody_types_goes_to_the_guest(path: Path) -> None:
    async with serial_port(path) as port:
        consoles = Consoles()
        first, second = Person(consoles, path), Person(consoles, path)
        joining = asyncio.create_task(first.hears(b"login:"))
        reader, writer = await port.answered()
        writer.write(b"login:")
        await joining
        first.keys.put_nowait(b"root\r")
        assert await asyncio.wait_for(reader.readexactly(5), LIMIT_S) == b"root\r"
        joining = asyncio.create_task(second.hears(b"#"))
        second.keys.put_nowait(b"halt\r")
        assert await asyncio.wait_for(reader.readexactly(5), LIMIT_S) == b"halt\r"
        writer.write(b"#")
        await joining
        await first.leaves()
        await second.leaves()


async def test_who_does_not_listen_is_dropped_and_holds_nobody_up(path: Path) -> None:
    async with serial_port(path) as port:
        consoles = Consoles()
        quick, slow = Person(consoles, path), Person(consoles, path)
        writer = await first_words(port, quick, slow)

        async def print_much() -> None:
            for _ in range(2 * BACKLOG_CHUNKS):
                writer.write(b"x" * CHUNK_BYTES)
                await writer.drain()
            writer.write(b"that was all")

        printing = asyncio.create_task(print_much())
        await quick.hears(b"that was all")
        await printing
        await slow.hears_the_end()
        assert len(slow.heard) <= (BACKLOG_CHUNKS + 1) * CHUNK_BYTES + len(b"login:") * 1000
        assert b"that was all" not in slow.heard
        await quick.leaves()


async def test_everybody_hears_that_qemu_has_ended(path: Path) -> None:
    async with serial_port(path) as port:
        consoles = Consoles()
        people = [Person(consoles, path) for _ in range(3)]
        writer = await first_words(port, *people)
        writer.close()
        for person in people:
            await person.hears_the_end()


async def test_the_end_comes_to_all_who_have_not_listened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has a full backlog at that moment."""
    monkeypatch.setattr("transhume.host.console.BACKLOG_CHUNKS", 1)
    async with serial_port(path) as port:
        consoles = Consoles()
        people = [Person(consoles, path) for _ in range(3)]
        joining = [asyncio.create_task(person.hears(b"a")) for person in people]
        _, writer = await port.answered()
        async with asyncio.timeout(LIMIT_S):
            while path not in consoles._lines or len(consoles._lines[path].listeners) < len(people):
                await asyncio.sleep(0.001)
        writer.write(b"a")
        await asyncio.gather(*joining)
        writer.write(b"b")
        writer.close()
        for person in people:
            await person.hears_the_end()


async def test_the_last_one_to_leave_hangs_up(path: Path) -> None:
    async with serial_port(path) as port:
        consoles = Consoles()
        person = Person(consoles, path)
        joining = asyncio.create_task(person.hears(b"login:"))
        reader, writer = await port.answered()
        writer.write(b"login:")
        await joining
        await person.leaves()
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        writer.close()
        again = Person(consoles, path)
        await first_words(port, again)
        await again.leaves()


async def test_a_console_works_again_when_the_vm_was_started_again(path: Path) -> None:
    consoles = Consoles()
    async with serial_port(path) as port:
        person = Person(consoles, path)
        writer = await first_words(port, person)
        writer.close()
        await person.hears_the_end()
    path.unlink()
    async with serial_port(path) as port:
        person = Person(consoles, path)
        await first_words(port, person)
        await person.leaves()


async def test_a_vm_that_has_no_console(path: Path) -> None:
    with pytest.raises(VmmError, match="serial console"):
        await Person(Consoles(), path).hears(b"anything")
