"""The protocol between the two movers of one migration: the codec, without I/O.

The `main` connection carries the migration. The source connects; after TLS's handshake the destination speaks
first::

    source                                   destination
       |  <------------------ CHALLENGE  nonce, oldest and newest version spoken
       |  HELLO ------------------------>  version, who, proof of the key, RAM blocks, nonce
       |  <-------------------- WELCOME  proof of the key
       |
       |  PAGES, ZERO ... -------------->  one iteration over the memory
       |  PASS_END --------------------->  its number and totals
       |  <------------------- PASS_ACK  everything up to here is in the destination's RAM
       |      ... again until the pre-copy ends; then the VM is suspended ...
       |  PAGES, ZERO ... -------------->
       |  LAST_PAGES_END --------------->  totals, a digest of each RAM block if asked for
       |  <------------- PAGES_VERIFIED  the destination's RAM equals the source's
       |  STATE ... STATE_END ---------->  QEMU's device state, its length and hash
       |  <--------------- STATE_LOADED  QEMU has taken it; the VM could be resumed
       |  <------------------ COMMITTED  the register names the destination: no way back
       |  <-------------------- RUNNING  vCPUs run at the destination
       |  FINISHED --------------------->  the source has let go of the VM

When pages are left for after the resume, OWED names them where PAGES would have carried them, and the
destination loads the device state only after STATE_END, for loading may touch them. A second connection, with
the role `fault`, was made before the VM was suspended::

       |  <---------------------- FETCH  (fault) a vCPU waits for these pages
       |  PAGES, ZERO ------------------>  (fault) exactly those
       |  PAGES, ZERO ... -------------->  (main) the background push
       |  <---------------------- PAGED  no page is missing any more

Either end may lose the other meanwhile. The source connects again, with both roles, and the destination,
which alone knows, names what it lacks in MISSING frames and ends them with MISSING_END before the push goes
on.

With `verify` the destination knows which pages the guest has not written since the switchover, and the source
still has them as they were. So they are compared when the last page has come, before PAGED::

       |  <--------- DIGEST, EMPTY ...  the hash of some unwritten pages; some that hold nothing
       |  <---------------- DIGESTS_END  how many pages that were
       |  COMPARED -------------------->  how many were compared, and where they differ

A MISSING_END of no pages then says whether that is still to come: only if it is not, the source lets go.

At any time: PING from the source, answered by PONG; ABORT from the source; FAILED from the destination.
Who closes without one of the last three is a lost host to the other end.

Every frame is a header of 28 bytes, little-endian, and a payload:

    offset size
     0     4   magic "Tshm"
     4     2   version of the protocol
     6     1   type; 0 is invalid, so that zeroed memory never parses
     7     1   flags; none is defined: zero
     8     2   RAM block index (frames with runs), else zero
    10     2   zero
    12     4   number of runs (frames with runs), else zero
    16     8   length of the payload in bytes
    24     4   CRC-32 of the 24 bytes before

The payload of PAGES is the table of runs (u32 first page, u32 number of pages; sorted, disjoint) and
then the content of these pages in that order; that of ZERO, OWED, FETCH and MISSING is such a table alone;
so is that of EMPTY; the pages of ZERO and EMPTY are all zeros. That of DIGEST is a table and the SHA-256
of the content of its pages in that order. The payload of STATE is raw bytes. Every other payload is a
JSON object of at most 64 KiB.

The header's layout and the CHALLENGE never change, so that two ends of any versions can name them
both when they cannot talk. The source chooses the newest version that both speak.

The key is a one-time secret that the destination's mover made; it reached the source through the controller.
Each end proves that it has it by HMAC-SHA256 over the other's nonce, the migration's id and the
connection's role; later versions may add connections with other roles.

This module holds no state but `Decoder`, and raises `PeerProtocolError` for whatever it does not allow.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from transhume.memory import runs as page_runs
from transhume.memory.digest import DIGEST_BYTES
from transhume.memory.runs import Runs
from transhume.model.errors import PeerProtocolError, Unauthorized
from transhume.model.migration import PagingReport
from transhume.model.vm import PAGE_BYTES, RamBlock

VERSION = 1
OLDEST_VERSION = 1

HEADER_BYTES = 28
MAX_CONTROL_BYTES = 64 << 10
MAX_STATE_CHUNK_BYTES = 1 << 20
MAX_STATE_BYTES = 1 << 30
MAX_RUNS = 4096
MAX_PAGES = 4096
"""The most page content in one PAGES frame: 16 MiB. A frame that only names pages may name any number."""
MAX_DIGEST_PAGES = 4096
"""The most pages that one DIGEST stands for: whoever compares it must read them all."""

Bytes = bytes | bytearray | memoryview
"""Whatever holds contiguous bytes."""

_MAGIC = b"Tshm"
_HEADER = struct.Struct("<4sHBBHHIQ")
_CRC = struct.Struct("<I")
_RUN = struct.Struct("<II")
RUN_BYTES = _RUN.size


class FrameType(IntEnum):
    """What a frame is. Numbers below 32 come from the source, the others from the destination."""

    INVALID = 0
    HELLO = 1
    PAGES = 2
    ZERO = 3
    PASS_END = 4
    LAST_PAGES_END = 5
    STATE = 6
    STATE_END = 7
    PING = 8
    ABORT = 9
    FINISHED = 10
    OWED = 11
    COMPARED = 12
    CHALLENGE = 32
    WELCOME = 33
    PASS_ACK = 34
    PAGES_VERIFIED = 35
    STATE_LOADED = 36
    COMMITTED = 37
    RUNNING = 38
    FAILED = 39
    PONG = 40
    FETCH = 41
    MISSING = 42
    MISSING_END = 43
    PAGED = 44
    DIGEST = 45
    EMPTY = 46
    DIGESTS_END = 47

    @property
    def from_source(self) -> bool:
        return self < FrameType.CHALLENGE


class Role(StrEnum):
    """What a connection is for."""

    MAIN = "main"
    NATIVE = "native"
    FAULT = "fault"


class End(StrEnum):
    """The two ends of a connection."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True)
