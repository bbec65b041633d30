"""Find the pages that hold nothing but zeros: they need no bytes on the wire.

The idea is QEMU's: most pages show by a few sampled words that they are not zero; only the others
are read whole.
"""

from __future__ import annotations

import os

import numpy as np

from transhume.memory import runs as page_runs
from transhume.memory.ram import WORDS_PER_PAGE, GuestBlock, Words
from transhume.memory.runs import Bitmap, Runs
from transhume.model.vm import PAGE_BYTES

_SAMPLED_WORDS = (0, 1, 257, WORDS_PER_PAGE - 1)


def zero_pages(words: Words) -> Bitmap:
    """For each page of the array (pages, 512), whether it is all zeros."""
    zero: Bitmap = words[:, _SAMPLED_WORDS[0]] == 0
    for word in _SAMPLED_WORDS[1:]:
        candidates = np.flatnonzero(zero)
        if len(candidates) == 0:
            return zero
        zero[candidates] = words[candidates, word] == 0
    for first, count in page_runs.from_bitmap(zero).tolist():
        zero[first : first + count] = np.bitwise_or.reduce(words[first : first + count], axis=1) == 0
    return zero


def read_divided(block: GuestBlock, runs: Runs, buffer: memoryview) -> tuple[Runs, Runs, Words]:
    """Copy pages into `buffer`, which holds them all, and divide them: the runs of zero pages, those of the
    others, and the others' content, valid until the buffer is used again.

    Reading does not allocate holes, and costs less than the page faults of a mapping.
    """
    position = 0
    for first, count in runs.tolist():
        end = position + count * PAGE_BYTES
        os.preadv(block.fd, [buffer[position:end]], first * PAGE_BYTES)
        position = end
    words = np.frombuffer(buffer[:position], dtype=np.uint64).reshape(-1, WORDS_PER_PAGE)
    is_zero = zero_pages(words)
    zeros, others = by_content(runs, is_zero)
    return zeros, others, words[~is_zero] if len(zeros) else words


def by_content(runs: Runs, zero: Bitmap) -> tuple[Runs, Runs]:
    """Divide the runs by a bitmap with one element for each page in them; returns (zero, other)."""
    if not zero.any():
        return page_runs.empty(), runs
    pages = page_runs.pages_of(runs)
    return page_runs.from_pages(pages[zero]), page_runs.from_pages(pages[~zero])
