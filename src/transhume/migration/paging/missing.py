"""What the destination knows of each page while it already runs: the pure half of the pager.

Every page is in one of four conditions, and only ever moves to a later one::

    FREE       never owed: the source had nothing there, a first touch finds zeros
    MISSING    owed, not here: whoever touches it waits
    PLACING    it has come and is being placed: whoever waits will be woken by that
    PLACED     it was placed once; from here on it is the guest's alone

So a page is placed once, whatever order faults, pushes, second copies and repeated connections come in, and
never over what the guest has written. The caller claims pages (`claim`), places them, and says so (`settle`);
what could not be placed goes back (`give_back`). All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs


class Condition(IntEnum):
    """Where one page stands."""

    FREE = 0
    MISSING = 1
    PLACING = 2
    PLACED = 3


class MissingPages:
    """The pages of all RAM blocks. `block_pages` holds the number of pages of each block."""

    def __init__(self, block_pages: Sequence[int]) -> None:
        self._blocks: list[NDArray[np.uint8]] = [np.zeros(pages, dtype=np.uint8) for pages in block_pages]
        self._turn = threading.Lock()
        self._left = 0

    @property
    def block_pages(self) -> list[int]:
        """How many pages each block has."""
        return [len(block) for block in self._blocks]

    @property
    def left_pages(self) -> int:
        """How many pages are not placed yet."""
        return self._left

    def owe(self, block_index: int, runs: Runs) -> None:
        """The source names pages that will come later. Pages that were named before stay as they are."""
        with self._turn:
            block = self._blocks[block_index]
            pages = page_runs.pages_of(runs)
            fresh = pages[block[pages] == Condition.FREE]
            block[fresh] = Condition.MISSING
            self._left += len(fresh)

    def condition(self, block_index: int, page: int) -> Condition:
        """Where the page stands at this moment."""
        return Condition(int(self._blocks[block_index][page]))

    def claim(self, block_index: int, runs: Runs) -> Runs:
        """Of pages that have come: those that must be placed now, by the caller alone."""
        with self._turn:
            block = self._blocks[block_index]
            pages = page_runs.pages_of(runs)
            claimed = pages[block[pages] == Condition.MISSING]
            block[claimed] = Condition.PLACING
        return page_runs.from_pages(claimed)

    def claim_page(self, block_index: int, page: int) -> bool:
        """As `claim`, for one page that somebody waits for."""
        with self._turn:
            block = self._blocks[block_index]
            if block[page] != Condition.MISSING:
                return False
            block[page] = Condition.PLACING
            return True

    def settle_page(self, block_index: int, page: int) -> int:
        """As `settle`, for one page."""
        with self._turn:
            self._blocks[block_index][page] = Condition.PLACED
            self._left -= 1
            return self._left

    def settle(self, block_index: int, runs: Runs) -> int:
        """Claimed pages are placed. Returns how many pages are left."""
        with self._turn:
            pages = page_runs.pages_of(runs)
            self._blocks[block_index][pages] = Condition.PLACED
            self._left -= len(pages)
            return self._left

    def give_back(self, block_index: int, runs: Runs) -> None:
        """Claimed pages could not be placed: they are missing as before."""
        with self._turn:
            self._blocks[block_index][page_runs.pages_of(runs)] = Condition.MISSING

    def missing(self, block_index: int) -> Runs:
        """The pages that are owed and have not come."""
        with self._turn:
            return page_runs.from_bitmap(self._blocks[block_index] == Condition.MISSING)
