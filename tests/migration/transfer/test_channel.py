"""Frames cross a connection whole, from any thread, and every failure of it is named."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import pytest
from tests.migration.transfer.connection import connected

from transhume.migration import wire
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import FrameType, Message
from transhume.model.errors import HostLost, PeerProtocolError, TranshumeError
from transhume.model.vm import RamBlock


def receive(channel: FrameChannel) -> Message:
    return channel.receive_message(channel.receive_header())


def failing(call: Callable[[], object]) -> Callable[[], TranshumeError]:
    """Run a call in a thread; the function returned waits for it and gives its error."""
    errors: list[TranshumeError] = []

    def work() -> None:
        try:
            call()
        except TranshumeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def outcome() -> TranshumeError:
        thread.join(20)
        assert not thread.is_alive(), "the call did not end"
        return errors[0]

    return outcome


def test_messages_cross_both_ways_and_bytes_are_counted() -> None:
    with connected() as (source, destination):
        source.send(wire.Ping(token=7))
        assert receive(destination) == wire.Ping(token=7)
        destination.send(wire.Pong(token=7))
        assert receive(source) == wire.Pong(token=7)
        assert source.sent_bytes == destination.received_bytes == len(wire.encode_message(wire.Ping(token=7)))
        assert destination.sent_bytes == source.received_bytes > 0


def test_state_is_cut_into_frames() -> None:
    state = os.urandom((2 << 20) + 5)
    with connected() as (source, destination):
        sender = threading.Thread(target=lambda: source.send_state(state))
        sender.start()
        received = bytearray()
        while len(received) < len(state):
            header = destination.receive_header()
            assert header.type is FrameType.STATE
            chunk = bytearray(header.payload_bytes)
            destination.receive_into(memoryview(chunk))
            received += chunk
        sender.join()
        assert received == state


def test_frames_of_several_threads_are_not_mixed() -> None:
    threads, each = 4, 200
    with connected(buffer_bytes=4096) as (source, destination):
        reasons = [chr(ord("a") + index) * 3000 for index in range(threads)]

        def send(reason: str) -> None:
            for _ in range(each):
                source.send(wire.Abort(reason=reason))

        workers = [threading.Thread(target=send, args=(reason,)) for reason in reasons]
        for worker in workers:
            worker.start()
        received = [receive(destination) for _ in range(threads * each)]
        for worker in workers:
            worker.join()
    for reason in reasons:
        assert sum(message == wire.Abort(reason=reason) for message in received) == each


def test_shutdown_ends_a_blocked_receive() -> None:
    with connected() as (source, _):
        outcome = failing(source.receive_header)
        source.shutdown("the migration was cancelled")
        assert isinstance(outcome(), HostLost)
        assert "closed here: the migration was cancelled" in outcome().message


def test_shutdown_ends_a_blocked_send() -> None:
    with connected(buffer_bytes=4096) as (source, _):
        outcome = failing(lambda: source.send_state(bytes(64 << 20)))
        deadline_s = time.monotonic() + 10
        while source.sent_bytes == 0 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        source.shutdown()
        assert "closed here" in outcome().message


def test_shutdown_may_be_repeated_and_comes_first() -> None:
    with connected() as (source, _):
        source.shutdown("first")
        source.shutdown("second")
        with pytest.raises(HostLost, match="first"):
            source.send(wire.Ping(token=1))
        with pytest.raises(HostLost, match="first"):
            source.receive_header()


def test_a_peer_that_closes() -> None:
    with connected() as (source, destination):
        destination.close()
        with pytest.raises(HostLost, match="host b closed the connection"):
            source.receive_header()
        with pytest.raises(HostLost, match="host b closed the connection"):
            source.send(wire.Ping(token=1))


def test_a_peer_that_closes_amid_a_frame() -> None:
    with connected() as (source, destination):
        with destination.frame():
            destination.write(wire.encode_message(wire.Pong(token=1))[:-3])
        destination.close()
        header = source.receive_header()
        with pytest.raises(HostLost, match="closed"):
            source.receive_message(header)


def test_a_peer_that_dies_while_it_is_sent_to() -> None:
    with connected() as (source, destination):
        destination.close()
        with pytest.raises(HostLost):
            source.send_state(bytes(64 << 20))


def test_a_peer_that_is_silent() -> None:
    with connected(silence_limit_s=0.1) as (source, _), pytest.raises(HostLost, match=r"silent for 0\.1 s"):
        source.receive_header()


def test_what_has_come_of_a_large_buffer_is_a_sign_of_life() -> None:
    """On a slow link a megabyte takes longer than anybody may be silent."""
    buffer = bytearray(1 << 20)
    with connected() as (source, destination), source.frame():
        receiver = threading.Thread(target=destination.receive_into, args=(memoryview(buffer),))
        receiver.start()
        source.write(bytes(200 << 10))
        deadline_s = time.monotonic() + 10
        while destination.received_bytes < 128 << 10:
            assert time.monotonic() < deadline_s, "nothing was heard before all had come"
            time.sleep(0.01)
        source.write(bytes((1 << 20) - (200 << 10)))
        receiver.join(20)
        assert destination.received_bytes == 1 << 20


def test_a_peer_that_takes_nothing() -> None:
    with connected(silence_limit_s=0.1, buffer_bytes=4096) as (source, _):
        with pytest.raises(HostLost, match="host b"):
            source.send_state(bytes(64 << 20))
        with pytest.raises(HostLost, match="host b"):
            source.send(wire.Ping(token=1))


def test_an_error_inside_a_frame_ends_the_connection() -> None:
    with connected() as (source, destination):
        with pytest.raises(ZeroDivisionError), source.frame():
            raise ZeroDivisionError
        with pytest.raises(HostLost, match="cut off"):
            source.send(wire.Ping(token=1))
        with pytest.raises(HostLost, match="closed"):
            destination.receive_header()


def test_a_message_too_large_leaves_the_connection_whole() -> None:
    with connected() as (source, destination):
        blocks = tuple(RamBlock(index=0, name="n" * 2000, size_bytes=1) for _ in range(64))
        with pytest.raises(PeerProtocolError):
            source.send(
                wire.Hello(
                    migration="m",
                    role=wire.Role.MAIN,
                    source="a",
                    proof="0" * 64,
                    nonce="0" * 64,
                    ram_blocks=blocks,
                )
            )
        source.send(wire.Ping(token=1))
        assert receive(destination) == wire.Ping(token=1)


def test_garbage_is_a_protocol_error() -> None:
    with connected() as (source, destination):
        with source.frame():
            source.write(b"GET / HTTP/1.1\r\nHost: farm\r\n\r\n")
        with pytest.raises(PeerProtocolError, match="GET "):
            destination.receive_header()


def test_a_unix_socket_works_too() -> None:
    left, right = socket.socketpair()
    source = FrameChannel(left, wire.Decoder(wire.End.DESTINATION), "b", 10)
    destination = FrameChannel(right, wire.Decoder(wire.End.SOURCE), "a", 10)
    source.send(wire.Finished())
    assert receive(destination) == wire.Finished()
    source.close()
    destination.close()
