"""Two movers trust a connection only when both have the key, and name the same migration and RAM."""

from __future__ import annotations

import atexit
import dataclasses
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.trust.identities import credentials, new_authority

from transhume.migration import wire
from transhume.migration.driver.handshake import Identity, accept, connect
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import Challenge, Decoder, End, FrameType, Role
from transhume.model.errors import HostLost, PeerProtocolError, TranshumeError, Unauthorized
from transhume.model.vm import PAGE_BYTES, RamBlock
from transhume.trust.certificates import Authority
from transhume.trust.cipher import Cipher
from transhume.trust.credentials import Credentials, joining
from transhume.trust.names import server_name

IDENTITY = Identity(
    migration="m1",
    source="alpha",
    destination="beta",
    key=b"k" * 32,
    ram_blocks=(
        RamBlock(index=0, name="ram0", size_bytes=8 * PAGE_BYTES),
        RamBlock(index=1, name="ram1", size_bytes=4 * PAGE_BYTES),
    ),
    silence_limit_s=5.0,
)
LIMIT_S = 20.0

_FOLDER = tempfile.TemporaryDirectory()
atexit.register(_FOLDER.cleanup)
FARM, OTHER_FARM = new_authority("f1"), new_authority("f2")


def of(host: str, farm: Authority = FARM, trusting: Authority | None = None) -> Credentials:
    return credentials(Path(tempfile.mkdtemp(dir=_FOLDER.name)), farm, host, trusting=trusting)


AT_SOURCE, AT_DESTINATION = of("alpha"), of("beta")


def as_source(sock: socket.socket, mine: Credentials = AT_SOURCE) -> FrameChannel:
    """A source that has shown its certificate, and goes on as the test wants."""
    cipher = Cipher(mine.client(server_name("beta")))
    channel = FrameChannel(sock, Decoder(End.DESTINATION), "host beta", 5.0, cipher)
    channel.demand_peer("beta")
    return channel


def as_destination(sock: socket.socket) -> FrameChannel:
    """The same for a destination."""
    channel = FrameChannel(sock, Decoder(End.SOURCE), "host alpha", 5.0, Cipher(AT_DESTINATION.server()))
    channel.demand_peer("alpha")
    return channel


def but(**changes: Any) -> Identity:
    return dataclasses.replace(IDENTITY, **changes)


class Answering:
    """A destination's port, where one connection is answered in a thread of its own."""

    def __init__(self, answer: Callable[[socket.socket], object]) -> None:
        self.result: object = None
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(LIMIT_S)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> int:
        self._thread.start()
        port: int = self._server.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._thread.join(LIMIT_S)
        self._server.close()
        assert not self._thread.is_alive(), "the destination did not come to an end"

    def _run(self) -> None:
        sock, _ = self._server.accept()
        sock.settimeout(None)
        try:
            self.result = self._answer(sock)
        except TranshumeError as error:
            self.result = error


def destination(identity: Identity = IDENTITY) -> Answering:
    return Answering(lambda sock: accept(sock, identity, AT_DESTINATION))


def close(answering: Answering, *channels: FrameChannel) -> None:
    for channel in channels:
        channel.close()
    if isinstance(answering.result, tuple):
        answering.result[0].close()


@pytest.mark.parametrize("role", list(Role))
def test_two_movers_of_one_migration_come_together(role: Role) -> None:
    answering = destination()
    with answering as port:
        source = connect("127.0.0.1", port, IDENTITY, role, AT_SOURCE)
    assert isinstance(answering.result, tuple)
    channel, seen_role = answering.result
    assert seen_role is role
    assert source.peer == "host beta"
    assert channel.peer == "host alpha"
    assert source.version == channel.version == wire.VERSION
    assert channel.decoder.block_pages == (8, 4)
    source.send(wire.Ping(token=1))
    assert channel.receive_message(channel.receive_header()) == wire.Ping(token=1)
    channel.send(wire.Pong(token=1))
    assert source.receive_message(source.receive_header()) == wire.Pong(token=1)
    close(answering, source)


