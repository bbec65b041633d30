"""Runs of pages behave as sets of page numbers do."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs

PAGES = 200
page_sets = st.sets(st.integers(0, PAGES - 1))


@st.composite
def run_sets(draw: st.DrawFn) -> Runs:
    """Runs that may touch, as a peer may send them."""
    pages = sorted(draw(page_sets))
    cuts = draw(st.sets(st.sampled_from(pages))) if pages else set()
    rows: list[list[int]] = []
    for page in pages:
        if rows and rows[-1][0] + rows[-1][1] == page and page not in cuts:
            rows[-1][1] += 1
        else:
            rows.append([page, 1])
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def as_set(runs: Runs) -> set[int]:
    pages = [page for first, count in runs.tolist() for page in range(first, first + count)]
    assert len(pages) == len(set(pages))
    assert pages == sorted(pages)
    assert runs.dtype == np.int64
    assert runs.shape == (len(runs), 2)
    return set(pages)


def is_longest(runs: Runs) -> bool:
    return bool((runs[1:, 0] > runs[:-1].sum(axis=1)).all())


@settings(deadline=None)
@given(run_sets())
def test_bitmap_and_back(runs: Runs) -> None:
    bitmap = page_runs.to_bitmap(runs, PAGES)
    assert set(np.flatnonzero(bitmap).tolist()) == as_set(runs)
    back = page_runs.from_bitmap(bitmap)
    assert as_set(back) == as_set(runs)
    assert is_longest(back)
    assert page_runs.page_count(runs) == len(as_set(runs))


@settings(deadline=None)
@given(run_sets(), st.integers(1, 50))
def test_a_bitmap_may_begin_anywhere(runs: Runs, first_page: int) -> None:
    moved = runs.copy()
    moved[:, 0] += first_page
    bitmap = page_runs.to_bitmap(moved, PAGES, first_page)
    assert as_set(page_runs.from_bitmap(bitmap, first_page)) == as_set(moved)


@settings(deadline=None)
@given(run_sets())
def test_page_numbers_and_back(runs: Runs) -> None:
    pages = page_runs.pages_of(runs)
    assert pages.tolist() == sorted(as_set(runs))
    assert as_set(page_runs.from_pages(pages)) == as_set(runs)


@settings(deadline=None)
@given(run_sets(), run_sets())
def test_set_operations(left: Runs, right: Runs) -> None:
    union = page_runs.union(left, right)
    assert as_set(union) == as_set(left) | as_set(right)
    assert is_longest(union)
    assert as_set(page_runs.intersect(left, right)) == as_set(left) & as_set(right)
    assert as_set(page_runs.subtract(left, right)) == as_set(left) - as_set(right)


@settings(deadline=None)
@given(run_sets())
def test_complement(runs: Runs) -> None:
    assert as_set(page_runs.complement(runs, 0, PAGES)) == set(range(PAGES)) - as_set(runs)


@settings(deadline=None)
@given(run_sets(), st.integers(0, PAGES), st.integers(0, PAGES))
def test_clip(runs: Runs, first_page: int, page_count: int) -> None:
    clipped = page_runs.clip(runs, first_page, page_count)
    assert as_set(clipped) == as_set(runs) & set(range(first_page, first_page + page_count))


@settings(deadline=None)
@given(run_sets(), st.integers(1, 20))
def test_split_keeps_the_pages_and_bounds_the_runs(runs: Runs, max_pages: int) -> None:
    pieces = page_runs.split(runs, max_pages)
    assert as_set(pieces) == as_set(runs)
    assert all(0 < count <= max_pages for _, count in pieces.tolist())


@settings(deadline=None)
@given(run_sets(), st.integers(1, 20), st.integers(1, 5))
def test_batches_are_the_set_in_order(runs: Runs, max_pages: int, max_runs: int) -> None:
    batches = list(page_runs.batches(runs, max_pages, max_runs))
    sizes = [page_runs.page_count(batch) for batch in batches]
    assert all(0 < size <= max_pages for size in sizes)
    assert all(0 < len(batch) <= max_runs for batch in batches)
    assert all(
        size == max_pages or len(batch) == max_runs
        for size, batch in zip(sizes[:-1], batches[:-1], strict=True)
    )
    joined = np.concatenate([page_runs.empty(), *batches])
    assert as_set(joined) == as_set(runs)
    assert all(page_runs.fault(batch, PAGES) == "" for batch in batches)


def test_batches_of_a_long_run() -> None:
    batches = [batch.tolist() for batch in page_runs.batches(page_runs.single(5, 10), 4, 100)]
    assert batches == [[[5, 4]], [[9, 4]], [[13, 2]]]


@settings(deadline=None)
@given(run_sets())
def test_sets_of_pages_have_no_fault(runs: Runs) -> None:
    assert page_runs.fault(runs, PAGES) == ""


def test_faults_are_named() -> None:
    assert "no pages" in page_runs.fault(np.array([[3, 0]]), 10)
    assert "outside" in page_runs.fault(np.array([[3, 8]]), 10)
    assert "outside" in page_runs.fault(np.array([[-1, 2]]), 10)
    assert "overlap" in page_runs.fault(np.array([[3, 2], [4, 1]]), 10)
    assert "order" in page_runs.fault(np.array([[5, 1], [2, 1]]), 10)


def test_the_empty_set() -> None:
    assert page_runs.single(7, 0).tolist() == []
    assert list(page_runs.batches(page_runs.empty(), 1, 1)) == []
    assert page_runs.page_count(page_runs.empty()) == 0
    assert as_set(page_runs.union(page_runs.empty(), page_runs.single(1, 2))) == {1, 2}