class Header:
    """A valid header. `run_count` and `block_index` are zero for frames without runs."""

    type: FrameType
    payload_bytes: int
    block_index: int = 0
    run_count: int = 0
    version: int = VERSION

    @property
    def table_bytes(self) -> int:
        """The length of the table of runs at the payload's begin."""
        return self.run_count * RUN_BYTES


class Message(BaseModel):
    """A frame with a JSON body. Its fields are checked strictly and unknown ones refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    frame_type: ClassVar[FrameType] = FrameType.INVALID


_HEX_32_BYTES = r"^[0-9a-f]{64}$"
_Count = Field(ge=0, lt=1 << 63)


class Challenge(Message):
    """The destination's first word. `nonce` is 32 random bytes in hex."""

    frame_type = FrameType.CHALLENGE
    nonce: str = Field(pattern=_HEX_32_BYTES)
    oldest_version: int = Field(ge=1, lt=1 << 16)
    newest_version: int = Field(ge=1, lt=1 << 16)


class Hello(Message):
    """The source names itself and the VM's RAM. `proof` answers the challenge, `nonce` is a new one."""

    frame_type = FrameType.HELLO
    migration: str = Field(min_length=1, max_length=128)
    role: Role
    source: str = Field(max_length=128)
    proof: str = Field(pattern=_HEX_32_BYTES)
    nonce: str = Field(pattern=_HEX_32_BYTES)
    page_bytes: int = PAGE_BYTES
    ram_blocks: tuple[RamBlock, ...] = Field(max_length=64)


class Welcome(Message):
    """The destination accepts. `proof` answers the nonce of HELLO."""

    frame_type = FrameType.WELCOME
    proof: str = Field(pattern=_HEX_32_BYTES)
    destination: str = Field(max_length=128)


class PassEnd(Message):
    """An iteration is sent. The totals count this iteration alone, so that the other end can compare."""

    frame_type = FrameType.PASS_END
    iteration: int = _Count
    pages: int = _Count
    zero_pages: int = _Count


class PassAck(Message):
    """Everything of the iteration is in the destination's RAM."""

    frame_type = FrameType.PASS_ACK
    iteration: int = _Count


class LastPagesEnd(Message):
    """The pages that were dirty at the suspension are sent. `digests`: one for each block, or none."""

    frame_type = FrameType.LAST_PAGES_END
    pages: int = _Count
    zero_pages: int = _Count
    digests: tuple[str, ...] = Field(default=(), max_length=64)


class PagesVerified(Message):
    """All of the VM's RAM has come; where digests were sent, they are equal. `verify_ms` is their cost."""

    frame_type = FrameType.PAGES_VERIFIED
    verify_ms: float = Field(default=0.0, ge=0)


class StateEnd(Message):
    """The device state is sent: its length and the SHA-256 (hex) of all of it."""

    frame_type = FrameType.STATE_END
    length_bytes: int = Field(ge=0, le=MAX_STATE_BYTES)
    sha256: str = Field(pattern=_HEX_32_BYTES)


