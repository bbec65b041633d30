"""Sets of guest pages as runs: the one shape in which pages travel between scanner, policy and wire.

A set of pages of one RAM block is an int64 array of shape (n, 2), each row `[first_page, page_count]`:
sorted, disjoint, never empty rows; neighbours may touch. All functions are pure and return new arrays
(or the argument itself when nothing changes), and none of them loops over runs in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.int64]
"""Shape (n, 2): `[first_page, page_count]`, sorted by first page, disjoint, every count above zero."""

Bitmap = NDArray[np.bool_]
"""Shape (pages,): true where the page is in the set."""


def empty() -> Runs:
    """The set without pages."""
    return np.empty((0, 2), dtype=np.int64)


def single(first_page: int, page_count: int) -> Runs:
    """One run; the empty set when `page_count` is zero."""
    if page_count == 0:
        return empty()
    return np.array([[first_page, page_count]], dtype=np.int64)


def from_bounds(first_pages: NDArray[np.int64], end_pages: NDArray[np.int64]) -> Runs:
    """Rows from two arrays of equal length: first page, and the page after the last.

    Sorted and disjoint bounds are the caller's duty; runs that touch are joined and empty ones dropped.
    """
    filled = end_pages > first_pages
    if not filled.all():
        first_pages, end_pages = first_pages[filled], end_pages[filled]
    if len(first_pages) == 0:
        return empty()
    apart = first_pages[1:] != end_pages[:-1]
    first = first_pages[np.concatenate(([True], apart))]
    end = end_pages[np.concatenate((apart, [True]))]
    return np.stack((first, end - first), axis=1).astype(np.int64, copy=False)


def from_bitmap(bitmap: Bitmap, first_page: int = 0) -> Runs:
    """The longest possible runs of true pages; element 0 of the bitmap is page `first_page`."""
    edges = np.flatnonzero(np.diff(bitmap.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    return np.stack((edges[::2] + first_page, edges[1::2] - edges[::2]), axis=1).astype(np.int64, copy=False)


def to_bitmap(runs: Runs, page_count: int, first_page: int = 0) -> Bitmap:
    """The bitmap of the pages `first_page` to `first_page + page_count - 1`, which must hold all runs."""
    bitmap = np.zeros(page_count, dtype=np.bool_)
    bitmap[pages_of(runs) - first_page] = True
    return bitmap


def page_count(runs: Runs) -> int:
    """How many pages the set holds."""
    return int(runs[:, 1].sum())


def pages_of(runs: Runs) -> NDArray[np.int64]:
    """The number of every page in the set, in order. Shape (page_count,)."""
    counts = runs[:, 1]
    starts = np.cumsum(counts) - counts
    pages: NDArray[np.int64] = np.repeat(runs[:, 0] - starts, counts)
    pages += np.arange(len(pages), dtype=np.int64)
    return pages


def from_pages(pages: NDArray[np.int64]) -> Runs:
    """The longest possible runs of page numbers that are sorted and unique."""
    return from_bounds(pages, pages + 1)


def union(left: Runs, right: Runs) -> Runs:
    """The pages of either set; runs that overlap or touch become one."""
    return _combine(left, right, at_least=1)


def intersect(left: Runs, right: Runs) -> Runs:
    """The pages of both sets."""
    return _combine(left, right, at_least=2)


def subtract(left: Runs, right: Runs) -> Runs:
    """The pages of `left` that are not in `right`."""
    if len(left) == 0 or len(right) == 0:
        return left
    low = int(min(left[0, 0], right[0, 0]))
    high = int(max(left[-1].sum(), right[-1].sum()))
    return intersect(left, complement(right, low, high - low))


def complement(runs: Runs, first_page: int, page_count: int) -> Runs:
    """The pages of the range that are not in the set, all of whose runs must lie in the range."""
    ends = np.concatenate(([first_page], runs[:, 0] + runs[:, 1]))
    starts = np.concatenate((runs[:, 0], [first_page + page_count]))
    return from_bounds(ends, starts)


def clip(runs: Runs, first_page: int, page_count: int) -> Runs:
    """The part of the set inside the range."""
    end_page = first_page + page_count
    low = np.searchsorted(runs[:, 0] + runs[:, 1], first_page, side="right")
    high = np.searchsorted(runs[:, 0], end_page, side="left")
    inside = runs[low:high]
    if len(inside) == 0:
        return empty()
    first = np.maximum(inside[:, 0], first_page)
    end = np.minimum(inside[:, 0] + inside[:, 1], end_page)
    return np.stack((first, end - first), axis=1)


def shifted(runs: Runs, pages: int) -> Runs:
    """The same runs, `pages` further on."""
    moved = runs.copy()
    moved[:, 0] += pages
    return moved


def split(runs: Runs, max_pages: int) -> Runs:
    """The same pages in the same order, with no run longer than `max_pages`."""
    counts = runs[:, 1]
    if len(runs) == 0 or int(counts.max()) <= max_pages:
        return runs
    pieces = -(-counts // max_pages)
    which = np.repeat(np.arange(len(runs)), pieces)
    offset = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_pages
    first = runs[which, 0] + offset
    count = np.minimum(counts[which] - offset, max_pages)
    return np.stack((first, count), axis=1)


def batches(runs: Runs, max_pages: int | Callable[[], int], max_runs: int) -> Iterator[Runs]:
    """Cut the set, in order, into pieces of at most `max_pages` pages and `max_runs` runs each.

    A long run goes on in the next piece, so all pieces but the last are full by one measure or the other.
    A function as `max_pages` is asked before each piece.
    """
    limit = max_pages if callable(max_pages) else lambda: max_pages
    ends = np.cumsum(runs[:, 1])
    row, taken = 0, 0  # the next run, and how many pages of the whole set are already in a piece
    total = int(ends[-1]) if len(ends) else 0
    while taken < total:
        stop = min(taken + limit(), total)
        last = min(int(np.searchsorted(ends, stop, side="left")), row + max_runs - 1)
        stop = min(stop, int(ends[last]))
        piece = runs[row : last + 1].copy()
        begun = taken - (int(ends[row]) - int(runs[row, 1]))
        piece[0, 0] += begun
        piece[0, 1] -= begun
        piece[-1, 1] -= int(ends[last]) - stop
        yield piece
        taken = stop
        row = last + 1 if stop == int(ends[last]) else last


def fault(runs: Runs, block_pages: int) -> str:
    """Why these rows are not a set of pages of a block with `block_pages` pages; empty when they are."""
    first, count = runs[:, 0], runs[:, 1]
    if len(runs) == 0:
        return ""
    if int(count.min()) <= 0:
        return "a run has no pages"
    if int(first.min()) < 0 or int((first + count).max()) > block_pages:
        return f"a run lies outside the block of {block_pages} pages"
    if not (first[1:] >= first[:-1] + count[:-1]).all():
        return "the runs overlap or are not in order"
    return ""


def _combine(left: Runs, right: Runs, at_least: int) -> Runs:
    """The pages that `at_least` of the two sets hold: a sweep over the edges of both."""
    both = np.concatenate((left, right))
    if len(both) == 0:
        return empty()
    edges = np.concatenate((both[:, 0], both[:, 0] + both[:, 1]))
    steps = np.repeat(np.array([1, -1], dtype=np.int64), len(both))
    # At equal positions ends come first: two runs that touch must not count as an overlap.
    order = np.lexsort((steps, edges))
    edges, depth = edges[order], np.cumsum(steps[order])
    inside = depth >= at_least
    return from_bounds(edges[:-1][inside[:-1]], edges[1:][inside[:-1]])
