"""Zero pages are found, and count the same whether memory is behind them or not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.processes import make_memfd

from transhume.memory import runs as page_runs
from transhume.memory import zero
from transhume.memory.digest import DIGEST_BYTES, digest, digest_of_runs, first_page_not_zero
from transhume.memory.ram import WORDS_PER_PAGE, GuestBlock, GuestRam
from transhume.model.vm import PAGE_BYTES

PAGES = 600


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, PAGE_BYTES - 1)), min_size=1, max_size=40))
def test_one_byte_anywhere_makes_a_page_other_than_zero(positions: list[int | None]) -> None:
    content = np.zeros((len(positions), PAGE_BYTES), dtype=np.uint8)
    for page, position in enumerate(positions):
        if position is not None:
            content[page, position] = 1
    found = zero.zero_pages(content.view(np.uint64).reshape(-1, WORDS_PER_PAGE))
    assert found.tolist() == [position is None for position in positions]


@settings(deadline=None)
@given(st.sets(st.integers(0, 99)), st.lists(st.booleans(), min_size=100, max_size=100))
def test_runs_are_divided_by_content(pages: set[int], is_zero: list[bool]) -> None:
    runs = page_runs.from_pages(np.array(sorted(pages), dtype=np.int64))
    zeros, others = zero.by_content(runs, np.array([is_zero[page] for page in sorted(pages)], dtype=np.bool_))
    assert page_runs.pages_of(zeros).tolist() == [page for page in sorted(pages) if is_zero[page]]
    assert page_runs.pages_of(others).tolist() == [page for page in sorted(pages) if not is_zero[page]]


@pytest.fixture
def two_blocks() -> Iterator[tuple[GuestBlock, GuestBlock]]:
    ram = GuestRam.of_fds([make_memfd(PAGES * PAGE_BYTES), make_memfd(PAGES * PAGE_BYTES, 1)])
    yield ram.blocks[0], ram.blocks[1]
    ram.close()


def write(block: GuestBlock, page: int, content: bytes) -> None:
    os.pwrite(block.fd, content.ljust(PAGE_BYTES, b"\0"), page * PAGE_BYTES)


def test_holes_and_zero_pages_have_the_same_digest(two_blocks: tuple[GuestBlock, GuestBlock]) -> None:
    left, right = two_blocks
    assert digest(left) == digest(right)
    for page in (0, 255, 256, 300, PAGES - 1):
        write(left, page, b"content")
        write(right, page, b"content")
    for page in (1, 254, 511, 512, 513):
        write(left, page, b"")
    assert digest(left) == digest(right)
    right.punch(300, 1)
    assert digest(left) != digest(right)
    write(left, 300, b"")
    assert digest(left) == digest(right)


def test_place_and_content_count(two_blocks: tuple[GuestBlock, GuestBlock]) -> None:
    left, right = two_blocks
    write(left, 3, b"content")
    write(right, 4, b"content")
    assert digest(left) != digest(right)
    write(right, 4, b"")
    write(right, 3, b"contenT")
    assert digest(left) != digest(right)


def test_the_same_content_in_another_piece_differs(two_blocks: tuple[GuestBlock, GuestBlock]) -> None:
    left, right = two_blocks
    write(left, 10, b"content")
    write(right, 10 + 256, b"content")
    assert digest(left) != digest(right)


def test_runs_have_the_digest_of_their_content_and_no_other(
    two_blocks: tuple[GuestBlock, GuestBlock],
) -> None:
    left, right = two_blocks
    runs = page_runs.from_pages(np.array([3, 4, 300, 599], dtype=np.int64))
    long = page_runs.single(0, PAGES)
    for block in two_blocks:
        write(block, 4, b"content")
    write(right, 300, b"")
    write(right, 7, b"elsewhere")
    assert digest_of_runs(left, runs) == digest_of_runs(right, runs)
    assert len(digest_of_runs(left, runs)) == DIGEST_BYTES
    assert digest_of_runs(left, long) != digest_of_runs(right, long)
    write(right, 599, b"more")
    assert digest_of_runs(left, runs) != digest_of_runs(right, runs)


def test_the_first_page_with_content_is_found(two_blocks: tuple[GuestBlock, GuestBlock]) -> None:
    block, _ = two_blocks
    assert first_page_not_zero(block, page_runs.single(0, PAGES)) is None
    assert first_page_not_zero(block, page_runs.empty()) is None
    write(block, 10, b"")
    write(block, 11, b"elsewhere")
    write(block, 400, b"content")
    but_11 = page_runs.subtract(page_runs.single(0, PAGES), page_runs.single(11, 1))
    assert first_page_not_zero(block, but_11) == 400
    assert first_page_not_zero(block, page_runs.single(0, PAGES)) == 11
    assert first_page_not_zero(block, page_runs.single(401, 100)) is None


def test_reading_allocates_nothing(two_blocks: tuple[GuestBlock, GuestBlock]) -> None:
    block, _ = two_blocks
    write(block, 100, b"content")
    digest(block)
    digest_of_runs(block, page_runs.single(90, 200))
    first_page_not_zero(block, page_runs.single(0, PAGES))
    assert block.populated_runs().tolist() == [[100, 1]]