class StateLoaded(Message):
    """The destination's QEMU has taken the device state. After it nothing but the swap is missing."""

    frame_type = FrameType.STATE_LOADED
    load_ms: float = Field(ge=0)


class Committed(Message):
    """The register names the destination since this `epoch`: the source must never resume the VM."""

    frame_type = FrameType.COMMITTED
    epoch: int = _Count
    commit_ms: float = Field(ge=0)


class Running(Message):
    """The vCPUs run at the destination."""

    frame_type = FrameType.RUNNING
    resume_ms: float = Field(ge=0)


class Failed(Message):
    """The destination gives up. `definitive`: it will never run the VM, whatever the register says later."""

    frame_type = FrameType.FAILED
    code: str = Field(max_length=64)
    message: str = Field(max_length=16 << 10)
    definitive: bool


class Ping(Message):
    """The source is alive. PONG repeats the `token`."""

    frame_type = FrameType.PING
    token: int = _Count


class Pong(Message):
    """The destination is alive, and has taken everything that was sent before the PING."""

    frame_type = FrameType.PONG
    token: int = _Count


class Abort(Message):
    """The source gives up, and keeps the VM."""

    frame_type = FrameType.ABORT
    reason: str = Field(max_length=16 << 10)


class Finished(Message):
    """The source has let go of the VM: nothing is needed from it any more."""

    frame_type = FrameType.FINISHED


class MissingEnd(Message):
    """After a new connection: the MISSING frames before named every page that the destination lacks.

    `to_compare`: when none is lacking any more, DIGEST frames will come, and the source is needed for them.
    """

    frame_type = FrameType.MISSING_END
    pages: int = _Count
    to_compare: bool = False


class DigestsEnd(Message):
    """The DIGEST and EMPTY frames before stood for so many pages: all that were not written."""

    frame_type = FrameType.DIGESTS_END
    pages: int = _Count


class Compared(Message):
    """So many pages were compared. `difference` says in words which of them differ; empty if none does."""

    frame_type = FrameType.COMPARED
    pages: int = _Count
    difference: str = Field(default="", max_length=16 << 10)


class Paged(Message):
    """No page is missing at the destination any more; what paging was like there."""

    frame_type = FrameType.PAGED
    paging: PagingReport


_MESSAGES: dict[FrameType, type[Message]] = {
    each.frame_type: each
    for each in (
        Challenge,
        Hello,
        Welcome,
        PassEnd,
        PassAck,
        LastPagesEnd,
        PagesVerified,
        StateEnd,
        StateLoaded,
        Committed,
        Running,
        Failed,
        Ping,
        Pong,
        Abort,
        Finished,
        MissingEnd,
        Paged,
        DigestsEnd,
        Compared,
    )
}

TABLE_FRAMES = frozenset(
    {FrameType.ZERO, FrameType.OWED, FrameType.FETCH, FrameType.MISSING, FrameType.EMPTY}
)
"""Frames that are a table of runs and nothing else."""


def encode_message(message: Message, version: int = VERSION) -> bytes:
    """A whole frame: header and JSON body. Raises `PeerProtocolError` when the body is too large."""
    body = message.model_dump_json().encode()
    if len(body) > MAX_CONTROL_BYTES:
        raise PeerProtocolError(
            f"A {message.frame_type.name} frame of {len(body)} bytes is over the limit, {MAX_CONTROL_BYTES}."
        )
    return _encode_header(message.frame_type, len(body), version=version) + body


def encode_pages(block_index: int, runs: Runs, version: int = VERSION) -> bytes:
    """The begin of a PAGES frame: header and table. The content of the pages must follow, in order."""
    pages = page_runs.page_count(runs)
    assert 0 < len(runs) <= MAX_RUNS
    assert pages <= MAX_PAGES
    table = runs.astype("<u4").tobytes()
    length = len(table) + pages * PAGE_BYTES
    return _encode_header(FrameType.PAGES, length, block_index, len(runs), version) + table


def encode_zero(block_index: int, runs: Runs, version: int = VERSION) -> bytes:
    """A whole ZERO frame."""
    return encode_table(FrameType.ZERO, block_index, runs, version)


def encode_table(kind: FrameType, block_index: int, runs: Runs, version: int = VERSION) -> bytes:
    """A whole frame that names pages: ZERO, OWED, FETCH, MISSING or EMPTY."""
    assert kind in TABLE_FRAMES
    assert 0 < len(runs) <= MAX_RUNS
    table = runs.astype("<u4").tobytes()
    return _encode_header(kind, len(table), block_index, len(runs), version) + table


