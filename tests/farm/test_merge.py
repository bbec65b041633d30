"""Reports joined in any order, any number of times, never run backwards."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.farm.merge import join_reports, merged
from transhume.model.migration import (
    DowntimeReport,
    IterationReport,
    Migration,
    MigrationReport,
    PagingReport,
    Phase,
    Progress,
)
from transhume.model.orders import MigrationUpdate

RECORD = Migration(id="m1", vm="web", source="alpha", destination="beta", epoch=1)

phases = st.sampled_from(list(Phase))
progresses = st.builds(
    Progress,
    migration=st.just("m1"),
    vm=st.just("web"),
    phase=phases,
    elapsed_s=st.floats(0, 100),
    fraction=st.floats(0, 1),
    iteration=st.integers(0, 9),
    wire_bytes=st.integers(0, 1000),
)
reports = st.builds(
    MigrationReport,
    downtime=st.builds(DowntimeReport, stop_ms=st.floats(0, 9), load_ms=st.floats(0, 9)),
    wire_bytes=st.integers(0, 1000),
    total_ms=st.floats(0, 1000),
)
updates = st.builds(
    MigrationUpdate,
    migration=st.just("m1"),
    host=st.sampled_from(["alpha", "beta"]),
    phase=phases,
    progress=st.none() | progresses,
    report=st.none() | reports,
)


@settings(deadline=None)
@given(st.lists(updates, max_size=8))
def test_nothing_that_is_shown_falls(told: list[MigrationUpdate]) -> None:
    record = RECORD
    order = list(Phase)
    for update in told:
        after = merged(record, update)
        assert order.index(after.phase) >= order.index(record.phase)
        if record.progress is not None:
            assert after.progress is not None
            assert after.progress.fraction >= record.progress.fraction
            assert after.progress.wire_bytes >= record.progress.wire_bytes
            assert after.progress.elapsed_s >= record.progress.elapsed_s
        assert after.report.wire_bytes >= record.report.wire_bytes
        assert after.report.downtime.load_ms >= record.report.downtime.load_ms
        record = after


@settings(deadline=None)
@given(st.lists(updates, max_size=8))
def test_saying_it_twice_is_saying_it_once(told: list[MigrationUpdate]) -> None:
    once = RECORD
    for update in told:
        once = merged(once, update)
    twice = RECORD
    for update in told:
        twice = merged(merged(twice, update), update)
    assert twice == once


@settings(deadline=None)
@given(updates, updates)
def test_figures_do_not_depend_on_the_order(one: MigrationUpdate, other: MigrationUpdate) -> None:
    forth, back = merged(merged(RECORD, one), other), merged(merged(RECORD, other), one)
    assert forth.phase == back.phase
    assert forth.report == back.report


@pytest.mark.parametrize("field", sorted(MigrationReport.model_fields))
def test_a_report_keeps_each_field_when_the_other_end_knows_nothing(field: str) -> None:
    values: dict[str, object] = {
        "iterations": (
            IterationReport(
                index=0, pages=1, zero_pages=0, wire_bytes=1, duration_ms=1.0, dirty_pages_after=0
            ),
        ),
        "downtime": DowntimeReport(stop_ms=3.0),
        "paging": PagingReport(owed_pages=7),
        "converged": True,
        "order": "some order",
        "switch_reason": "some reason",
    }
    value = values.get(field, 5.0)
    known, nothing = MigrationReport(total_ms=1.0).model_copy(update={field: value}), MigrationReport()
    for joined in (join_reports(known, nothing), join_reports(nothing, known)):
        assert getattr(joined, field) == value


def test_only_the_end_says_done() -> None:
    update = MigrationUpdate(migration="m1", host="beta", phase=Phase.DONE)
    assert merged(RECORD, update).phase is Phase.RUNNING_AT_DESTINATION
    aborted = MigrationUpdate(migration="m1", host="beta", phase=Phase.ABORTED)
    assert merged(RECORD, aborted).phase is Phase.REQUESTED


def test_the_path_is_what_the_source_said_last() -> None:
    first, last = (
        MigrationReport(total_ms=total_ms, paging=PagingReport(path=path))
        for total_ms, path in ((1.0, "10.0.0.2"), (2.0, "10.1.0.2"))
    )
    destination = MigrationReport(paging=PagingReport(complete=True, faults=9))
    for told in permutations((first, last, destination)):
        joined = MigrationReport()
        for report in told:
            joined = join_reports(joined, report)
        assert joined.paging is not None
        assert joined.paging.complete
        assert joined.paging.path == "10.1.0.2"
