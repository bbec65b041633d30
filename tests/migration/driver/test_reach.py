"""The source finds its destination on whichever address works, and soon."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.migration.driver.test_handshake import AT_DESTINATION, AT_SOURCE, IDENTITY, but, close, destination

from transhume.migration.driver.handshake import Identity, accept
from transhume.migration.driver.reach import reach
from transhume.migration.path_choice import PathChoice
from transhume.migration.transfer.channel import FrameChannel
from transhume.model.errors import HostLost, TranshumeError, Unauthorized

HERE = "127.0.0.1"
OTHER = "127.0.0.2"
NEVER = threading.Event()
PATIENT = but(silence_limit_s=20.0)


@contextmanager
def hole(address: str, port: int) -> Iterator[None]:
    """A place where each packet is lost: the kernel drops what comes for a port whose queue is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((address, port))
        yield


@contextmanager
def mute(address: str, port: int) -> Iterator[None]:
    """A place where connections are accepted and nobody ever says anything."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(8)
        yield


def choice(*addresses: str, identity: Identity = PATIENT) -> PathChoice:
    return PathChoice(addresses, identity.silence_limit_s)


def channel_of(result: object) -> FrameChannel:
    assert isinstance(result, tuple), result
    channel = result[0]
    assert isinstance(channel, FrameChannel)
    return channel


def test_where_nobody_answers_the_next_address_is_tried_soon() -> None:
    answering = destination(PATIENT)
    with answering as port, hole(OTHER, port):
        made = choice(OTHER, HERE)
        began_s = time.monotonic()
        channel, address = reach(made, port, PATIENT, AT_SOURCE, NEVER)
        took_s = time.monotonic() - began_s
        made.worked(address)
    assert address == HERE
    assert 1.5 < took_s < 5
    assert made.attempts(again=True)[0].address == HERE
    close(answering, channel, channel_of(answering.result))


def test_where_nobody_says_anything_a_search_goes_on_soon() -> None:
    answering = destination(PATIENT)
    with answering as port, mute(OTHER, port):
        began_s = time.monotonic()
        channel, address = reach(choice(OTHER, HERE), port, PATIENT, AT_SOURCE, NEVER, again=True)
        assert time.monotonic() - began_s < 5
    assert address == HERE
    close(answering, channel, channel_of(answering.result))


def test_the_patience_of_the_search_is_not_kept() -> None:
    """The answers of a destination that was found may take as long as the limit of silence says."""
    answering = destination(PATIENT)
    with answering as port:
        channel, _ = reach(choice(HERE, OTHER), port, PATIENT, AT_SOURCE, NEVER, again=True)
    assert channel._socket.gettimeout() is None
    limit = channel._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
    assert int.from_bytes(limit[:8], "little") == 20
    close(answering, channel, channel_of(answering.result))


def test_a_stranger_on_the_way_is_passed_by() -> None:
    """Networks of two sites may have the same addresses: who cannot prove to be the destination is not it."""
    with ExitStack() as stack:
        answering = destination()
        port = stack.enter_context(answering)
        stranger = stack.enter_context(socket.socket())
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind((OTHER, port))
        stranger.listen(1)
        refusals: list[TranshumeError] = []

        def refuse() -> None:
            sock, _ = stranger.accept()
            try:
                accept(sock, but(key=b"x" * 32), AT_DESTINATION)
            except TranshumeError as error:
                refusals.append(error)

        thread = threading.Thread(target=refuse)
        thread.start()
        channel, address = reach(choice(OTHER, HERE), port, IDENTITY, AT_SOURCE, NEVER)
        thread.join(20)
    assert address == HERE
    assert [type(refusal) for refusal in refusals] == [Unauthorized]
    close(answering, channel, channel_of(answering.result))


def test_what_each_path_said_is_told() -> None:
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(HostLost) as caught:
        reach(choice(HERE, OTHER), port, IDENTITY, AT_SOURCE, NEVER)
    assert caught.value.message == "; ".join(
        f"host beta cannot be reached at {address}:{port}: Connection refused" for address in (HERE, OTHER)
    )


def test_a_mover_that_is_to_end_does_not_try_the_rest() -> None:
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(HostLost) as caught:
        reach(choice(HERE, OTHER), port, IDENTITY, AT_SOURCE, stopping)
    assert OTHER not in caught.value.message
