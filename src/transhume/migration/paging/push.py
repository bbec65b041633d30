"""In which order the source pushes what it still owes: the pure half of the background push.

The order joins two ideas. Pages around a fault are likely to be touched next, so the push goes on from the
latest fault ("bubbling" around pivots: Hines and Gopalan, "Post-Copy Based Live Virtual Machine Migration",
VEE 2009). Away from faults, what was written last is likely to be used first, so the pages found by the
latest scan before the suspension come before those of the scan before it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from transhume.memory import runs as page_runs
from transhume.memory.runs import Bitmap, Runs

LEAD_PAGES = 16
"""So many pages before a fault go along with those after it: a stack grows downwards."""

AROUND_PAGES = 2048
"""How far the push follows one fault (8 MiB) before it returns to its usual order."""

CALM_S = 0.003
HOLD_STEP_S = 0.001
MOST_HOLD_S = 0.2
"""The push stands back for faults that follow each other within `CALM_S`, in steps, this long in all."""


class PushOrder:
    """What is owed and not yet sent. `layers` are sets of pages, one entry for each block, latest first.

    All methods may be called from any thread.
    """

    def __init__(self, block_pages: Sequence[int], layers: Sequence[Sequence[Runs]]) -> None:
        self._unsent: list[Bitmap] = [np.zeros(pages, dtype=np.bool_) for pages in block_pages]
        self._max_pages = 1
        self._turn = threading.Lock()
        self._pivot: tuple[int, int] | None = None
        self._fault_s = float("-inf")
        self._held_s = 0.0
        ordered: list[tuple[int, Runs]] = []
        for layer in layers:
            for index, runs in enumerate(layer):
                pages = page_runs.pages_of(runs)
                fresh = pages[~self._unsent[index][pages]]
                self._unsent[index][fresh] = True
                if len(fresh):
                    ordered.append((index, page_runs.from_pages(fresh)))
        self._left = sum(int(np.count_nonzero(block)) for block in self._unsent)
        self._pieces = self._cut(ordered)

    @property
    def left_pages(self) -> int:
        """How many pages were not sent yet, on demand or in the background."""
        return self._left

    def add(self, owed: Sequence[Runs]) -> None:
        """More pages are owed; they go last."""
        with self._turn:
            ordered: list[tuple[int, Runs]] = []
            for index, runs in enumerate(owed):
                pages = page_runs.pages_of(runs)
                fresh = pages[~self._unsent[index][pages]]
                self._unsent[index][fresh] = True
                self._left += len(fresh)
                if len(fresh):
                    ordered.append((index, page_runs.from_pages(fresh)))
            self._pieces = chain(self._pieces, self._cut(ordered))

    def fault(self, block_index: int, page: int) -> None:
        """A vCPU waits for this page: go on around it."""
        with self._turn:
            self._pivot = (block_index, page)

    def sent(self, block_index: int, runs: Runs) -> int:
        """These pages have been sent. Returns how many of them had not been sent before."""
        with self._turn:
            return self._mark_sent(block_index, page_runs.pages_of(runs))

    def hold_s(self, now_s: float) -> float:
        """How long the push should stand back now, because the vCPUs are faulting one page after the other.

        A guest that has just resumed needs a few hundred pages before it does anything, each after the last.
        All holding together is bounded by `MOST_HOLD_S`, so a guest that never stops faulting gets its push.
        """
        if now_s - self._fault_s > CALM_S or self._held_s >= MOST_HOLD_S:
            return 0.0
        self._held_s += HOLD_STEP_S
        return HOLD_STEP_S

    def sent_page(self, block_index: int, page: int, now_s: float) -> None:
        """As `sent` and `fault`, for one page that was sent because a vCPU waits for it."""
        self._fault_s = now_s
        with self._turn:
            block = self._unsent[block_index]
            if block[page]:
                block[page] = False
                self._left -= 1
            self._pivot = (block_index, page + 1)

    def next(self, max_pages: int) -> tuple[int, Runs] | None:
        """The next pages to send, all of one block; None when nothing is left. They count as sent."""
        with self._turn:
            self._max_pages = max_pages
            found = self._around_pivot() or self._in_order()
            if found is None:
                return None
            index, pages = found
            self._mark_sent(index, pages)
            return index, page_runs.from_pages(pages)

    def _mark_sent(self, block_index: int, pages: NDArray[np.int64]) -> int:
        block = self._unsent[block_index]
        fresh = int(np.count_nonzero(block[pages]))
        block[pages] = False
        self._left -= fresh
        return fresh

    def _around_pivot(self) -> tuple[int, NDArray[np.int64]] | None:
        pivot = self._pivot
        if pivot is None:
            return None
        index, page = pivot
        first = max(0, page - LEAD_PAGES)
        pages = np.flatnonzero(self._unsent[index][first : page + AROUND_PAGES])[: self._max_pages] + first
        if len(pages):
            return index, pages
        self._pivot = None
        return None

    def _in_order(self) -> tuple[int, NDArray[np.int64]] | None:
        for index, piece in self._pieces:
            pages = page_runs.pages_of(piece)
            pages = pages[self._unsent[index][pages]]
            if len(pages):
                return index, pages
        return None

    def _cut(self, ordered: Sequence[tuple[int, Runs]]) -> Iterator[tuple[int, Runs]]:
        for index, runs in ordered:
            for piece in page_runs.batches(runs, lambda: self._max_pages, max(1, len(runs))):
                yield index, piece
