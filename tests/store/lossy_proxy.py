"""Stands between a client and an etcd member and loses transactions on their way, or their answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

import httpx
from tests.store.etcd_cluster import ADDRESS

_FULL = b'{"error": "x", "message": "etcdserver: mvcc: database space exceeded", "code": 8}'


class Fate(Enum):
    """What becomes of a transaction."""

    PASS = "it is carried out and answered"
    LOSE_ANSWER = "it is carried out, and the connection breaks before the answer"
    LOSE_REQUEST = "the connection breaks before it is carried out"
    CALL_FULL = "it is carried out, and answered as etcd does when that has used up its quota"
    HOLD = "as before, but it is kept, and carried out when `release` is called"


@dataclass
class LossyProxy:
    """One member's gateway as seen through a bad network. Only transactions meet a fate; the rest passes."""

    member_port: int
    port: int = 0
    fates: list[Fate] = field(default_factory=list)
    """Of the next transactions, the first first. When there are no more, they pass."""
    held: list[bytes] = field(default_factory=list)
    seen: int = 0
    """Transactions that came in."""

    async def release(self) -> list[bool]:
        """Carry out what was held. Whether each transaction's comparisons held."""
        bodies, self.held = self.held, []
        async with httpx.AsyncClient() as client:
            answers = [await client.post(self._url("/v3/kv/txn"), content=body) for body in bodies]
        return [bool(answer.json().get("succeeded")) for answer in answers]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            async with httpx.AsyncClient() as client:
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
                    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                    body = await reader.readexactly(int(headers["content-length"]))
                    path = urlsplit(head[0].split()[1]).path
                    if not await self._answer(client, path, body, writer):
                        break

    async def _answer(
        self, client: httpx.AsyncClient, path: str, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection goes on."""
        fate = Fate.PASS
        if path == "/v3/kv/txn":
            self.seen += 1
            fate = self.fates.pop(0) if self.fates else Fate.PASS
        if fate is Fate.HOLD:
            self.held.append(body)
        if fate in (Fate.HOLD, Fate.LOSE_REQUEST):
            return False
        answer = await client.post(self._url(path), content=body)
        if fate is Fate.LOSE_ANSWER:
            return False
        status, content = answer.status_code, answer.content
        if fate is Fate.CALL_FULL:
            status, content = 429, _FULL
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        return True

    def _url(self, path: str) -> str:
        return f"http://{ADDRESS}:{self.member_port}{path}"


@contextlib.asynccontextmanager
async def lossy_proxy(member_port: int) -> AsyncIterator[LossyProxy]:
    """A proxy in front of that member, gone afterwards with all its connections."""
    proxy = LossyProxy(member_port)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await proxy._serve(reader, writer)

    server = await asyncio.start_server(serve, ADDRESS, 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
