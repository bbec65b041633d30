"""The destination's port, on every address that its host has."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Mapping, Sequence

from transhume.model.errors import HostLost

BIND_RETRY_S = 1.0
"""Pause before an address that this host did not have is tried again, and before a port that could not accept
goes on."""

_BACKLOG_CONNECTIONS = 8
_PORT_TRIES = 8


class Listener:
    """Accepts connections at one port on each address, in the running event loop.

    `take` gets each accepted socket, in the loop's thread. An address that cannot be bound is told
    to `log` once, and tried again until it can: a link that is broken now may be the one that is left later.
    """

    def __init__(
        self, addresses: Sequence[str], take: Callable[[socket.socket], None], log: Callable[[str], None]
    ) -> None:
        self._addresses = tuple(addresses)
        self._take = take
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, wanted: int) -> int:
        """Listen at a port (0: any that is free on all addresses); the port. Call it once.

        Raises `HostLost` when no address can be bound; nothing is open then.
        """
        opened, refused = _bind_each(self._addresses, wanted)
        for _ in range(_PORT_TRIES):
            # What the kernel chose on one address may be taken on another.
            if wanted or errno.EADDRINUSE not in [error.errno for error in refused.values()]:
                break
            for listening in opened.values():
                listening.close()
            opened, refused = _bind_each(self._addresses, wanted)
        if not opened:
            reasons = "; ".join(f"{address}: {error.strerror}" for address, error in refused.items())
            raise HostLost(f"no port can be opened on {reasons}")
        port: int = next(iter(opened.values())).getsockname()[1]
        for listening in opened.values():
            self._start(listening)
        for address, error in refused.items():
            self._log(f"{address} cannot be listened at now, it is tried again: {error.strerror}")
            self._keep(asyncio.create_task(self._bind_later(address, port), name=f"bind {address}"))
        return port

    def close(self) -> None:
        """Accept nothing more. The ports are closed in the loop's next turn."""
        for task in self._tasks:
            task.cancel()

    async def closed(self) -> None:
        """Wait for the end of `close`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self, listening: socket.socket) -> None:
        accepting = asyncio.create_task(self._accept_forever(listening), name="accept")
        # Also when it is cancelled before it began; never earlier, while the loop still watches the socket.
        accepting.add_done_callback(lambda _: listening.close())
        self._keep(accepting)

    async def _bind_later(self, address: str, port: int) -> None:
        while True:
            await asyncio.sleep(BIND_RETRY_S)
            try:
                listening = _bind(address, port)
            except OSError:
                continue
            self._log(f"{address} is listened at, too, from now on")
            self._start(listening)
            return

    async def _accept_forever(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                self._log(f"a connection could not be accepted: {error.strerror}")
                await asyncio.sleep(BIND_RETRY_S)
                continue
            self._take(accepted)


def _bind_each(
    addresses: Sequence[str], wanted: int
) -> tuple[Mapping[str, socket.socket], Mapping[str, OSError]]:
    """All at the same port: the wanted one, or what the kernel chooses on the first that can be bound."""
    opened: dict[str, socket.socket] = {}
    refused: dict[str, OSError] = {}
    port = wanted
    for address in addresses:
        try:
            opened[address] = _bind(address, port)
        except OSError as error:
            refused[address] = error
        else:
            port = opened[address].getsockname()[1]
    return opened, refused


def _bind(address: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(_BACKLOG_CONNECTIONS)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