def test_a_source_without_the_key_is_turned_away() -> None:
    answering = destination()
    with answering as port, pytest.raises(HostLost, match="host beta closed the connection"):
        connect("127.0.0.1", port, but(key=b"x" * 32), Role.MAIN, AT_SOURCE)
    assert isinstance(answering.result, Unauthorized)
    assert "source of migration m1 does not have its key" in answering.result.message


def test_a_source_of_another_migration_is_turned_away() -> None:
    answering = destination()
    with answering as port, pytest.raises(HostLost):
        connect("127.0.0.1", port, but(migration="m2"), Role.MAIN, AT_SOURCE)
    assert isinstance(answering.result, Unauthorized)
    assert "came for migration m2, not m1" in answering.result.message


def test_a_destination_without_the_key_is_not_believed() -> None:
    """It lets everybody in; but it cannot prove that it is the one that the controller named."""

    def impostor(sock: socket.socket) -> None:
        channel = as_destination(sock)
        channel.send(Challenge(nonce="00" * 32, oldest_version=1, newest_version=1))
        hello = channel.receive_message(channel.receive_header())
        assert isinstance(hello, wire.Hello)
        proof = wire.prove(b"x" * 32, End.DESTINATION, hello.nonce, "m1", Role.MAIN)
        channel.send(wire.Welcome(proof=proof, destination="beta"))
        with pytest.raises(HostLost):
            channel.receive_header()
        channel.close()

    with (
        Answering(impostor) as port,
        pytest.raises(Unauthorized, match="destination of migration m1 does not have its key"),
    ):
        connect("127.0.0.1", port, IDENTITY, Role.MAIN, AT_SOURCE)


def test_a_proof_that_is_sent_back_is_none() -> None:
    """An impostor that answers the source's nonce with the source's own words has proved nothing."""

    def mirror(sock: socket.socket) -> None:
        channel = as_destination(sock)
        channel.send(Challenge(nonce="00" * 32, oldest_version=1, newest_version=1))
        hello = channel.receive_message(channel.receive_header())
        assert isinstance(hello, wire.Hello)
        channel.send(wire.Welcome(proof=hello.proof, destination="beta"))
        with pytest.raises(HostLost):
            channel.receive_header()
        channel.close()

    with Answering(mirror) as port, pytest.raises(Unauthorized):
        connect("127.0.0.1", port, IDENTITY, Role.MAIN, AT_SOURCE)


def test_other_ram_blocks_are_refused_with_the_reason() -> None:
    smaller = (RamBlock(index=0, name="ram0", size_bytes=8 * PAGE_BYTES),)
    answering = destination()
    with answering as port, pytest.raises(PeerProtocolError) as refused:
        connect("127.0.0.1", port, but(ram_blocks=smaller), Role.MAIN, AT_SOURCE)
    assert "host beta refused the connection" in refused.value.message
    assert "0: ram0 (32768 bytes), 1: ram1 (16384 bytes)" in refused.value.message
    assert isinstance(answering.result, PeerProtocolError)


@pytest.mark.parametrize(("oldest", "newest"), [(wire.VERSION + 1, wire.VERSION + 3), (7, 7)])
def test_a_destination_of_another_age_is_named(oldest: int, newest: int) -> None:
    def other_age(sock: socket.socket) -> None:
        channel = as_destination(sock)
        channel.send(Challenge(nonce="00" * 32, oldest_version=oldest, newest_version=newest))
        with pytest.raises(HostLost):
            channel.receive_header()
        channel.close()

    with (
        Answering(other_age) as port,
        pytest.raises(PeerProtocolError, match=f"speaks versions {oldest} to {newest}.*Upgrade the older"),
    ):
        connect("127.0.0.1", port, IDENTITY, Role.MAIN, AT_SOURCE)


def test_a_source_of_another_version_is_refused() -> None:
    answering = destination()
    with answering as port:
        sock = socket.create_connection(("127.0.0.1", port))
        channel = as_source(sock)
        assert channel.receive_header().type is FrameType.CHALLENGE
        channel.decoder.version = wire.VERSION + 1
        channel.send(wire.Ping(token=0))
    assert isinstance(answering.result, PeerProtocolError)
    assert f"version {wire.VERSION + 1}" in answering.result.message
    channel.close()


