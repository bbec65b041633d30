"""Whatever comes in whatever order, each page is placed once and never over another one."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.migration.paging.guest import pages

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs
from transhume.migration.paging.missing import Condition, MissingPages

BLOCK_PAGES = (12, 7)

BLOCKS = st.integers(0, len(BLOCK_PAGES) - 1)
ANY_PAGE = BLOCKS.flatmap(lambda block: st.tuples(st.just(block), st.integers(0, BLOCK_PAGES[block] - 1)))
SOME_PAGES = BLOCKS.flatmap(
    lambda block: st.tuples(
        st.just(block), st.sets(st.integers(0, BLOCK_PAGES[block] - 1)).map(lambda numbers: pages(*numbers))
    )
)


def keys(block: int, runs: Runs) -> set[tuple[int, int]]:
    return {(block, page) for page in page_runs.pages_of(runs).tolist()}


@dataclass(eq=False)
class Claim:
    """What one thread is about to place."""

    block: int
    runs: Runs
    in_memory: bool = False
    one_page: bool = False


class Paging(RuleBasedStateMachine):
    """The destination's memory, and those who place pages in it, next to `MissingPages`."""

    def __init__(self) -> None:
        super().__init__()
        self.missing = MissingPages(BLOCK_PAGES)
        self.owed: set[tuple[int, int]] = set()
        self.memory: set[tuple[int, int]] = set()
        self.settled: set[tuple[int, int]] = set()
        self.claims: list[Claim] = []

    def claimed(self) -> set[tuple[int, int]]:
        return {key for claim in self.claims for key in keys(claim.block, claim.runs)}

    @initialize(some=st.lists(SOME_PAGES, max_size=3))
    def begin(self, some: list[tuple[int, Runs]]) -> None:
        for block, runs in some:
            self.missing.owe(block, runs)
            self.owed |= keys(block, runs)

    @rule(some=SOME_PAGES)
    def name_owed_again(self, some: tuple[int, Runs]) -> None:
        """What is named once more, or late, does not undo anything."""
        block, runs = some
        runs = pages(
            *(
                page
                for at, page in keys(block, runs)
                if (at, page) not in self.memory or self.missing.condition(at, page) is not Condition.FREE
            )
        )
        self.missing.owe(block, runs)
        self.owed |= keys(block, runs)

    @rule(some=SOME_PAGES)
    def pages_come(self, some: tuple[int, Runs]) -> None:
        """Pushed, fetched, or pushed a second time on a new connection."""
        block, runs = some
        claimed = self.missing.claim(block, runs)
        assert keys(block, claimed) == (keys(block, runs) & self.owed) - self.settled - self.claimed()
        if len(claimed):
            self.claims.append(Claim(block, claimed))

    @rule(key=ANY_PAGE)
    def one_page_comes(self, key: tuple[int, int]) -> None:
        """In answer to a fault."""
        due = key in self.owed - self.settled - self.claimed()
        assert self.missing.claim_page(*key) is due
        if due:
            self.claims.append(Claim(key[0], pages(key[1]), one_page=True))

    @precondition(lambda self: any(not claim.in_memory for claim in self.claims))
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from([each for each in self.claims if not each.in_memory]))
        placed = keys(claim.block, claim.runs)
        assert not placed & self.memory, "a page was placed over another one"
        self.memory |= placed
        claim.in_memory = True

    @precondition(lambda self: any(claim.in_memory for claim in self.claims))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from([each for each in self.claims if each.in_memory]))
        self.claims.remove(claim)
        self.settled |= keys(claim.block, claim.runs)
        if claim.one_page:
            left = self.missing.settle_page(claim.block, int(claim.runs[0, 0]))
        else:
            left = self.missing.settle(claim.block, claim.runs)
        assert left == len(self.owed - self.settled)

    @precondition(lambda self: any(not claim.in_memory for claim in self.claims))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from([each for each in self.claims if not each.in_memory]))
        self.claims.remove(claim)
        self.missing.give_back(claim.block, claim.runs)

    @rule(key=ANY_PAGE)
    def first_touch(self, key: tuple[int, int]) -> None:
        """What was never owed is answered with zeros, here and at once."""
        if self.missing.condition(*key) is Condition.FREE:
            assert key not in self.owed - self.settled
            self.memory.add(key)

    @rule()
    def die(self) -> None:
        """A successor knows what was owed, and what is in memory. Who was placing a page is gone."""
        self.missing = MissingPages(BLOCK_PAGES)
        for block in range(len(BLOCK_PAGES)):
            owed, there = (
                pages(*(page for at, page in which if at == block)) for which in (self.owed, self.memory)
            )
            self.missing.owe(block, page_runs.subtract(owed, there))
        self.claims.clear()
        self.settled = self.owed & self.memory

    @invariant()
    def counts_agree(self) -> None:
        assert self.missing.left_pages == len(self.owed - self.settled)

    @invariant()
    def conditions_agree(self) -> None:
        claimed = self.claimed()
        for block, count in enumerate(BLOCK_PAGES):
            missing = keys(block, self.missing.missing(block))
            for key in ((block, page) for page in range(count)):
                condition = self.missing.condition(*key)
                assert (key in missing) is (condition is Condition.MISSING)
                if key in claimed:
                    assert condition is Condition.PLACING
                elif key in self.owed - self.settled:
                    assert condition is Condition.MISSING
                else:
                    assert condition in (Condition.FREE, Condition.PLACED)
        assert not self.settled - self.memory


TestPaging = Paging.TestCase
TestPaging.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_what_was_placed_is_not_owed_again() -> None:
    missing = MissingPages([4])
    missing.owe(0, pages(0, 1))
    assert missing.settle(0, missing.claim(0, pages(0))) == 1
    assert missing.claim_page(0, 1)
    missing.owe(0, pages(0, 1, 2))
    assert [missing.condition(0, page) for page in range(4)] == [
        Condition.PLACED,
        Condition.PLACING,
        Condition.MISSING,
        Condition.FREE,
    ]
    assert missing.left_pages == 2


@pytest.mark.parametrize("one_by_one", [False, True])
def test_of_many_threads_one_places_each_page_and_one_sees_the_last(one_by_one: bool) -> None:
    count, threads = 600, 4
    missing = MissingPages([count])
    missing.owe(0, page_runs.single(0, count))
    placed = np.zeros(count, dtype=np.int64)
    ends: list[int] = []
    begin = threading.Barrier(threads)

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        begin.wait()
        for first in random.permutation(count).tolist():
            if one_by_one and seed % 2:
                if missing.claim_page(0, first):
                    placed[first] += 1
                    ends.append(missing.settle_page(0, first))
                continue
            claimed = missing.claim(0, page_runs.single(first, min(3, count - first)))
            if len(claimed) and random.random() < 0.2:
                missing.give_back(0, claimed)
                claimed = missing.claim(0, claimed)
            if len(claimed):
                placed[page_runs.pages_of(claimed)] += 1
                ends.append(missing.settle(0, claimed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert (placed == 1).all()
    assert missing.left_pages == 0
    assert ends.count(0) == 1
    assert len(missing.missing(0)) == 0
