"""The destination's port is open on every address that its host has, also on one that comes later."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from transhume.migration.driver import listener as listener_module
from transhume.migration.driver.listener import Listener
from transhume.model.errors import HostLost

FIRST, SECOND = "127.0.0.1", "127.0.0.2"
NOT_HERE = "192.0.2.77"
LIMIT_S = 20.0


class Port:
    """A listener that keeps what it accepted and what it said."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[str] = asyncio.Queue()
        self.said: list[str] = []
        self.listeners: list[Listener] = []

    def listen(self, *addresses: str, wanted: int = 0) -> int:
        made = Listener(addresses, self._take, self.said.append)
        port = made.open(wanted)
        self.listeners.append(made)
        return port

    def _take(self, sock: socket.socket) -> None:
        self.accepted.put_nowait(sock.getsockname()[0])
        sock.close()

    async def answers(self, address: str, port: int) -> bool:
        try:
            _, writer = await asyncio.open_connection(address, port)
        except OSError:
            return False
        async with asyncio.timeout(LIMIT_S):
            assert await self.accepted.get() == address
        writer.close()
        await writer.wait_closed()
        return True


@pytest_asyncio.fixture
async def port() -> AsyncIterator[Port]:
    made = Port()
    yield made
    for each in made.listeners:
        each.close()
        await each.closed()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_all_addresses_have_the_same_port(port: Port) -> None:
    number = port.listen(FIRST, SECOND)
    for address in (FIRST, SECOND, FIRST):
        assert await port.answers(address, number)
    assert not port.said


async def test_a_successor_gets_the_port_of_before(port: Port) -> None:
    number = port.listen(FIRST, SECOND)
    assert await port.answers(SECOND, number)
    [before] = port.listeners
    before.close()
    await before.closed()
    assert not await port.answers(FIRST, number)
    assert port.listen(FIRST, SECOND, wanted=number) == number
    assert await port.answers(SECOND, number)


async def test_an_address_that_is_not_there_yet_is_no_error(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "BIND_RETRY_S", 0.01)
    really, there = listener_module._bind, False

    def bind(address: str, number: int) -> socket.socket:
        if address == SECOND and not there:
            return really(NOT_HERE, number)
        return really(address, number)

    monkeypatch.setattr(listener_module, "_bind", bind)
    number = port.listen(FIRST, SECOND)
    assert await port.answers(FIRST, number)
    assert not await port.answers(SECOND, number)
    assert port.said == [f"{SECOND} cannot be listened at now, it is tried again: {os.strerror(99)}"]
    there = True
    await until(lambda: len(port.said) > 1)
    assert await port.answers(SECOND, number)
    assert port.said[1] == f"{SECOND} is listened at, too, from now on"


async def test_the_first_address_may_be_the_one_that_is_missing(port: Port) -> None:
    number = port.listen(NOT_HERE, SECOND)
    assert await port.answers(SECOND, number)


async def test_without_any_address_it_says_why(port: Port) -> None:
    reason = os.strerror(99)
    with pytest.raises(HostLost) as caught:
        port.listen(NOT_HERE, "2001:db8::1")
    assert caught.value.message == f"no port can be opened on {NOT_HERE}: {reason}; 2001:db8::1: {reason}"


async def test_a_port_that_is_taken_on_one_address_is_not_chosen(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, taken = listener_module._bind, socket.create_server((SECOND, 0))
    number = taken.getsockname()[1]
    wanted: list[int] = []

    def bind(address: str, port_number: int) -> socket.socket:
        if address == FIRST and not wanted:
            port_number = number  # what the kernel might well choose
        wanted.append(port_number)
        return really(address, port_number)

    monkeypatch.setattr(listener_module, "_bind", bind)
    with taken:
        chosen = port.listen(FIRST, SECOND)
        assert chosen != number
        assert await port.answers(FIRST, chosen)
        assert await port.answers(SECOND, chosen)


async def test_a_port_that_was_asked_for_is_never_another(port: Port) -> None:
    with socket.create_server((FIRST, 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(HostLost, match="no port can be opened on"):
            port.listen(FIRST, wanted=number)
        assert port.listen(FIRST, SECOND, wanted=number) == number  # the other will do until this one is free
        assert await port.answers(SECOND, number)


async def test_nothing_stays_open(port: Port) -> None:
    before = len(os.listdir("/proc/self/fd"))
    port.listen(FIRST, SECOND, NOT_HERE)
    [made] = port.listeners
    made.close()  # before any of its tasks has begun
    await made.closed()
    assert len(os.listdir("/proc/self/fd")) == before