def encode_page_name(kind: FrameType, block_index: int, page: int, version: int = VERSION) -> bytes:
    """As `encode_table`, or the begin of a PAGES frame, for one page: a vCPU waits for this, and numpy is
    slow for one row.
    """
    length = RUN_BYTES + (PAGE_BYTES if kind is FrameType.PAGES else 0)
    return _encode_header(kind, length, block_index, 1, version) + _RUN.pack(page, 1)


def encode_digest(block_index: int, runs: Runs, digest: bytes, version: int = VERSION) -> bytes:
    """A whole DIGEST frame: the table and the hash."""
    assert 0 < len(runs) <= MAX_RUNS
    assert len(digest) == DIGEST_BYTES
    payload = runs.astype("<u4").tobytes() + digest
    return _encode_header(FrameType.DIGEST, len(payload), block_index, len(runs), version) + payload


def encode_state_header(chunk_bytes: int, version: int = VERSION) -> bytes:
    """The header of a STATE frame; the chunk must follow."""
    assert 0 < chunk_bytes <= MAX_STATE_CHUNK_BYTES
    return _encode_header(FrameType.STATE, chunk_bytes, version=version)


def choose_version(challenge: Challenge) -> int:
    """The newest version that both ends speak. Raises `PeerProtocolError` naming both when none is."""
    newest = min(challenge.newest_version, VERSION)
    if newest < max(challenge.oldest_version, OLDEST_VERSION):
        raise PeerProtocolError(
            f"The destination speaks versions {challenge.oldest_version} to {challenge.newest_version} of "
            f"the migration protocol, this host {OLDEST_VERSION} to {VERSION}. Upgrade the older one."
        )
    return newest


def prove(key: bytes, prover: End, nonce: str, migration: str, role: Role) -> str:
    """The answer (hex) to the other end's nonce. It names its prover, so that it cannot be sent back."""
    text = "\0".join(("transhume", prover.value, nonce, migration, role.value))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def check_proof(proof: str, key: bytes, prover: End, nonce: str, migration: str, role: Role) -> None:
    """Raise `Unauthorized` unless the proof is the one that the key's holder would give."""
    if not hmac.compare_digest(proof, prove(key, prover, nonce, migration, role)):
        raise Unauthorized(
            f"The {prover.value} of migration {migration} does not have its key. "
            "Somebody else may be connected to its port."
        )


def check_ram_blocks(sent: Sequence[RamBlock], present: Sequence[RamBlock]) -> None:
    """Raise `PeerProtocolError` unless the source's RAM blocks are exactly those of the destination."""
    if tuple(sent) != tuple(present):
        raise PeerProtocolError(
            f"The source's RAM is {_describe(sent)}, the destination's {_describe(present)}. "
            "Both ends must build the VM from the same specification."
        )


