"""The HTTP client against peers that are slow, gone, confused or hostile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from transhume.api.http_connection import MAX_ANSWER_BYTES, HttpConnection
from transhume.api.http_stream import open_answer
from transhume.api.problem import from_problem, to_problem
from transhume.model.errors import (
    ERRORS_BY_CODE,
    HostLost,
    PeerProtocolError,
    PreflightFailed,
    TranshumeError,
)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def peer(handler: Handler) -> AsyncIterator[tuple[str, int]]:
    """A server on loopback whose connections `handler` serves."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[:2]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    length = next(lengths, 0)
    return head + await reader.readexactly(length)


def answering(*answers: bytes, then_close: bool = False) -> tuple[Handler, list[bytes]]:
    """One answer to each request in turn, whatever the connection; and the requests as they came."""
    seen: list[bytes] = []
    rest = list(answers)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while rest:
            seen.append(await read_request(reader))
            writer.write(rest.pop(0))
            await writer.drain()
            if then_close:
                return

    return handler, seen


@asynccontextmanager
async def connection(handler: Handler) -> AsyncIterator[HttpConnection]:
    async with peer(handler) as where:
        made = HttpConnection("the peer", where)
        yield made
        await made.close()


async def test_requests_share_a_connection() -> None:
    handler, seen = answering(OK, OK)
    async with connection(handler) as made:
        assert await made.request("GET", "/a", None, 5.0) == (200, b"ok")
        assert await made.request("POST", "/b", b"{}", 5.0) == (200, b"ok")
    assert seen[0].startswith(b"GET /a HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Content-Type: application/json\r\n" in seen[1]
    assert seen[1].endswith(b"\r\n\r\n{}")


async def test_an_idle_connection_that_was_closed_is_opened_again() -> None:
    answer, seen = answering(OK, OK, then_close=True)
    closed = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()
        await writer.wait_closed()
        closed.set()

    async with connection(handler) as made:
        assert await made.request("GET", "/a", None, 5.0) == (200, b"ok")
        async with asyncio.timeout(5):
            await closed.wait()
        assert await made.request("GET", "/b", None, 5.0) == (200, b"ok")
    assert len(seen) == 2


async def test_what_was_sent_is_never_sent_twice() -> None:
    handler, seen = answering(b"HTTP/1.1 200 OK\r\ncontent-le", then_close=True)
    async with connection(handler) as made:
        with pytest.raises(HostLost, match="the peer does not answer"):
            await made.request("POST", "/swap", b"{}", 5.0)
    assert len(seen) == 1


async def test_silence_ends_with_the_limit() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with connection(silent) as made:
        with pytest.raises(HostLost, match=r"no answer within 0\.05 s"):
            await made.request("GET", "/", None, 0.05)


async def test_a_request_that_was_given_up_does_not_spoil_the_next() -> None:
    release = asyncio.Event()
    first = True

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        while True:
            await read_request(reader)
            if first:
                first = False
                await release.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nold")
            writer.write(OK)

    async with connection(slow) as made:
        asking = asyncio.create_task(made.request("GET", "/", None, 5.0))
        async with asyncio.timeout(5):
            while first:
                await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        release.set()
        assert await made.request("GET", "/", None, 5.0) == (200, b"ok")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (MAX_ANSWER_BYTES + 1),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * (1 << 17),
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (1 << 17) + b"\r\n\r\n",
    ],
)
async def test_what_is_not_our_http_is_an_error_of_its_own(answer: bytes) -> None:
    handler, _ = answering(answer)
    async with connection(handler) as made:
        with pytest.raises(PeerProtocolError, match="the peer"):
            await made.request("GET", "/", None, 5.0)


async def test_chunks_come_as_they_are_sent_and_an_early_end_is_noticed() -> None:
    go_on = asyncio.Event()

    async def chunked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await writer.drain()
        await go_on.wait()
        writer.write(b"5\r\ntw")

    async with peer(chunked) as where, open_answer("the peer", where, None, "GET", "/", None, 5.0) as answer:
        assert answer.head.status == 200
        assert await anext(answer.body) == b"one"
        go_on.set()
        with pytest.raises(HostLost):
            _ = [piece async for piece in answer.body]


async def test_a_whole_chunked_answer() -> None:
    handler, _ = answering(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n4;x=y\r\ntwo.\r\n0\r\n\r\n", OK
    )
    async with connection(handler) as made:
        assert await made.request("GET", "/", None, 5.0) == (200, b"onetwo.")
        assert await made.request("GET", "/", None, 5.0) == (200, b"ok")


@pytest.mark.parametrize("code", sorted(ERRORS_BY_CODE))
def test_every_error_survives_the_wire(code: str) -> None:
    error = ERRORS_BY_CODE[code](f"words about {code}")
    problem = to_problem(error)
    back = from_problem(problem["status"], str(problem).replace("'", '"').encode(), "the peer")
    assert type(back) is type(error)
    assert back.message == error.message


def test_reasons_survive_the_wire_and_strange_answers_are_lost_hosts() -> None:
    problem = to_problem(PreflightFailed("no", ("one", "two")))
    back = from_problem(409, str(problem).replace("'", '"').encode(), "the peer")
    assert isinstance(back, PreflightFailed)
    assert back.reasons == ("one", "two")
    for body in (b"<html>Bad gateway</html>", b"", b"[]", b'{"code": "conflict"}', b"\xff\xfe", b"5"):
        assert isinstance(from_problem(502, body, "the peer"), HostLost)
    unknown = from_problem(500, b'{"code": "of-a-later-release", "detail": "words"}', "the peer")
    assert type(unknown) is TranshumeError


async def test_a_request_that_was_given_up_is_not_sent_on() -> None:
    """A peer that comes round later must not carry out what nobody waits for any more."""
    given_up = asyncio.Event()
    came: asyncio.Queue[int] = asyncio.Queue()
    body = b"x" * (32 << 20)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await given_up.wait()
        size_bytes = 0
        try:
            while chunk := await reader.read(1 << 20):
                size_bytes += len(chunk)
        finally:
            await came.put(size_bytes)

    async with connection(handler) as made:
        with pytest.raises(HostLost, match="no answer within"):
            await made.request("POST", "/swap", body, 0.3)
        given_up.set()
        assert await asyncio.wait_for(came.get(), 20) < len(body)
