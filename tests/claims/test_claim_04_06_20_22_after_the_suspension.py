"""Claims 4 and 20: further units travel after the suspension; claims 6 and 22: the modified ones do.

4: "transferring additional units of the source VM memory to the destination VM after the step (b)", while (e)
has come before it. 6: "the step (e) is performed after the step (b)".
"""

from __future__ import annotations

import pytest
from tests.claims.steered_guest import FEW_PAGES, HELD, HOT_PAGES, SteeredGuest
from tests.e2e.farm import Farm

from transhume.model.migration import Outcome

pytestmark = pytest.mark.timeout(240)


async def test_claims_4_and_20_more_units_after_the_suspension(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    migration = await farm.begin("vm", "beta", **HELD)
    await guest.precopied(migration, 2)
    executed = await guest.executes("alpha")
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    *before, last = record.report.iterations
    # (e) before (b): whole passes of modified units.
    assert sum(each.pages for each in before[1:]) >= HOT_PAGES
    assert not any(each.suspended for each in before)
    # (f) after (b): the few that the guest was writing to the end.
    assert last.suspended
    assert last.pages >= FEW_PAGES
    await guest.assert_whole_at("beta", executed)


async def test_claims_6_and_22_the_modified_units_after_the_suspension(farm: Farm) -> None:
    """One pass while the guest executes, and everything that it modified meanwhile once it is suspended."""
    guest = await SteeredGuest.boot(farm)
    options = {**HELD, "threshold_pages": 4 * HOT_PAGES}
    executed = await guest.executes("alpha")
    record = await farm.migrate("vm", "beta", **options)
    assert record.outcome is Outcome.COMPLETED, record.error
    first, last = record.report.iterations
    # (a) before (b)...
    assert not first.suspended
    assert first.pages >= HOT_PAGES
    # ... and (e) after it: each of the guest's pages was sent by (a), and again by (e).
    assert last.suspended
    assert last.pages >= HOT_PAGES
    assert record.report.downtime.verify_ms > 0
    await guest.assert_whole_at("beta", executed)
