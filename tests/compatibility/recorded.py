"""Frames of each version of the wire as they were when it was made: `python -m tests.compatibility.recorded`.

Run it when a new version of the protocol is made, and never for an old one: what it wrote then is what hosts
of that release say.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from transhume.migration import wire
from transhume.model.migration import PagingReport
from transhume.model.vm import RamBlock

FOLDER = Path(__file__).parent / "recorded_frames"
BLOCK_PAGES = (1000, 64)
RUNS = np.array([[3, 2], [9, 1]], dtype=np.int64)
HEX = "5f" * 32

MESSAGES: tuple[wire.Message, ...] = (
    wire.Challenge(nonce=HEX, oldest_version=1, newest_version=1),
    wire.Hello(
        migration="m1234abcd",
        role=wire.Role.MAIN,
        source="alpha",
        proof=HEX,
        nonce=HEX,
        ram_blocks=(RamBlock(index=0, name="pc.ram", size_bytes=1000 << 12),),
    ),
    wire.Welcome(proof=HEX, destination="beta"),
    wire.PassEnd(iteration=2, pages=3, zero_pages=1),
    wire.PassAck(iteration=2),
    wire.LastPagesEnd(pages=3, zero_pages=1, digests=(HEX, HEX)),
    wire.PagesVerified(verify_ms=1.5),
    wire.StateEnd(length_bytes=4096, sha256=HEX),
    wire.StateLoaded(load_ms=2.5),
    wire.Committed(epoch=7, commit_ms=0.5),
    wire.Running(resume_ms=3.5),
    wire.Failed(code="vmm-error", message="words", definitive=True),
    wire.Ping(token=11),
    wire.Pong(token=11),
    wire.Abort(reason="words"),
    wire.Finished(),
    wire.MissingEnd(pages=5, to_compare=True),
    wire.Paged(paging=PagingReport()),
    wire.DigestsEnd(pages=5),
    wire.Compared(pages=5, difference="words"),
)
"""One of each kind, with every field."""


def frames(version: int) -> dict[str, bytes]:
    """What this release sends, by the frame's name."""
    found = {each.frame_type.name: wire.encode_message(each, version) for each in MESSAGES}
    for kind in wire.TABLE_FRAMES:
        found[kind.name] = wire.encode_table(kind, 1, RUNS, version)
    found["PAGES"] = wire.encode_pages(1, RUNS, version)
    found["DIGEST"] = wire.encode_digest(1, RUNS, bytes(range(32)), version)
    found["STATE"] = wire.encode_state_header(4096, version)
    return found


def recorded(version: int) -> dict[str, bytes]:
    texts = json.loads((FOLDER / f"version_{version}.json").read_text())
    return {name: bytes.fromhex(text) for name, text in texts.items()}


def main() -> None:
    """Record the newest version; what was recorded once is not written over."""
    FOLDER.mkdir(exist_ok=True)
    texts = {name: frame.hex() for name, frame in sorted(frames(wire.VERSION).items())}
    with (FOLDER / f"version_{wire.VERSION}.json").open("x") as file:
        file.write(json.dumps(texts, indent=1) + "\n")


if __name__ == "__main__":
    main()
