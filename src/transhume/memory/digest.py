"""A hash of a RAM block's content, equal on both hosts if and only if every byte is.

A zero page counts the same whether memory is behind it or not, so that holes need not travel. SHA-256 is
chosen for speed: processors of today have instructions for it, and Python hashes in several threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from transhume.memory import runs as page_runs
from transhume.memory.ram import WORDS_PER_PAGE, GuestBlock
from transhume.memory.runs import Runs
from transhume.memory.zero import zero_pages
from transhume.model.vm import PAGE_BYTES

DIGEST_BYTES = 32
_PIECE_PAGES = 256
_THREADS = 4


def digest(block: GuestBlock) -> str:
    """The hash (hex) of a block that nobody writes to meanwhile.

    The block is cut into pieces of 1 MiB; a piece with anything but zeros in it is hashed, and the hash
    of the block is that of the pieces' numbers and hashes. Blocks for about 1 s for each 2 GiB of content.
    """
    whole = hashlib.sha256(block.block.size_bytes.to_bytes(8, "little"))
    pieces = _populated_pieces(block)
    buffers = threading.local()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="digest") as pool:
        for piece, piece_hash in zip(
            pieces, pool.map(lambda piece: _piece_hash(block, piece, buffers), pieces), strict=True
        ):
            if piece_hash:
                whole.update(piece.to_bytes(8, "little") + piece_hash)
    return whole.hexdigest()


def digest_of_runs(block: GuestBlock, runs: Runs) -> bytes:
    """The hash of the content of a few pages, in order: `DIGEST_BYTES` bytes. Holes count as zeros."""
    fingerprint = hashlib.sha256()
    for first, count in page_runs.split(runs, _PIECE_PAGES).tolist():
        fingerprint.update(os.pread(block.fd, count * PAGE_BYTES, first * PAGE_BYTES))
    return fingerprint.digest()


def first_page_not_zero(block: GuestBlock, runs: Runs) -> int | None:
    """The first of these pages that holds anything but zeros. Quick where no memory is behind them."""
    if len(runs) == 0:
        return None
    low, high = int(runs[0, 0]), int(runs[-1].sum())
    there = page_runs.intersect(runs, block.populated_runs(low, high - low))
    for first, count in page_runs.split(there, _PIECE_PAGES).tolist():
        content = os.pread(block.fd, count * PAGE_BYTES, first * PAGE_BYTES)
        others = np.flatnonzero(
            ~zero_pages(np.frombuffer(content, dtype=np.uint64).reshape(-1, WORDS_PER_PAGE))
        )
        if len(others):
            return int(first) + int(others[0])
    return None


def _populated_pieces(block: GuestBlock) -> list[int]:
    pieces: set[int] = set()
    for first, count in block.populated_runs().tolist():
        pieces.update(range(first // _PIECE_PAGES, (first + count - 1) // _PIECE_PAGES + 1))
    return sorted(pieces)


def _piece_hash(block: GuestBlock, piece: int, buffers: threading.local) -> bytes:
    """The hash of one piece, empty when it is all zeros."""
    if not hasattr(buffers, "view"):
        buffers.view = memoryview(bytearray(_PIECE_PAGES * PAGE_BYTES))
    first_page = piece * _PIECE_PAGES
    content = buffers.view[: min(_PIECE_PAGES, block.page_count - first_page) * PAGE_BYTES]
    os.preadv(block.fd, [content], first_page * PAGE_BYTES)
    words = np.frombuffer(content, dtype=np.uint64).reshape(-1, WORDS_PER_PAGE)
    if zero_pages(words).all():
        return b""
    return hashlib.sha256(content).digest()