def test_what_comes_before_hello_is_refused() -> None:
    answering = destination()
    with answering as port:
        sock = socket.create_connection(("127.0.0.1", port))
        channel = as_source(sock)
        channel.receive_message(channel.receive_header())
        channel.send(wire.Abort(reason="let me in"))
    assert isinstance(answering.result, PeerProtocolError)
    assert "sent ABORT before it said who it is" in answering.result.message
    channel.close()


@pytest.mark.parametrize("words", [b"GET / HTTP/1.0\r\n\r\n" * 10, b"\0" * 100, b"\x16\x03\x01\xff\xff", b""])
def test_a_stranger_gets_nothing(words: bytes) -> None:
    """At most an alert of TLS; then the connection ends."""
    answering = destination(but(silence_limit_s=0.5))
    with answering as port, socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(words)
        sock.settimeout(LIMIT_S)
        received = bytearray()
        try:
            while chunk := sock.recv(4096):
                received += chunk
        except ConnectionResetError:
            pass  # it was cut off with words unread
    assert isinstance(answering.result, (PeerProtocolError, HostLost))
    assert len(received) < 10


@pytest.mark.parametrize(
    ("stranger", "told", "known"),
    [
        (lambda: of("gamma"), "closed the connection", "host gamma came where host alpha is due"),
        (
            lambda: of("alpha", OTHER_FARM, FARM),
            "it is of another farm",
            "a certificate that is not of this farm",
        ),
        (lambda: of("alpha", OTHER_FARM), "not of this farm", "does not take this host's certificate"),
    ],
)
def test_a_source_with_the_key_and_no_certificate_of_its_own_is_turned_away(
    stranger: Callable[[], Credentials], told: str, known: str
) -> None:
    answering = destination()
    with answering as port, pytest.raises(TranshumeError, match=told):
        connect("127.0.0.1", port, IDENTITY, Role.MAIN, stranger())
    assert isinstance(answering.result, Unauthorized)
    assert known in answering.result.message


def test_a_source_without_a_certificate_is_turned_away() -> None:
    answering = destination()
    with answering as port, socket.create_connection(("127.0.0.1", port)) as sock:
        bare = joining(FARM.certificate_pem, server_name("beta"))
        channel = FrameChannel(sock, Decoder(End.DESTINATION), "host beta", 5.0, Cipher(bare))
        channel.demand_peer("beta")
        with pytest.raises(HostLost):
            channel.receive_header()
    assert isinstance(answering.result, Unauthorized)
    assert "somebody without a certificate came where host alpha is due" in answering.result.message


def test_another_host_at_the_destinations_port_hears_nothing() -> None:
    """A member of the farm, at the right address, with the key even: it is not the one that was named."""
    answering = Answering(lambda sock: accept(sock, IDENTITY, of("gamma")))
    with answering as port, pytest.raises(Unauthorized, match="shows the certificate of another host"):
        connect("127.0.0.1", port, IDENTITY, Role.MAIN, AT_SOURCE)
    assert isinstance(answering.result, TranshumeError)


def test_older_tls_is_turned_away() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    answering = destination()
    with (
        answering as port,
        socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as sock,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        context.wrap_socket(sock)
    assert isinstance(answering.result, PeerProtocolError)
    assert "does not speak TLS 1.3" in answering.result.message


def test_nobody_at_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(HostLost, match=f"host beta cannot be reached at 127.0.0.1:{port}"):
        connect("127.0.0.1", port, IDENTITY, Role.MAIN, AT_SOURCE)


def test_a_destination_that_says_nothing_is_left() -> None:
    def mute(sock: socket.socket) -> None:
        while sock.recv(4096):
            pass
        sock.close()

    with Answering(mute) as port, pytest.raises(HostLost, match=r"silent for 0\.5 s"):
        connect("127.0.0.1", port, but(silence_limit_s=0.5), Role.MAIN, AT_SOURCE)
