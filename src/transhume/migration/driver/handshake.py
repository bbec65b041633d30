"""How two movers come to trust a connection: certificates, then challenge, proof, proof.

The certificates say which hosts these are. The key says that it is this migration, and that both are members
now: the controller has just told it to the two ends and to nobody else. So a certificate that was revoked is
of no use here either, although no mover asks a list.
"""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

from transhume.migration import wire
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import Challenge, Decoder, End, FrameType, Hello, Role, Welcome
from transhume.model.errors import HostLost, PeerProtocolError, Refused, Unauthorized
from transhume.model.vm import PAGE_BYTES, RamBlock
from transhume.trust.cipher import Cipher
from transhume.trust.credentials import Credentials
from transhume.trust.names import server_name

NONCE_BYTES = 32


@dataclass(frozen=True)
class Identity:
    """What one end knows of a migration before it connects."""

    migration: str
    source: str
    destination: str
    key: bytes
    ram_blocks: tuple[RamBlock, ...]
    silence_limit_s: float

    @property
    def block_pages(self) -> tuple[int, ...]:
        return tuple(block.size_bytes // PAGE_BYTES for block in self.ram_blocks)


def connect(
    address: str,
    port: int,
    identity: Identity,
    role: Role,
    credentials: Credentials,
    connect_s: float | None = None,
    answer_s: float | None = None,
) -> FrameChannel:
    """The source's side. Blocks: `connect_s` for the connection and `answer_s` for each answer at the most,
    both the limit of silence where they are None.

    Raises `HostLost`, `PeerProtocolError` or `Refused`; nothing stays open then.
    """
    peer = f"host {identity.destination}"
    try:
        sock = socket.create_connection((address, port), timeout=connect_s or identity.silence_limit_s)
    except OSError as error:
        raise HostLost(f"{peer} cannot be reached at {address}:{port}: {error.strerror or error}") from None
    decoder = Decoder(End.DESTINATION, identity.block_pages)
    try:
        cipher = Cipher(credentials.client(server_name(identity.destination)))
    except Refused:
        sock.close()
        raise
    channel = FrameChannel(sock, decoder, peer, answer_s or identity.silence_limit_s, cipher)
    try:
        channel.demand_peer(identity.destination)
        _introduce(channel, identity, role)
        channel.limit_silence(identity.silence_limit_s)
    except (HostLost, PeerProtocolError, Unauthorized):
        channel.close()
        raise
    return channel


def accept(sock: socket.socket, identity: Identity, credentials: Credentials) -> tuple[FrameChannel, Role]:
    """The destination's side, for a connection just accepted. Blocks; errors as `connect`."""
    try:
        cipher = Cipher(credentials.server())
    except Refused:
        sock.close()
        raise
    peer = f"host {identity.source}"
    channel = FrameChannel(sock, Decoder(End.SOURCE), peer, identity.silence_limit_s, cipher)
    try:
        channel.demand_peer(identity.source)
        return channel, _examine(channel, identity)
    except (HostLost, PeerProtocolError, Unauthorized):
        channel.close()
        raise


def _introduce(channel: FrameChannel, identity: Identity, role: Role) -> None:
    challenge = _expect(channel, FrameType.CHALLENGE)
    assert isinstance(challenge, Challenge)
    channel.decoder.version = wire.choose_version(challenge)
    nonce = secrets.token_hex(NONCE_BYTES)
    proof = wire.prove(identity.key, End.SOURCE, challenge.nonce, identity.migration, role)
    channel.send(
        Hello(
            migration=identity.migration,
            role=role,
            source=identity.source,
            proof=proof,
            nonce=nonce,
            ram_blocks=identity.ram_blocks,
        )
    )
    welcome = _expect(channel, FrameType.WELCOME)
    assert isinstance(welcome, Welcome)
    wire.check_proof(welcome.proof, identity.key, End.DESTINATION, nonce, identity.migration, role)


def _examine(channel: FrameChannel, identity: Identity) -> Role:
    nonce = secrets.token_hex(NONCE_BYTES)
    channel.send(Challenge(nonce=nonce, oldest_version=wire.OLDEST_VERSION, newest_version=wire.VERSION))
    header = channel.receive_header()
    if header.type is not FrameType.HELLO:
        raise PeerProtocolError(f"{channel.peer} sent {header.type.name} before it said who it is.")
    hello = channel.receive_message(header)
    assert isinstance(hello, Hello)
    channel.decoder.version = header.version
    if hello.migration != identity.migration:
        raise Unauthorized(f"{channel.peer} came for migration {hello.migration}, not {identity.migration}.")
    wire.check_proof(hello.proof, identity.key, End.SOURCE, nonce, identity.migration, hello.role)
    _demand_same_ram(channel, hello, identity)
    channel.decoder.block_pages = identity.block_pages
    proof = wire.prove(identity.key, End.DESTINATION, hello.nonce, identity.migration, hello.role)
    channel.send(Welcome(proof=proof, destination=identity.destination))
    return hello.role


def _demand_same_ram(channel: FrameChannel, hello: Hello, identity: Identity) -> None:
    """The source has proved who it is, so it is told the reason; a stranger is told nothing."""
    try:
        wire.check_ram_blocks(hello.ram_blocks, identity.ram_blocks)
    except PeerProtocolError as error:
        channel.send(wire.Failed(code=error.code, message=error.message, definitive=False))
        raise


def _expect(channel: FrameChannel, kind: FrameType) -> wire.Message:
    header = channel.receive_header()
    if header.type is FrameType.FAILED:
        failed = channel.receive_message(header)
        assert isinstance(failed, wire.Failed)
        raise PeerProtocolError(f"{channel.peer} refused the connection: {failed.message}")
    if header.type is not kind:
        raise PeerProtocolError(f"{channel.peer} sent {header.type.name} where {kind.name} was due.")
    return channel.receive_message(header)
