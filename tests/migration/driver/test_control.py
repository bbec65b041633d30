"""The control socket: who comes late hears the latest, and who speaks nonsense disturbs nobody."""

from __future__ import annotations

import asyncio
import gc
import json
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from transhume.migration.driver.control import LINE_LIMIT_BYTES, ControlServer
from transhume.model.migration import Phase
from transhume.model.orders import CancelReply, MigrationUpdate, Prepared

PREPARED = Prepared(address="192.0.2.2", port=4711, key="ab" * 32)
REPLY = CancelReply(accepted=True, runs_at="source host alpha")


def update(phase: Phase) -> MigrationUpdate:
    return MigrationUpdate(migration="m1", host="alpha", phase=phase)


class Daemon:
    """The other end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def hears(self) -> dict[str, Any]:
        line = await asyncio.wait_for(self.reader.readline(), 20)
        assert line.endswith(b"\n"), f"the connection ended after {line!r}"
        message: dict[str, Any] = json.loads(line)
        return message

    async def hears_the_end(self) -> None:
        assert await asyncio.wait_for(self.reader.read(), 20) == b""

    async def says(self, line: bytes) -> None:
        self.writer.write(line)
        await self.writer.drain()


@pytest.fixture
def path(short_dir: Path) -> Path:
    return short_dir / "mover.sock"


@pytest.fixture
async def server(path: Path) -> AsyncIterator[ControlServer]:
    control = ControlServer(path)
    await control.open()
    yield control
    await control.close()


@asynccontextmanager
async def daemon(path: Path) -> AsyncIterator[Daemon]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        yield Daemon(reader, writer)
    finally:
        writer.close()


async def test_a_listener_hears_every_update(server: ControlServer, path: Path) -> None:
    async with daemon(path) as listener:
        server.publish(update(Phase.PREPARED))
        assert (await listener.hears())["update"]["phase"] == "prepared"
        server.publish(update(Phase.PRECOPY))
        message = await listener.hears()
        assert MigrationUpdate.model_validate(message["update"]) == update(Phase.PRECOPY)


async def test_who_comes_late_hears_the_latest_of_each_kind(server: ControlServer, path: Path) -> None:
    server.prepared(PREPARED)
    server.publish(update(Phase.PREPARED))
    server.publish(update(Phase.PRECOPY))
    async with daemon(path) as listener:
        assert await listener.hears() == {"prepared": PREPARED.model_dump(mode="json")}
        assert (await listener.hears())["update"]["phase"] == "precopy"
        server.publish(update(Phase.SUSPENDED))
        assert (await listener.hears())["update"]["phase"] == "suspended"


async def test_several_listeners_hear_the_same(server: ControlServer, path: Path) -> None:
    async with daemon(path) as first, daemon(path) as second:
        server.publish(update(Phase.PRECOPY))
        assert await first.hears() == await second.hears()


async def test_a_cancel_is_answered_to_who_asked(server: ControlServer, path: Path) -> None:
    asked = 0

    async def cancel() -> CancelReply:
        nonlocal asked
        asked += 1
        return REPLY

    server.cancel = cancel
    async with daemon(path) as other, daemon(path) as asking:
        await asking.says(b'{"command": "cancel"}\n')
        assert await asking.hears() == {"cancelled": REPLY.model_dump()}
        server.publish(update(Phase.ABORTED))
        assert "update" in await other.hears()
    assert asked == 1


async def test_updates_go_on_while_a_cancel_waits_for_its_answer(server: ControlServer, path: Path) -> None:
    decided = asyncio.Event()

    async def cancel() -> CancelReply:
        await decided.wait()
        return REPLY

    server.cancel = cancel
    async with daemon(path) as asking:
        await asking.says(b'{"command": "cancel"}\n')
        server.publish(update(Phase.STATE_SENT))
        assert (await asking.hears())["update"]["phase"] == "state-sent"
        decided.set()
        assert "cancelled" in await asking.hears()


async def test_what_is_no_command_is_passed_over(server: ControlServer, path: Path) -> None:
    async with daemon(path) as listener:
        await listener.says(b'{"command": "dance"}\n{"hello": 1}\n')
        server.publish(update(Phase.PRECOPY))
        assert "update" in await listener.hears()


@pytest.mark.parametrize(
    "nonsense",
    [b"cancel\n", b"[]\n", b'"cancel"\n', b"17\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"],
    ids=["word", "list", "text", "number", "bytes", "brackets"],
)
async def test_nonsense_costs_the_connection_and_nothing_else(
    server: ControlServer, path: Path, nonsense: bytes
) -> None:
    mishaps: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: mishaps.append(context))
    async with daemon(path) as good, daemon(path) as bad:
        await bad.says(nonsense)
        await bad.hears_the_end()
        server.publish(update(Phase.PRECOPY))
        assert "update" in await good.hears()
    assert mishaps == []


async def test_a_line_without_end_costs_the_connection(server: ControlServer, path: Path) -> None:
    async with daemon(path) as good, daemon(path) as bad:
        sending = asyncio.create_task(bad.says(b"x" * (LINE_LIMIT_BYTES + (1 << 20))))
        try:
            assert await asyncio.wait_for(bad.reader.read(), 20) == b""
        except ConnectionError:
            pass  # it was cut off amid what it said
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        server.publish(update(Phase.PRECOPY))
        assert "update" in await good.hears()


async def test_a_listener_that_goes_away_is_forgotten(server: ControlServer, path: Path) -> None:
    async with daemon(path) as good:
        async with daemon(path) as leaving:
            server.publish(update(Phase.PREPARED))
            await leaving.hears()
        for phase in (Phase.PRECOPY, Phase.SUSPENDED, Phase.DONE):
            server.publish(update(phase))
        heard = [(await good.hears())["update"]["phase"] for _ in range(4)]
    assert heard == ["prepared", "precopy", "suspended", "done"]


async def test_a_dead_predecessors_socket_is_replaced(path: Path) -> None:
    first = ControlServer(path)
    await first.open()
    second = ControlServer(path)
    await second.open()
    second.publish(update(Phase.ABORTED))
    async with daemon(path) as listener:
        assert (await listener.hears())["update"]["phase"] == "aborted"
    await second.close()
    await first.close()
    assert not path.exists()


async def test_the_last_word_arrives_before_the_end(path: Path) -> None:
    control = ControlServer(path)
    await control.open()
    control.publish(update(Phase.PREPARED))
    async with daemon(path) as listener:
        await listener.hears()
        for _ in range(100):
            control.publish(update(Phase.PRECOPY))
        control.publish(update(Phase.DONE))
        closing = asyncio.create_task(control.close())
        phases = [(await listener.hears())["update"]["phase"] for _ in range(101)]
        await listener.hears_the_end()
        await closing
    assert phases[-1] == "done"


async def test_only_root_may_connect(server: ControlServer, path: Path) -> None:
    assert path.stat().st_mode & 0o077 == 0


async def test_the_end_comes_to_all_listeners(path: Path) -> None:
    control = ControlServer(path)
    await control.open()
    control.prepared(PREPARED)
    async with daemon(path) as first, daemon(path) as second, daemon(path) as third:
        for listener in (first, second, third):
            await listener.hears()
        await control.close()
        for listener in (first, second, third):
            await listener.hears_the_end()


async def test_a_listener_that_does_not_read_holds_up_no_end(path: Path) -> None:
    control = ControlServer(path)
    await control.open()
    control.prepared(PREPARED)
    async with daemon(path) as deaf, daemon(path) as other:
        await deaf.hears()
        await other.hears()
        for _ in range(20_000):
            control.publish(update(Phase.PRECOPY))
        hearing = asyncio.create_task(other.reader.read())
        await asyncio.wait_for(control.close(), 20)
        whole = await asyncio.wait_for(hearing, 20)
        assert whole.count(b"\n") == 20_000
        heard = await asyncio.wait_for(deaf.reader.read(), 20)
        assert heard.count(b"\n") < 20_000, "what it did not take in time is dropped"


async def test_a_path_that_cannot_be_listened_at_leaves_no_socket_open(short_dir: Path) -> None:
    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always")
        with pytest.raises(OSError, match="too long"):
            await ControlServer(short_dir / ("x" * 200)).open()
        gc.collect()
    assert [str(warning.message) for warning in left_open] == []
