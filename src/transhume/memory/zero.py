"""Find the pages that hold nothing but zeros: they need no bytes on the wire.

The idea is QEMU's: most pages show by a few sampled words that they are not zero; only the others
are read whole.
"""

from __future__ import annotations

import numpy as np

from transhume.memory import runs as page_runs
from transhume.memory.ram import WORDS_PER_PAGE, Words
from transhume.memory.runs import Bitmap, Runs

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


def by_content(runs: Runs, zero: Bitmap) -> tuple[Runs, Runs]:
    """Divide the runs by a bitmap with one element for each page in them; returns (zero, other)."""
    if not zero.any():
        return page_runs.empty(), runs
    pages = page_runs.pages_of(runs)
    return page_runs.from_pages(pages[zero]), page_runs.from_pages(pages[~zero])
