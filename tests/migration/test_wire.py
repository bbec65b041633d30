"""Whatever comes over the wire is either what was sent or a `PeerProtocolError`."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs
from transhume.migration import wire
from transhume.migration.wire import Decoder, End, FrameType, Header, Message, Role
from transhume.model.errors import PeerProtocolError, Unauthorized
from transhume.model.migration import PagingReport
from transhume.model.vm import PAGE_BYTES, RamBlock

BLOCK_PAGES = (1 << 18, 1 << 20)
NONCE = "5f" * 32

numbers = st.integers(0, (1 << 63) - 1)
times_ms = st.floats(0, 1e9)
texts = st.text(max_size=64)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
blocks = st.builds(RamBlock, index=st.integers(0, 99), name=texts, size_bytes=numbers)

messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        wire.Challenge,
        nonce=hashes,
        oldest_version=st.integers(1, 65535),
        newest_version=st.integers(1, 65535),
    ),
    st.builds(
        wire.Hello,
        migration=st.text(min_size=1, max_size=64),
        role=st.sampled_from(Role),
        source=texts,
        proof=hashes,
        nonce=hashes,
        ram_blocks=st.lists(blocks, max_size=8).map(tuple),
    ),
    st.builds(wire.Welcome, proof=hashes, destination=texts),
    st.builds(wire.PassEnd, iteration=numbers, pages=numbers, zero_pages=numbers),
    st.builds(wire.PassAck, iteration=numbers),
    st.builds(
        wire.LastPagesEnd, pages=numbers, zero_pages=numbers, digests=st.lists(hashes, max_size=8).map(tuple)
    ),
    st.builds(wire.PagesVerified, verify_ms=times_ms),
    st.builds(wire.StateEnd, length_bytes=st.integers(0, wire.MAX_STATE_BYTES), sha256=hashes),
    st.builds(wire.StateLoaded, load_ms=times_ms),
    st.builds(wire.Committed, epoch=numbers, commit_ms=times_ms),
    st.builds(wire.Running, resume_ms=times_ms),
    st.builds(wire.Failed, code=texts, message=texts, definitive=st.booleans()),
    st.builds(wire.Ping, token=numbers),
    st.builds(wire.Pong, token=numbers),
    st.builds(wire.Abort, reason=texts),
    st.builds(wire.Finished),
    st.builds(wire.MissingEnd, pages=numbers, to_compare=st.booleans()),
    st.builds(wire.DigestsEnd, pages=numbers),
    st.builds(wire.Compared, pages=numbers, difference=texts),
    st.builds(
        wire.Paged,
        paging=st.builds(
            PagingReport,
            owed_pages=numbers,
            faults=numbers,
            fault_p50_us=st.floats(0, 1e9),
            latency_us_histogram=st.dictionaries(st.integers(1, 1 << 40), numbers, max_size=8),
            verified_pages=numbers,
            written_pages=numbers,
        ),
    ),
)


@st.composite
def run_sets(draw: st.DrawFn) -> Runs:
    """Sorted, disjoint runs of a few pages each, some of them touching."""
    gaps = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30))
    rows, page = [], draw(st.integers(0, 1000))
    for gap, count in gaps:
        page += gap
        rows.append([page, count])
        page += count
    return np.array(rows, dtype=np.int64)


def decoder_for(frame_type: FrameType) -> Decoder:
    return Decoder(End.SOURCE if frame_type.from_source else End.DESTINATION, BLOCK_PAGES)


def split(frame: bytes) -> tuple[bytes, bytes]:
    return frame[: wire.HEADER_BYTES], frame[wire.HEADER_BYTES :]


def decode(decoder: Decoder, frame: bytes) -> object:
    """Decode as a channel does; page content is not looked at."""
    head, payload = split(frame)
    header = decoder.header(head)
    if header.type in (FrameType.PAGES, FrameType.DIGEST) or header.type in wire.TABLE_FRAMES:
        return header, decoder.runs(header, payload[: header.table_bytes]).tolist()
    if header.type is FrameType.STATE:
        return header
    return decoder.message(header, payload)


def forge(**fields: int) -> bytes:
    """A header with a right checksum and any fields."""
    values = {"version": wire.VERSION, "type": 0, "flags": 0, "block": 0, "zero": 0, "runs": 0, "length": 0}
    values.update(fields)
    head = struct.pack("<4sHBBHHIQ", b"Tshm", *values.values())
    return head + struct.pack("<I", zlib.crc32(head))


@settings(deadline=None)
@given(messages)
def test_messages_come_out_as_they_went_in(message: Message) -> None:
    frame = wire.encode_message(message)
    assert decode(decoder_for(message.frame_type), frame) == message


def test_every_message_type_is_covered() -> None:
    covered = {each.frame_type for each in Message.__subclasses__()}
    binary = {FrameType.INVALID, FrameType.PAGES, FrameType.STATE, FrameType.DIGEST, *wire.TABLE_FRAMES}
    assert covered | binary == set(FrameType)


@settings(deadline=None)
@given(run_sets(), st.integers(0, 1), st.sampled_from(sorted(wire.TABLE_FRAMES)))
def test_tables_come_out_as_they_went_in(runs: Runs, block: int, kind: FrameType) -> None:
    header, table = split(wire.encode_table(kind, block, runs))
    decoder = decoder_for(kind)
    assert decoder.runs(decoder.header(header), table).tolist() == runs.tolist()


@settings(deadline=None)
@given(run_sets(), st.integers(0, 1), st.booleans())
def test_runs_come_out_as_they_went_in(runs: Runs, block: int, zero: bool) -> None:
    frame = wire.encode_zero(block, runs) if zero else wire.encode_pages(block, runs)
    head, payload = split(frame)
    decoder = Decoder(End.SOURCE, BLOCK_PAGES)
    header = decoder.header(head)
    assert decoder.runs(header, payload).tolist() == runs.tolist()
    assert header.block_index == block
    content = 0 if zero else page_runs.page_count(runs) * PAGE_BYTES
    assert header.payload_bytes == header.table_bytes + content


@settings(deadline=None)
@given(run_sets(), st.integers(0, 1), st.binary(min_size=32, max_size=32))
def test_digests_come_out_as_they_went_in(runs: Runs, block: int, digest: bytes) -> None:
    head, payload = split(wire.encode_digest(block, runs, digest))
    decoder = Decoder(End.DESTINATION, BLOCK_PAGES)
    header = decoder.header(head)
    assert header.block_index == block
    assert decoder.runs(header, payload[: header.table_bytes]).tolist() == runs.tolist()
    assert payload[header.table_bytes :] == digest


def test_a_digest_stands_for_no_more_pages_than_may_be_read_at_once() -> None:
    most = page_runs.single(7, wire.MAX_DIGEST_PAGES)
    assert decode(Decoder(End.DESTINATION, BLOCK_PAGES), wire.encode_digest(0, most, bytes(32)))
    more = page_runs.single(7, wire.MAX_DIGEST_PAGES + 1)
    with pytest.raises(PeerProtocolError, match="over the limit"):
        decode(Decoder(End.DESTINATION, BLOCK_PAGES), wire.encode_digest(0, more, bytes(32)))


def test_state_chunks() -> None:
    header = Decoder(End.SOURCE).header(wire.encode_state_header(1000))
    assert header == Header(FrameType.STATE, 1000)
    for length in (0, wire.MAX_STATE_CHUNK_BYTES + 1):
        with pytest.raises(PeerProtocolError, match="STATE frame of"):
            Decoder(End.SOURCE).header(forge(type=FrameType.STATE, length=length))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    for peer in End:
        with pytest.raises(PeerProtocolError):
            decode(Decoder(peer, BLOCK_PAGES), data)


def test_zeroed_memory_never_parses() -> None:
    with pytest.raises(PeerProtocolError):
        Decoder(End.SOURCE).header(bytes(wire.HEADER_BYTES))
    with pytest.raises(PeerProtocolError, match="INVALID"):
        Decoder(End.SOURCE).header(forge())


@settings(deadline=None)
@given(messages, st.data())
def test_truncated_frames_are_refused(message: Message, data: st.DataObject) -> None:
    frame = wire.encode_message(message)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(PeerProtocolError):
        decode(decoder_for(message.frame_type), frame[:cut])


@settings(deadline=None)
@given(
    st.one_of(
        messages.map(wire.encode_message),
        run_sets().map(lambda runs: wire.encode_pages(1, runs)),
        run_sets().map(lambda runs: wire.encode_digest(1, runs, b"d" * 32)),
    ),
    st.data(),
)
def test_a_flipped_bit_never_does_worse_than_another_valid_frame(frame: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    broken = bytearray(frame)
    broken[bit // 8] ^= 1 << bit % 8
    for peer in End:
        decoder = Decoder(peer, BLOCK_PAGES)
        if bit < wire.HEADER_BYTES * 8:
            with pytest.raises(PeerProtocolError):
                decode(decoder, bytes(broken))
            continue
        with contextlib.suppress(PeerProtocolError):
            decode(decoder, bytes(broken))


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "version": st.sampled_from([0, 1, 2]),
            "type": st.integers(0, 255),
            "flags": st.sampled_from([0, 1]),
            "block": st.integers(0, 3),
            "zero": st.sampled_from([0, 0, 1]),
            "runs": st.sampled_from([0, 1, 2, 4096, 4097, 2**32 - 1]),
            "length": st.sampled_from([0, 8, 4104, 4112, 65536, 65537, 2**64 - 1]),
        }
    )
)
def test_headers_that_pass_are_within_all_limits(fields: dict[str, int]) -> None:
    for peer in End:
        try:
            header = Decoder(peer, BLOCK_PAGES).header(forge(**fields))
        except PeerProtocolError:
            continue
        assert header.type.from_source == (peer is End.SOURCE)
        assert header.run_count <= wire.MAX_RUNS
        assert header.block_index < len(BLOCK_PAGES)
        most = wire.MAX_PAGES * PAGE_BYTES + header.table_bytes
        assert header.payload_bytes <= (most if header.type is FrameType.PAGES else 1 << 20)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[BLOCK_PAGES[0], 1]], "outside the block"),
        ([[BLOCK_PAGES[0] - 1, 2]], "outside the block"),
        ([[2**32 - 1, 1]], "outside the block"),
        ([[5, 0], [6, 2]], "no pages"),
        ([[5, 1], [4, 1]], "not in order"),
        ([[5, 2], [6, 1]], "overlap"),
        ([[5, 1], [5, 1]], "overlap"),
        ([[5, 1], [7, 2]], "do not match"),
    ],
)
@pytest.mark.parametrize("kind", [FrameType.PAGES, FrameType.ZERO])
def test_runs_that_are_no_set_of_pages_are_refused(
    rows: list[list[int]], reason: str, kind: FrameType
) -> None:
    table = np.array(rows, dtype="<u4").tobytes()
    if kind is FrameType.ZERO and reason == "do not match":
        return  # a ZERO frame has no content to match
    content = len(rows) * PAGE_BYTES if kind is FrameType.PAGES else 0
    decoder = Decoder(End.SOURCE, BLOCK_PAGES)
    header = decoder.header(forge(type=kind, runs=len(rows), length=len(table) + content))
    with pytest.raises(PeerProtocolError, match=reason):
        decoder.runs(header, table)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": FrameType.PAGES, "runs": 1, "length": 8}, "do not match"),
        ({"type": FrameType.PAGES, "runs": 1, "length": 8 + 4095}, "do not match"),
        ({"type": FrameType.PAGES, "runs": 2, "length": 16 + 4096}, "do not match"),
        ({"type": FrameType.PAGES, "runs": 1, "length": 8 + 4097 * 4096}, "do not match"),
        ({"type": FrameType.PAGES, "runs": 0, "length": 4096}, "0 runs"),
        ({"type": FrameType.PAGES, "runs": 4097, "length": 8 * 4097 + 4097 * 4096}, "4097 runs"),
        ({"type": FrameType.PAGES, "block": 2, "runs": 1, "length": 8 + 4096}, "RAM block 2 of 2"),
        ({"type": FrameType.ZERO, "runs": 1, "length": 8 + 4096}, "do not match"),
        ({"type": FrameType.DIGEST, "runs": 1, "length": 8 + 32}, "must not come from the source"),
        ({"type": FrameType.PING, "runs": 1, "length": 10}, "runs"),
        ({"type": FrameType.PING, "block": 1, "length": 10}, "RAM block"),
        ({"type": FrameType.PING, "length": 65537}, "limit"),
        ({"type": FrameType.PING, "flags": 1, "length": 10}, "flags"),
        ({"type": FrameType.PING, "zero": 1, "length": 10}, "flags"),
        ({"type": FrameType.PONG, "length": 10}, "must not come from the source"),
        ({"type": 200}, "unknown type 200"),
        ({"type": FrameType.PING, "version": 7, "length": 10}, "version 7 .* this host 1 to 1"),
    ],
)
def test_what_is_wrong_with_a_header_is_named(fields: dict[str, int], reason: str) -> None:
    with pytest.raises(PeerProtocolError, match=reason):
        Decoder(End.SOURCE, BLOCK_PAGES).header(forge(**fields))


@pytest.mark.parametrize("length", [0, 8, 8 + 31, 8 + 33, 8 + 32 + 4096, 8 + 64])
def test_a_digest_has_the_length_of_one_hash(length: int) -> None:
    decoder = Decoder(End.DESTINATION, BLOCK_PAGES)
    with pytest.raises(PeerProtocolError, match="do not match"):
        decoder.header(forge(type=FrameType.DIGEST, runs=1, length=length))


def test_pages_are_refused_before_the_ram_blocks_are_agreed_on() -> None:
    frame = wire.encode_zero(0, page_runs.single(0, 1))
    with pytest.raises(PeerProtocolError, match="RAM block 0 of 0"):
        decode(Decoder(End.SOURCE), frame)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"token": -1}',
        b'{"token": "1"}',
        b'{"token": 1.5}',
        b'{"token": true}',
        b'{"token": 1, "more": 2}',
        b'{"token": 9223372036854775808}',
        b'{"token": 1',
        b"\xff\xfe",
        b"[" * 60000,
        b'{"token": ' + b"9" * 60000 + b"}",
    ],
)
def test_bodies_are_checked_strictly(body: bytes) -> None:
    frame = forge(type=FrameType.PING, length=len(body)) + body
    with pytest.raises(PeerProtocolError, match="PING frame is malformed"):
        decode(Decoder(End.SOURCE), frame)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1"])
def test_times_are_real_and_not_negative(value: str) -> None:
    body = f'{{"load_ms": {value}}}'.encode()
    with pytest.raises(PeerProtocolError):
        decode(Decoder(End.DESTINATION), forge(type=FrameType.STATE_LOADED, length=len(body)) + body)


def test_a_message_that_is_too_large_is_not_sent() -> None:
    many = tuple(RamBlock(index=index, name="n" * 2000, size_bytes=1) for index in range(64))
    hello = wire.Hello(migration="m", role=Role.MAIN, source="a", proof=NONCE, nonce=NONCE, ram_blocks=many)
    with pytest.raises(PeerProtocolError, match="over the limit"):
        wire.encode_message(hello)


def test_the_agreed_version_is_kept() -> None:
    decoder = Decoder(End.SOURCE, version=1)
    assert decode(decoder, wire.encode_message(wire.Ping(token=1), version=1)) == wire.Ping(token=1)
    with pytest.raises(PeerProtocolError, match=r"version 2 .* version 1"):
        decode(decoder, wire.encode_message(wire.Ping(token=1), version=2))


def test_a_challenge_of_any_version_is_understood() -> None:
    challenge = wire.Challenge(nonce=NONCE, oldest_version=7, newest_version=9)
    assert decode(Decoder(End.DESTINATION), wire.encode_message(challenge, version=9)) == challenge
    with pytest.raises(PeerProtocolError, match=r"7 to 9 .* this host 1 to 1"):
        wire.choose_version(challenge)
    both = wire.Challenge(nonce=NONCE, oldest_version=1, newest_version=9)
    assert wire.choose_version(both) == wire.VERSION


def test_proofs_hold_for_one_key_end_nonce_migration_and_role() -> None:
    right: dict[str, Any] = {
        "key": b"k" * 32,
        "prover": End.SOURCE,
        "nonce": NONCE,
        "migration": "m-1",
        "role": Role.MAIN,
    }
    proof = wire.prove(**right)
    wire.check_proof(proof, **right)
    wrong = {"key": b"j" * 32, "prover": End.DESTINATION, "nonce": "60" * 32, "migration": "m-2"}
    for name, value in wrong.items():
        with pytest.raises(Unauthorized, match="does not have its key"):
            wire.check_proof(proof, **{**right, name: value})
    with pytest.raises(Unauthorized):
        wire.check_proof("", **right)


def test_ram_blocks_must_be_equal() -> None:
    ours = [RamBlock(index=0, name="transhume-ram0", size_bytes=1 << 30)]
    wire.check_ram_blocks(tuple(ours), ours)
    theirs = [RamBlock(index=0, name="transhume-ram0", size_bytes=1 << 29)]
    with pytest.raises(PeerProtocolError, match=r"1073741824 bytes.*536870912 bytes"):
        wire.check_ram_blocks(ours, theirs)
    with pytest.raises(PeerProtocolError, match="nothing"):
        wire.check_ram_blocks([], ours)


def test_bodies_are_plain_json() -> None:
    """What docs show and other programs may read: no more than the fields by name."""
    _, body = split(wire.encode_message(wire.PassEnd(iteration=2, pages=10, zero_pages=3)))
    assert json.loads(body) == {"iteration": 2, "pages": 10, "zero_pages": 3}
