"""Claims 2 and 18: what was modified is sent again before the suspension; claims 3 and 19: iteratively.

2: "the step (e) is performed prior to the steps (b), (c) and (d)". 3: "the step (e) is performed
iteratively".
"""

from __future__ import annotations

import pytest
from tests.claims.steered_guest import FEW_PAGES, HELD, HOT_PAGE, HOT_PAGES, SteeredGuest
from tests.e2e.farm import Farm

from transhume.model.migration import Outcome

pytestmark = pytest.mark.timeout(240)


async def test_claims_2_and_18_modified_units_are_sent_again_before_the_suspension(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    migration = await farm.begin("vm", "beta", **HELD)
    await guest.precopied(migration)
    # (a) and (e): a unit that has been sent comes again with newer content...
    last = HOT_PAGE + HOT_PAGES - 1
    sent = await guest.until_word("beta", last, 1)
    again = await guest.until_word("beta", last, sent + 1)
    # ... before (b), (c) and (d): the source VM executes and the destination VM has no state to run from.
    executed = await guest.executes("alpha")
    assert executed > again
    await guest.precopied(migration)
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    # (b), (c) and (d) come after the last pass of (e).
    assert [each.suspended for each in record.report.iterations][:2] == [False, False]
    assert record.report.iterations[1].pages >= HOT_PAGES
    await guest.assert_whole_at("beta", executed)


async def test_claims_3_and_19_iteratively(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    migration = await farm.begin("vm", "beta", **HELD)
    # (e) over and over, each time with what was modified since: the unit at the destination grows.
    words: list[int] = []
    for iteration in (2, 3, 4):
        await guest.precopied(migration, iteration)
        words.append(await guest.until_word("beta", HOT_PAGE, max(words, default=0) + 1))
    assert words == sorted(set(words))
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    passes = [each for each in record.report.iterations[1:] if not each.suspended]
    assert len(passes) >= 4
    # Each pass was over what the one before had left, until few pages were left and it ended.
    lefts = [each.dirty_pages_after for each in record.report.iterations]
    assert sum(left >= HOT_PAGES for left in lefts) >= 3
    assert FEW_PAGES <= lefts[len(passes)] <= HELD["threshold_pages"]
    await guest.assert_whole_at("beta", words[-1])
