"""What QEMU writes at one end comes out at the other, over TLS, and so do both ends' ends."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.migration.transfer.connection import connected

from transhume.migration.transfer.native_relay import NativeRelay

LIMIT_S = 20.0


@contextmanager
def relayed() -> Iterator[tuple[socket.socket, socket.socket, NativeRelay, NativeRelay]]:
    """Two sockets that stand for the QEMUs', as they have their duplicates, and the relays between them."""
    with connected(silence_limit_s=0.5) as (source, destination):
        left, right = NativeRelay(source), NativeRelay(destination)
        ends = [socket.socket(fileno=os.dup(relay.qemu_end)) for relay in (left, right)]
        for relay, end in zip((left, right), ends, strict=True):
            relay.release()
            end.settimeout(LIMIT_S)
        try:
            yield ends[0], ends[1], left, right
        finally:
            left.close()
            right.close()
            for end in ends:
                end.close()


def read_all(end: socket.socket) -> bytes:
    heard = bytearray()
    while chunk := end.recv(1 << 16):
        heard += chunk
    return bytes(heard)


def test_a_stream_arrives_whole_and_ends() -> None:
    stream = os.urandom(8 << 20)
    with relayed() as (source, destination, _, _):

        def write() -> None:
            source.sendall(stream)
            source.close()

        writer = threading.Thread(target=write)
        writer.start()
        heard = read_all(destination)
        writer.join()
    assert hashlib.sha256(heard).digest() == hashlib.sha256(stream).digest()


def test_it_carries_both_ways_and_silence_is_no_end() -> None:
    with relayed() as (source, destination, _, _):
        source.sendall(b"there")
        assert destination.recv(16) == b"there"
        threading.Event().wait(0.7)  # longer than the limit of silence of everything else
        destination.sendall(b"and back")
        assert source.recv(16) == b"and back"


def test_a_qemu_that_dies_is_noticed_at_the_other_end() -> None:
    with relayed() as (source, destination, _, _):
        destination.close()
        assert read_all(source) == b""


def test_a_mover_that_gives_up_ends_both() -> None:
    with relayed() as (source, destination, left, _):
        left.shutdown()
        assert read_all(destination) == b""
        assert read_all(source) == b""
