"""What a host of any version that is still spoken sends is understood, and what it understands is sent."""

from __future__ import annotations

import pytest
from tests.compatibility.recorded import BLOCK_PAGES, MESSAGES, RUNS, frames, recorded

from transhume.migration import wire
from transhume.migration.wire import Decoder, End, FrameType
from transhume.model.errors import PeerProtocolError

VERSIONS = range(wire.OLDEST_VERSION, wire.VERSION + 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kind_of_frame_is_recorded(version: int) -> None:
    kinds = {kind.name for kind in FrameType} - {"INVALID"}
    assert set(frames(wire.VERSION)) == kinds
    assert set(recorded(version)) <= kinds


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_sent_byte_for_byte_as_it_was_recorded(version: int) -> None:
    """A host of the release that made this version knows no other field and no other frame."""
    sent = frames(version)
    changed = [name for name, frame in recorded(version).items() if sent[name] != frame]
    assert not changed, f"version {version} of the wire is released; what changes needs a new version"


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_recorded_is_understood(version: int) -> None:
    messages = {each.frame_type.name: each for each in MESSAGES}
    for name, frame in recorded(version).items():
        sender = End.SOURCE if FrameType[name].from_source else End.DESTINATION
        decoder = Decoder(sender, version=version)
        decoder.block_pages = BLOCK_PAGES
        header = decoder.header(frame[: wire.HEADER_BYTES])
        assert header.type.name == name
        body = frame[wire.HEADER_BYTES :]
        if name in messages:
            assert decoder.message(header, body) == messages[name]
        elif header.run_count:
            assert (decoder.runs(header, body[: header.table_bytes]) == RUNS).all()


@pytest.mark.parametrize("version", [0, wire.VERSION + 1, 65535])
def test_a_hello_of_an_unknown_version_is_refused_with_both_versions(version: int) -> None:
    hello = next(each for each in MESSAGES if isinstance(each, wire.Hello))
    frame = wire.encode_message(hello, version)
    words = rf"version {version} .* this host {wire.OLDEST_VERSION} to {wire.VERSION}\. Upgrade the older"
    with pytest.raises(PeerProtocolError, match=words):
        Decoder(End.SOURCE).header(frame[: wire.HEADER_BYTES])


def test_a_destination_that_speaks_only_later_versions_is_refused_with_both_versions() -> None:
    later = wire.VERSION + 1
    challenge = wire.Challenge(nonce="5f" * 32, oldest_version=later, newest_version=later + 1)
    with pytest.raises(PeerProtocolError, match=rf"{later}.*{later + 1}.*{wire.VERSION}"):
        wire.choose_version(challenge)


def test_with_a_later_release_the_newest_common_version_is_spoken() -> None:
    challenge = wire.Challenge(
        nonce="5f" * 32, oldest_version=wire.OLDEST_VERSION, newest_version=wire.VERSION + 3
    )
    assert wire.choose_version(challenge) == wire.VERSION