class Decoder:
    """Decodes what one peer sends, for one connection.

    `peer` says which end that is: frames of the other direction are refused. `version` is the one agreed
    on; until the caller sets it (from HELLO's header, or by `choose_version`) all that we speak pass.
    `block_pages` holds the number of pages of each RAM block; frames with runs are refused while it is empty.
    """

    def __init__(self, peer: End, block_pages: Sequence[int] = (), version: int | None = None) -> None:
        self.peer = peer
        self.block_pages = tuple(block_pages)
        self.version = version

    def header(self, data: Bytes) -> Header:
        """Decode `HEADER_BYTES` bytes and check everything that can be known without the payload."""
        if len(data) != HEADER_BYTES:
            raise PeerProtocolError(f"A frame's header has {HEADER_BYTES} bytes, not {len(data)}.")
        magic, version, number, flags, block, reserved, run_count, length = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise PeerProtocolError(f"The {self.peer.value} sent {magic!r} where a frame begins.")
        if _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
            raise PeerProtocolError(f"The {self.peer.value} sent a frame whose header is damaged.")
        if number != FrameType.CHALLENGE:
            self._check_version(version)
        try:
            kind = FrameType(number)
        except ValueError:
            raise PeerProtocolError(f"The {self.peer.value} sent a frame of unknown type {number}.") from None
        header = Header(kind, length, block, run_count, version)
        if flags or reserved:
            raise _wrong(header, "has flags that this version does not define")
        self._check_header(header)
        return header

    def message(self, header: Header, body: Bytes) -> Message:
        """Decode the JSON body of a control frame."""
        kind = _MESSAGES.get(header.type)
        if kind is None or len(body) != header.payload_bytes:
            raise _wrong(header, f"has a body of {len(body)} bytes")
        try:
            return kind.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:80] or "its body"
            raise _wrong(header, f"is malformed: {where}: {first['msg']}") from None

    def runs(self, header: Header, table: Bytes) -> Runs:
        """Decode the table of a frame with runs; all of them lie inside the block."""
        if len(table) != header.table_bytes:
            raise _wrong(header, f"has a table of {len(table)} bytes for {header.run_count} runs")
        runs = np.frombuffer(table, dtype="<u4").astype(np.int64).reshape(-1, 2)
        reason = page_runs.fault(runs, self.block_pages[header.block_index])
        if reason:
            raise _wrong(header, f"for RAM block {header.block_index} is wrong: {reason}")
        pages = page_runs.page_count(runs)
        content_bytes = pages * PAGE_BYTES if header.type is FrameType.PAGES else 0
        if header.type is FrameType.DIGEST:
            content_bytes = DIGEST_BYTES
            if pages > MAX_DIGEST_PAGES:
                raise _wrong(header, f"stands for {pages} pages, over the limit, {MAX_DIGEST_PAGES}")
        if header.payload_bytes != header.table_bytes + content_bytes:
            raise _wrong(header, f"has {header.payload_bytes} bytes, which do not match its runs")
        return runs

    def only_page(self, header: Header, table: Bytes) -> int | None:
        """As `runs`, for a frame with one page; None for every other, which `runs` decodes or refuses."""
        if header.run_count != 1:
            return None
        page, count = _RUN.unpack_from(table)
        if count != 1 or page >= self.block_pages[header.block_index]:
            return None
        content_bytes = PAGE_BYTES if header.type is FrameType.PAGES else 0
        return int(page) if header.payload_bytes == RUN_BYTES + content_bytes else None

    def _check_version(self, version: int) -> None:
        if self.version is None and not OLDEST_VERSION <= version <= VERSION:
            raise PeerProtocolError(
                f"The {self.peer.value} speaks version {version} of the migration protocol, this host "
                f"{OLDEST_VERSION} to {VERSION}. Upgrade the older one."
            )
        if self.version is not None and version != self.version:
            raise PeerProtocolError(
                f"The {self.peer.value} sent a frame of version {version} of the migration protocol, "
                f"but version {self.version} was agreed on."
            )

    def _check_header(self, header: Header) -> None:
        kind, length = header.type, header.payload_bytes
        if kind is FrameType.INVALID or kind.from_source != (self.peer is End.SOURCE):
            raise _wrong(header, f"must not come from the {self.peer.value}")
        if kind in (FrameType.PAGES, FrameType.DIGEST) or kind in TABLE_FRAMES:
            self._check_runs_header(header)
        elif header.block_index or header.run_count:
            raise _wrong(header, "names a RAM block or runs")
        elif kind is FrameType.STATE:
            if not 0 < length <= MAX_STATE_CHUNK_BYTES:
                raise _wrong(header, f"of {length} bytes is empty or over the limit, {MAX_STATE_CHUNK_BYTES}")
        elif length > MAX_CONTROL_BYTES:
            raise _wrong(header, f"of {length} bytes is over the limit, {MAX_CONTROL_BYTES}")

    def _check_runs_header(self, header: Header) -> None:
        if header.block_index >= len(self.block_pages):
            raise _wrong(header, f"is for RAM block {header.block_index} of {len(self.block_pages)}")
        if not 0 < header.run_count <= MAX_RUNS:
            raise _wrong(header, f"has {header.run_count} runs, where 1 to {MAX_RUNS} are allowed")
        content_bytes = header.payload_bytes - header.table_bytes
        if header.type is FrameType.DIGEST:
            content_bytes -= DIGEST_BYTES
        pages, rest = divmod(content_bytes, PAGE_BYTES)
        wanted = range(header.run_count, MAX_PAGES + 1) if header.type is FrameType.PAGES else range(1)
        if rest or pages not in wanted:
            raise _wrong(header, f"has {header.payload_bytes} bytes, which do not match its runs")


def _encode_header(
    kind: FrameType, length_bytes: int, block_index: int = 0, run_count: int = 0, version: int = VERSION
) -> bytes:
    header = _HEADER.pack(_MAGIC, version, kind, 0, block_index, 0, run_count, length_bytes)
    return header + _CRC.pack(zlib.crc32(header))


def _wrong(header: Header, what: str) -> PeerProtocolError:
    return PeerProtocolError(f"A {header.type.name} frame {what}.")


def _describe(blocks: Sequence[RamBlock]) -> str:
    return ", ".join(f"{each.index}: {each.name} ({each.size_bytes} bytes)" for each in blocks) or "nothing"
