"""Every owed page is pushed once or was sent on demand; those that are likely to be needed come first."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.migration.paging.guest import pages

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs
from transhume.migration.paging.push import (
    AROUND_PAGES,
    CALM_S,
    HOLD_STEP_S,
    LEAD_PAGES,
    MOST_HOLD_S,
    PushOrder,
)

BLOCK_PAGES = (AROUND_PAGES + 100, 50)
Key = tuple[int, int]

BLOCKS = st.integers(0, len(BLOCK_PAGES) - 1)


def page_in(block: int) -> st.SearchStrategy[int]:
    """Pages near to each other as a rule, and those at the far end of the reach of a fault."""
    last = BLOCK_PAGES[block] - 1
    return st.one_of(st.integers(0, min(60, last)), st.integers(max(0, last - 120), last))


def runs_in(block: int) -> st.SearchStrategy[Runs]:
    return st.sets(page_in(block), max_size=40).map(lambda numbers: pages(*numbers))


LAYER = st.tuples(*(runs_in(block) for block in range(len(BLOCK_PAGES))))
ANY_PAGE = BLOCKS.flatmap(lambda block: st.tuples(st.just(block), page_in(block)))
SOME_PAGES = BLOCKS.flatmap(lambda block: st.tuples(st.just(block), runs_in(block)))


def keys(block: int, runs: Runs) -> list[Key]:
    return [(block, page) for page in page_runs.pages_of(runs).tolist()]


class Pushing(RuleBasedStateMachine):
    """A plain list of what should come next, beside `PushOrder`."""

    @initialize(layers=st.lists(LAYER, max_size=3))
    def begin(self, layers: list[tuple[Runs, ...]]) -> None:
        self.order = PushOrder(BLOCK_PAGES, layers)
        self.queue: list[Key] = []
        self.gone: set[Key] = set()
        self.pivot: Key | None = None
        for layer in layers:
            self.append(layer)

    def append(self, layer: tuple[Runs, ...]) -> None:
        present = set(self.queue)
        for block, runs in enumerate(layer):
            self.queue += [key for key in keys(block, runs) if key not in present]

    def drop(self, sent: list[Key]) -> int:
        before = len(self.queue)
        self.gone |= set(sent) & set(self.queue)
        self.queue = [key for key in self.queue if key not in set(sent)]
        return before - len(self.queue)

    def near(self) -> list[Key]:
        if self.pivot is None:
            return []
        block, page = self.pivot
        return sorted(
            key for key in self.queue if key[0] == block and page - LEAD_PAGES <= key[1] < page + AROUND_PAGES
        )

    @rule(max_pages=st.integers(1, 40))
    def push(self, max_pages: int) -> None:
        found = self.order.next(max_pages)
        if found is None:
            assert self.queue == []
            self.pivot = None
            return
        came = keys(*found)
        assert 0 < len(came) <= max_pages
        assert page_runs.fault(found[1], BLOCK_PAGES[found[0]]) == ""
        near = self.near()
        if near:
            assert came == near[:max_pages]
        else:
            self.pivot = None
            assert came == self.queue[: len(came)]
        assert self.drop(came) == len(came)

    @rule(key=ANY_PAGE)
    def fault(self, key: Key) -> None:
        self.order.fault(*key)
        self.pivot = key

    @rule(key=ANY_PAGE, now_s=st.floats(0, 1))
    def one_page_was_fetched(self, key: Key, now_s: float) -> None:
        self.order.sent_page(*key, now_s)
        self.drop([key])
        self.pivot = (key[0], key[1] + 1)

    @rule(some=SOME_PAGES)
    def pages_were_fetched(self, some: tuple[int, Runs]) -> None:
        assert self.order.sent(*some) == self.drop(keys(*some))

    @rule(late=LAYER)
    def more_is_owed(self, late: tuple[Runs, ...]) -> None:
        """Only pages that were not sent yet: the guest is suspended while it is found out."""
        late = tuple(
            pages(*(page for at, page in keys(block, runs) if (at, page) not in self.gone))
            for block, runs in enumerate(late)
        )
        self.order.add(late)
        self.append(late)

    @invariant()
    def count_agrees(self) -> None:
        assert self.order.left_pages == len(self.queue)


TestPushing = Pushing.TestCase
TestPushing.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def drained(order: PushOrder, max_pages: int) -> Iterator[Key]:
    while (found := order.next(max_pages)) is not None:
        yield from keys(*found)


@settings(max_examples=30, deadline=None)
@given(first=LAYER, second=LAYER, again=LAYER, steps=st.integers(0, 20), max_pages=st.integers(1, 30))
def test_a_page_that_is_owed_anew_comes_anew(
    first: tuple[Runs, ...], second: tuple[Runs, ...], again: tuple[Runs, ...], steps: int, max_pages: int
) -> None:
    order = PushOrder(BLOCK_PAGES, [first, second])
    before: list[Key] = []
    for _ in range(steps):
        found = order.next(max_pages)
        before += keys(*found) if found is not None else []
    order.add(again)
    after = list(drained(order, max_pages))
    owed = {key for layer in (first, second) for block, runs in enumerate(layer) for key in keys(block, runs)}
    late = {key for block, runs in enumerate(again) for key in keys(block, runs)}
    assert len(before) == len(set(before))
    assert len(after) == len(set(after))
    assert set(after) == (owed - set(before)) | late
    assert order.left_pages == 0
    assert order.next(1) is None


def test_what_was_dirtied_last_comes_first() -> None:
    order = PushOrder([10, 10], [[pages(8), pages(1, 2)], [pages(0, 1, 8, 9), pages(2, 3)]])
    order.add([pages(5, 9), page_runs.empty()])
    assert list(drained(order, 2)) == [(0, 8), (1, 1), (1, 2), (0, 0), (0, 1), (0, 9), (1, 3), (0, 5)]


def test_the_push_goes_on_around_the_latest_fault_and_then_returns() -> None:
    order = PushOrder([5000], [[page_runs.single(0, 5000)]])
    assert order.next(10) is not None
    order.fault(0, 1000)
    order.sent_page(0, 3000, now_s=0.0)
    around = [page for _, page in drained(order, 64)]
    lead = list(range(3001 - LEAD_PAGES, 3000))
    assert around[: len(lead) + 1] == [*lead, 3001]
    assert around[len(lead) : len(lead) + 1999] == list(range(3001, 5000))
    assert around[len(lead) + 1999] == 10
    assert len(around) == 5000 - 10 - 1


def test_the_push_stands_back_while_faults_follow_each_other() -> None:
    order = PushOrder([10], [[pages(1, 2, 3)]])
    assert order.hold_s(0.0) == 0.0
    order.sent_page(0, 1, now_s=1.0)
    assert order.hold_s(1.0 + CALM_S / 2) == HOLD_STEP_S
    assert order.hold_s(1.0 + CALM_S * 2) == 0.0


def test_a_guest_that_never_stops_faulting_gets_its_push() -> None:
    order = PushOrder([10], [[pages(1, 2, 3)]])
    now_s = held_s = 0.0
    order.sent_page(0, 1, now_s)
    while step_s := order.hold_s(now_s):
        held_s += step_s
        now_s += step_s
        order.sent_page(0, 1, now_s)
        assert held_s <= MOST_HOLD_S + HOLD_STEP_S
    assert held_s >= MOST_HOLD_S / 2


@pytest.fixture
def threads_change_often() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("threads_change_often")
def test_two_threads_lose_and_double_nothing() -> None:
    """One pushes, one answers faults; what the second sent first is not pushed after it."""
    count = 3000
    order = PushOrder([count], [[page_runs.single(0, count // 2)], [page_runs.single(0, count)]])
    pushed: list[Key] = []
    fetched = 0

    def push() -> None:
        pushed.extend(drained(order, 7))

    pusher = threading.Thread(target=push)
    pusher.start()
    for page in np.random.default_rng(1).permutation(count)[:1500].tolist():
        runs = page_runs.single(page, min(3, count - page))
        fetched += order.sent(0, runs)
        order.fault(0, page + len(runs))
        if page % 5 == 0:
            order.sent_page(0, page, now_s=0.0)  # sent a moment ago: nothing new
    pusher.join()
    pushed.extend(drained(order, 7))
    assert len(pushed) == len(set(pushed))
    assert len(pushed) + fetched == count
    assert order.left_pages == 0
