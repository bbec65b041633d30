"""Claims 5, 7 to 11, 13 and 33, and the system's 21, 23 to 27 and 29: pages that travel after the device
state.

7: "the step (e) is performed after the step (c)". 8: "after the step (d)". 9: "paging in one or more of
the units on demand". 10: "asynchronously". 11: (e) "before the step (d)", and after it more, "until all
modified source VM memory units are retransferred". 5: (e) before the suspension and further units after
(d). 13: "until the number of source VM memory units not yet transferred with their most current contents
is less than a threshold value, and then transferring all such remaining memory units after the
destination VM begins running". 33 is 1 with the units sent again after the device state.

Where a page was placed while the VM ran, the destination's pager says so: it alone places pages then.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.claims.steered_guest import FEW_PAGES, HELD, HOT_PAGE, HOT_PAGES, SteeredGuest
from tests.e2e.farm import Farm

from transhume.model.migration import Migration, Mode, Outcome, PagingReport, Rest

pytestmark = pytest.mark.timeout(240)

BANDWIDTH_BYTES_S = 1 << 20


async def _moved(farm: Farm, **options: Any) -> tuple[SteeredGuest, Migration, int]:
    """The steered guest, which writes all its hot pages all the time, moved in some order."""
    guest = await SteeredGuest.boot(farm)
    executed = await guest.executes("alpha")
    record = await farm.migrate("vm", "beta", bandwidth_bytes_s=BANDWIDTH_BYTES_S, **options)
    assert record.outcome is Outcome.COMPLETED, record.error
    await guest.assert_whole_at("beta", executed)
    return guest, record, executed


def _paging(record: Migration) -> PagingReport:
    paging = record.report.paging
    assert paging is not None
    assert paging.complete
    return paging


async def test_claims_7_and_23_the_modified_units_after_the_device_state(farm: Farm) -> None:
    options = {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.AFTER_STATE, "verify": True}
    _, record, _ = await _moved(farm, **options)
    first, last = record.report.iterations
    assert (first.suspended, last.suspended) == (False, True)
    assert last.pages >= HOT_PAGES
    assert record.report.order == "1 pre-copy pass, rest after-state"
    assert record.report.paging is None


async def test_claims_8_24_and_33_the_modified_units_after_the_vm_runs_there(farm: Farm) -> None:
    options = {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.BOTH, "max_downtime_ms": 1.0}
    _, record, _ = await _moved(farm, **options)
    first, last = record.report.iterations
    # (a) sent every page that the guest writes, and nothing travelled while the VM was suspended.
    assert first.pages >= HOT_PAGES
    assert (last.suspended, last.pages) == (True, 0)
    paging = _paging(record)
    assert paging.owed_pages >= HOT_PAGES
    assert paging.fetched_pages + paging.pushed_pages == paging.owed_pages


async def test_claims_9_and_25_on_demand(farm: Farm) -> None:
    """Whatever the guest touches comes on demand; the deadline fetches the few that it never touches
    again.
    """
    options = {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.ON_DEMAND, "max_downtime_ms": 1.0}
    _, record, _ = await _moved(farm, **options, deadline_s=8.0)
    paging = _paging(record)
    assert paging.fetched_pages >= HOT_PAGES
    assert paging.faults >= HOT_PAGES


async def test_claims_10_and_26_asynchronously(farm: Farm) -> None:
    options = {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.BACKGROUND, "max_downtime_ms": 1.0}
    _, record, _ = await _moved(farm, **options)
    paging = _paging(record)
    assert paging.fetched_pages == 0
    assert paging.pushed_pages == paging.owed_pages >= HOT_PAGES


async def test_claims_11_and_27_some_before_the_vm_runs_there_and_all_the_others_after(farm: Farm) -> None:
    """While suspended as many of the latest as the promised downtime has room for; the rest when it runs."""
    options = {"mode": Mode.HYBRID, "iterations": 1, "max_downtime_ms": 250.0}
    _, record, _ = await _moved(farm, **options)
    *_, last = record.report.iterations
    assert last.suspended
    assert last.pages > 0
    paging = _paging(record)
    assert paging.owed_pages > 0
    assert last.pages + paging.owed_pages >= HOT_PAGES


async def test_claims_5_and_21_further_units_after_the_vm_runs_there(farm: Farm) -> None:
    options = {"mode": Mode.PRE_COPY, "iterations": 3, "rest": Rest.BOTH, "max_downtime_ms": 1.0}
    _, record, _ = await _moved(farm, **options)
    *before, last = record.report.iterations
    # (e) before (b): whole passes of modified units. (f) after (d): what was modified to the end.
    assert sum(each.pages for each in before[1:]) >= HOT_PAGES
    assert not any(each.suspended for each in before)
    assert last.pages == 0
    assert _paging(record).owed_pages >= HOT_PAGES


async def test_claims_13_and_29_under_the_threshold_and_then_after_the_vm_runs_there(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    held = {key: value for key, value in HELD.items() if key != "post_copy"}
    migration = await farm.begin("vm", "beta", **held, mode=Mode.HYBRID)
    await guest.precopied(migration, 3)
    executed = await guest.executes("alpha")
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    *before, last = record.report.iterations
    threshold_pages = HELD["threshold_pages"]
    assert all(each.dirty_pages_after > threshold_pages for each in before[:-1])
    assert before[-1].dirty_pages_after <= threshold_pages
    assert record.report.switch_reason == "the pages left are under the threshold"
    assert last.pages == 0
    assert FEW_PAGES <= _paging(record).owed_pages <= threshold_pages + HOT_PAGES
    assert guest.word("beta", HOT_PAGE) >= executed
    await guest.assert_whole_at("beta", executed)
