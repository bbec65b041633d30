"""A relay between two movers that damages one record of TLS when it is told to.

    python -m tests.e2e.damaging_proxy ADDRESS FIRST_PORT LAST_PORT

It runs on the source's host and takes every connection to those ports of ADDRESS, which is another host's:
`Damage` leads them here by a routing rule, and the relay's own connections past it, by their mark. A line on
its standard input says which record to damage next; a line on its standard output says that it did. What is
in a record nobody can see here, but how large it is:

- `pages`: one bit of the next record that is as large as a page or larger, which carries pages;
- `words`: one bit of the next smaller one, in either direction.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transhume.demo import namespaces
from transhume.demo.lab import LabHost
from transhume.model.errors import KernelError
from transhume.model.vm import PAGE_BYTES

FIRST_PORT, LAST_PORT = 41000, 41127
PAST_THE_RELAY_MARK = 7
TABLE = "141"
PORT_RANGE = "ip_local_port_range"
ACCEPT_LOCAL = f"conf/{namespaces.INTERFACE}/accept_local"
APPLICATION_DATA = 23

_HEADER = struct.Struct("!BHH")
"""Of a record: its type, an old version number, the length of what follows."""


class Damage:
    """The relay between two hosts of a lab, seen from the test."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def strike(self, kind: str) -> str:
        """Damage the next record of the kind, `pages` or `words`. Its size in words, when it has passed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind}\n".encode())
        self._process.stdin.flush()
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line, "the relay has ended"
        return str(json.loads(line)["damaged"])


@contextmanager
def damage_between(source: LabHost, destination: LabHost) -> Iterator[Damage]:
    """Lead what the source's movers send to the destination's through a relay, and back.

    The destination's kernel hands out few port numbers meanwhile, which the relay takes all.
    """
    ports = ("ipproto", "tcp", "dport", f"{FIRST_PORT}-{LAST_PORT}")
    rules = (
        ("fwmark", str(PAST_THE_RELAY_MARK), "lookup", "main", "priority", "40"),
        ("to", destination.address, *ports, "lookup", TABLE, "priority", "50"),
    )
    before = _setting(destination, PORT_RANGE)
    arguments = (destination.address, str(FIRST_PORT), str(LAST_PORT))
    process = source.start(
        *(sys.executable, "-m", "tests.e2e.damaging_proxy", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the relay did not start"
        _set(destination, PORT_RANGE, f"{FIRST_PORT} {LAST_PORT}")
        # The rules lead an answer's way back to this host itself, which the kernel takes for a forgery.
        _set(source, ACCEPT_LOCAL, "1")
        local = ("local", destination.address, "dev", "lo", "src", source.address, "table", TABLE)
        namespaces.ip("route", "add", *local, namespace=source.namespace)
        for rule in rules:
            namespaces.ip("rule", "add", *rule, namespace=source.namespace)
        yield Damage(process)
    finally:
        for rule in rules:
            with suppress(KernelError):
                namespaces.ip("rule", "delete", *rule, namespace=source.namespace)
        with suppress(KernelError):
            namespaces.ip("route", "flush", "table", TABLE, namespace=source.namespace)
        _set(source, ACCEPT_LOCAL, "0")
        _set(destination, PORT_RANGE, before)
        process.kill()
        process.wait()


def _setting(host: LabHost, name: str) -> str:
    return host.run("cat", f"/proc/sys/net/ipv4/{name}").require_success().stdout.strip()


def _set(host: LabHost, name: str, value: str) -> None:
    script = 'echo "$2" > "/proc/sys/net/ipv4/$1"'
    host.run("sh", "-c", script, "sh", name, value).require_success()


class Orders:
    """What to damage next, as the lines on the standard input say."""

    def __init__(self) -> None:
        self._wanted: str | None = None

    def listen(self) -> None:
        """In a thread of its own, until the input ends."""
        for line in sys.stdin:
            self._wanted = line.strip()

    def take(self, kind: int, length_bytes: int) -> bool:
        """Whether this very record is to be damaged; the order is then carried out."""
        if self._wanted is None or kind != APPLICATION_DATA:
            return False
        wanted = self._wanted == ("pages" if length_bytes >= PAGE_BYTES else "words")
        if wanted:
            self._wanted = None
            sys.stdout.write(json.dumps({"damaged": f"{length_bytes} bytes"}) + "\n")
            sys.stdout.flush()
        return wanted


async def _pass_records(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, orders: Orders) -> None:
    while True:
        header = await reader.readexactly(_HEADER.size)
        kind, _, length_bytes = _HEADER.unpack(header)
        body = bytearray(await reader.readexactly(length_bytes))
        if orders.take(kind, length_bytes):
            body[0] ^= 1
        writer.write(header + body)
        await writer.drain()


async def _relay(address: str, orders: Orders, near: socket.socket) -> None:
    """Both directions of one connection, until either end closes it."""
    port: int = near.getsockname()[1]
    far = socket.socket()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PAST_THE_RELAY_MARK)
    far.setblocking(False)
    source, to_source = await asyncio.open_connection(sock=near)
    try:
        await asyncio.get_running_loop().sock_connect(far, (address, port))
        destination, to_destination = await asyncio.open_connection(sock=far)
    except OSError:
        far.close()
        to_source.close()
        return
    directions = [
        asyncio.create_task(_pass_records(source, to_destination, orders)),
        asyncio.create_task(_pass_records(destination, to_source, orders)),
    ]
    await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    for task in directions:
        task.cancel()
    await asyncio.gather(*directions, return_exceptions=True)
    for writer in (to_source, to_destination):
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _serve(address: str, first_port: int, last_port: int) -> None:
    orders = Orders()
    threading.Thread(target=orders.listen, daemon=True).start()
    loop = asyncio.get_running_loop()
    relays: set[asyncio.Task[None]] = set()

    async def accept_forever(listener: socket.socket) -> None:
        while True:
            near, _ = await loop.sock_accept(listener)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(_relay(address, orders, near))
            relays.add(task)
            task.add_done_callback(relays.discard)

    acceptors = []
    for port in range(first_port, last_port + 1):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_IP, getattr(socket, "IP_TRANSPARENT", 19), 1)
        listener.bind((address, port))
        listener.listen(8)
        listener.setblocking(False)
        acceptors.append(accept_forever(listener))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.gather(*acceptors)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
