"""Claims 12 and 28: a first set is pre-copied; then, iteratively, what is missing and what was modified.

"before transferring non-memory source VM state information to the destination VM, pre-copying a first set of
source VM memory units to the destination VM; ... tracking modifications of source VM memory units after the
pre-copying step; and iteratively transferring to the destination VM remaining non-transferred source VM
memory units, as well as modified VM memory units." Claim 35 says the same of claim 33's pre-copy.
"""

from __future__ import annotations

import pytest
from tests.claims.steered_guest import HELD, HOT_PAGE, HOT_PAGES, QUIET_PAGE, SteeredGuest
from tests.e2e.farm import Farm

from transhume.model.migration import Outcome

pytestmark = pytest.mark.timeout(240)


async def test_claims_12_28_and_the_precopy_of_35(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    assert not guest.holds("alpha", QUIET_PAGE)
    migration = await farm.begin("vm", "beta", **HELD)
    await guest.precopied(migration)
    # The first set has been pre-copied: the guest's hot pages are in it, the quiet page is not.
    first_set = await guest.until_word("beta", HOT_PAGE, 1)
    assert not guest.holds("beta", QUIET_PAGE)
    # A unit that was never transferred comes into being at the source; it is transferred, as remaining.
    guest.key("alpha", b"w")
    written = await guest.until_word("alpha", QUIET_PAGE, 1)
    assert await guest.until_word("beta", QUIET_PAGE, 1) == written
    # A unit of the first set that was modified meanwhile is transferred as well, and again.
    modified = await guest.until_word("beta", HOT_PAGE, first_set + 1)
    await guest.until_word("beta", HOT_PAGE, modified + 1)
    # All of that while the source VM executes: the non-memory state has not been transferred.
    executed = await guest.executes("alpha")
    await guest.precopied(migration)
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    first, *others = record.report.iterations
    assert first.pages >= HOT_PAGES
    assert sum(each.pages for each in others) > HOT_PAGES
    # Tracking missed nothing: the RAM of both ends was equal by hash.
    assert record.report.downtime.verify_ms > 0
    assert guest.word("beta", QUIET_PAGE) == written
    await guest.assert_whole_at("beta", executed)
