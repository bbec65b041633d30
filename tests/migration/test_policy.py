"""When the pre-copy ends: each criterion alone, and that it always does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.migration.events import PassResult
from transhume.migration.policy import (
    LOCAL_MINIMUM_PATIENCE_PASSES,
    RATE_SAMPLE_BYTES,
    STALL_PASSES,
    Choice,
    Decision,
    at_local_minimum,
    decide,
    link_rate_bytes_s,
    pace_bytes_s,
    passes_without_progress,
)
from transhume.model.migration import MigrationOptions, Mode, OnDeadline, Rest
from transhume.model.vm import PAGE_BYTES

RAM_PAGES = 262_144
"""1 GiB."""

SLOW = 10.0
"""Seconds a pass of the hand-written examples takes: the link is then far too slow for any downtime limit."""


def passes(*pages: int, duration_s: float = SLOW) -> list[PassResult]:
    """The first number is sent by the first pass; each later one is what a pass left for the next."""
    return [
        PassResult(
            index=index,
            pages=sent,
            zero_pages=0,
            wire_bytes=sent * PAGE_BYTES,
            duration_s=duration_s,
            dirty_pages_after=left,
        )
        for index, (sent, left) in enumerate(pairwise(pages))
    ]


def precopy(**options: Any) -> MigrationOptions:
    """Options of a migration that never leaves pages for after the resume."""
    return MigrationOptions(mode=Mode.PRE_COPY, **options)


def verdict(
    done: list[PassResult],
    options: MigrationOptions | None = None,
    cost_s: float = 0.01,
    elapsed_s: float = 1.0,
    ram_pages: int = RAM_PAGES,
) -> Decision:
    return decide(done, options or precopy(), ram_pages, cost_s, elapsed_s)


# --- the thresholds: claim 13 and the description's example ------------------------------------------


@pytest.mark.parametrize(
    "threshold",
    [{"threshold_pages": 301}, {"threshold_pages": 300}, {"threshold_fraction": 301 / 4096}],
    ids=str,
)
def test_the_patents_example_ends_with_300_pages_under_the_threshold(threshold: dict[str, float]) -> None:
    """4096 pages are sent, 1024 of them modified, then 300; the rest is under the threshold (claim 13)."""
    options = MigrationOptions.model_validate(threshold)
    first = verdict(passes(4096, 1024), options, ram_pages=4096)
    assert first.choice is Choice.CONTINUE
    second = verdict(passes(4096, 1024, 300), options, ram_pages=4096)
    assert second.choice is Choice.SWITCH
    assert second.reason == "the pages left are under the threshold"
    assert second.remaining_pages == 300
    assert not second.converged


def test_the_patents_example_goes_on_over_the_threshold() -> None:
    options = precopy(threshold_pages=299)
    assert verdict(passes(4096, 1024, 300), options, ram_pages=4096).choice is Choice.CONTINUE


def test_pages_that_an_interrupted_pass_did_not_send_count_as_left() -> None:
    interrupted = PassResult(
        index=0,
        pages=96,
        zero_pages=0,
        wire_bytes=96 * PAGE_BYTES,
        duration_s=SLOW,
        dirty_pages_after=100,
        unsent_pages=4000,
    )
    decision = verdict([interrupted], precopy(threshold_pages=4099))
    assert decision.choice is Choice.CONTINUE
    assert decision.remaining_pages == 4100


# --- the predicted downtime --------------------------------------------------------------------------


def test_the_prediction_is_the_pages_left_over_the_rate_plus_the_cost_of_the_switchover() -> None:
    decision = verdict(passes(100_000, 1000, duration_s=1.0), cost_s=0.015)
    assert decision.rate_bytes_s == pytest.approx(100_000 * PAGE_BYTES)
    assert decision.predicted_downtime_s == pytest.approx(0.010 + 0.015)
    assert decision.dirty_rate_bytes_s == pytest.approx(1000 * PAGE_BYTES)


def test_it_switches_when_the_limit_is_met_and_another_pass_gains_nothing() -> None:
    options = precopy(max_downtime_ms=50)
    decision = verdict(passes(100_000, 2000, 1900, duration_s=1.0), options)
    assert decision.converged
    assert decision.choice is Choice.SWITCH
    assert decision.reason == "the predicted downtime is within the limit"


def test_it_polishes_while_each_pass_halves_the_rest() -> None:
    options = precopy(max_downtime_ms=50)
    decision = verdict(passes(100_000, 2000, duration_s=1.0), options)
    assert decision.converged
    assert decision.choice is Choice.CONTINUE
    assert verdict(passes(100_000, 2000, 1000, duration_s=1.0), options).choice is Choice.CONTINUE
    assert verdict(passes(100_000, 2000, 1001, duration_s=1.0), options).choice is Choice.SWITCH


def test_it_does_not_polish_what_costs_next_to_nothing() -> None:
    options = precopy(max_downtime_ms=50)
    assert verdict(passes(100_000, 400, duration_s=1.0), options).choice is Choice.SWITCH


def test_the_cost_of_the_switchover_alone_may_break_the_limit() -> None:
    options = precopy(max_downtime_ms=50)
    decision = verdict(passes(100_000, 1, duration_s=1.0), options, cost_s=0.051)
    assert not decision.converged
    assert decision.choice is Choice.CONTINUE


def test_a_cost_over_the_limit_with_nothing_left_to_send_is_a_stall() -> None:
    empty = passes(100_000, *[0] * (STALL_PASSES + 1), duration_s=1.0)
    assert verdict(empty[:-1], cost_s=1.0).choice is Choice.CONTINUE
    assert verdict(empty, cost_s=1.0).choice is Choice.SWITCH


def test_an_unknown_rate_promises_nothing() -> None:
    """A first pass over nothing but zero pages."""
    nothing_sent = PassResult(
        index=0, pages=0, zero_pages=1000, wire_bytes=0, duration_s=0.5, dirty_pages_after=10
    )
    decision = verdict([nothing_sent])
    assert not decision.converged
    assert decision.choice is Choice.CONTINUE
    nothing_left = PassResult(
        index=0, pages=0, zero_pages=1000, wire_bytes=0, duration_s=0.5, dirty_pages_after=0
    )
    assert verdict([nothing_left]).choice is Choice.SWITCH


# --- the rate ----------------------------------------------------------------------------------------


def test_the_rate_is_the_latest_passes_together() -> None:
    big = PassResult(0, 10_000, 0, RATE_SAMPLE_BYTES * 10, 1.0, 1000)
    small = PassResult(1, 100, 0, RATE_SAMPLE_BYTES // 4, 0.5, 10)
    assert link_rate_bytes_s([big]) == RATE_SAMPLE_BYTES * 10
    assert link_rate_bytes_s([big, small]) == pytest.approx(RATE_SAMPLE_BYTES * 10.25 / 1.5)
    assert link_rate_bytes_s([big, small, small, small, small]) == pytest.approx(RATE_SAMPLE_BYTES / 2)


def test_the_rate_of_nothing_is_zero() -> None:
    assert link_rate_bytes_s([]) == 0.0
    assert link_rate_bytes_s([PassResult(0, 0, 10, 0, 0.0, 0)]) == 0.0


# --- no progress -------------------------------------------------------------------------------------


def test_progress_is_a_tenth_less_than_the_smallest_set_so_far() -> None:
    assert passes_without_progress(passes(1000, 500)) == 0
    assert passes_without_progress(passes(1000, 500, 450)) == 0
    assert passes_without_progress(passes(1000, 500, 451)) == 1
    assert passes_without_progress(passes(1000, 500, 451, 600)) == 2
    assert passes_without_progress(passes(1000, 500, 451, 600, 400)) == 0
    assert passes_without_progress(passes(1000, 0, 0, 0)) == 2


def test_a_stall_switches_at_a_local_minimum() -> None:
    stalled = passes(RAM_PAGES, 50_000, 50_000, 50_000, 50_000)
    decision = verdict(stalled)
    assert decision.stalled
    assert decision.choice is Choice.SWITCH
    assert decision.reason == "no progress any more: at a local minimum of the dirty set"
    assert not decision.converged
    assert verdict(stalled[:-1]).choice is Choice.CONTINUE


def test_a_stall_waits_out_a_peak() -> None:
    peak = passes(RAM_PAGES, 50_000, 50_000, 50_000, 90_000)
    assert not at_local_minimum(peak)
    assert verdict(peak).choice is Choice.CONTINUE
    assert verdict([*peak, *passes(90_000, 51_000)]).choice is Choice.SWITCH


def test_a_stall_does_not_wait_for_ever() -> None:
    rising = [50_000]
    while len(rising) < STALL_PASSES + LOCAL_MINIMUM_PATIENCE_PASSES:
        rising.append(rising[-1] * 6 // 5)
    assert verdict(passes(RAM_PAGES, *rising)).choice is Choice.CONTINUE
    rising.append(rising[-1] * 6 // 5)
    decision = verdict(passes(RAM_PAGES, *rising))
    assert decision.choice is Choice.SWITCH
    assert decision.reason == "no progress any more, and no local minimum of the dirty set in sight"


def test_a_hard_promise_waits_for_the_deadline_instead() -> None:
    options = precopy(on_deadline=OnDeadline.ABORT, max_iterations=5, deadline_s=100)
    stalled = passes(RAM_PAGES, *[50_000] * 20)
    assert verdict(stalled, options, elapsed_s=99).choice is Choice.CONTINUE
    assert verdict(stalled, options, elapsed_s=100).choice is Choice.ABORT


def test_the_number_of_passes_is_limited() -> None:
    options = precopy(max_iterations=4)
    shrinking = passes(RAM_PAGES, 200_000, 150_000, 110_000, 80_000)
    assert verdict(shrinking[:-1], options).choice is Choice.CONTINUE
    decision = verdict(shrinking, options)
    assert decision.choice is Choice.SWITCH
    assert decision.reason == "4 iterations were made, the most that were allowed"


# --- the deadline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_deadline", OnDeadline)
def test_the_deadline_ends_a_migration_that_still_makes_progress(on_deadline: OnDeadline) -> None:
    options = precopy(deadline_s=30, on_deadline=on_deadline)
    done = passes(RAM_PAGES, 100_000, 50_000)
    assert verdict(done, options, elapsed_s=29.9).choice is Choice.CONTINUE
    decision = verdict(done, options, elapsed_s=30)
    assert decision.choice is (Choice.SWITCH if on_deadline is OnDeadline.SWITCH else Choice.ABORT)
    assert "the deadline passed" in decision.reason


def test_a_migration_that_meets_its_limit_at_the_deadline_is_not_aborted() -> None:
    options = precopy(deadline_s=30, on_deadline=OnDeadline.ABORT)
    assert verdict(passes(100_000, 100, duration_s=1.0), options, elapsed_s=40).choice is Choice.SWITCH


# --- it always ends ----------------------------------------------------------------------------------

DIRTY_SETS = st.lists(st.integers(0, RAM_PAGES), min_size=1, max_size=80)
OPTIONS = st.builds(
    MigrationOptions,
    max_downtime_ms=st.floats(0.1, 1000),
    max_iterations=st.integers(1, 60),
    threshold_pages=st.none() | st.integers(0, 1000),
    threshold_fraction=st.none() | st.floats(0, 0.5),
)


def passes_until_the_end(
    dirty_sets: list[int], options: MigrationOptions, cost_s: float, pass_s: float
) -> tuple[int, Choice]:
    """Run the policy over dirty sets (the last one for ever); how many passes it took, and the choice."""
    done: list[PassResult] = []
    pages = RAM_PAGES
    while True:
        left = dirty_sets[min(len(done), len(dirty_sets) - 1)]
        done.append(PassResult(len(done), pages, 0, pages * PAGE_BYTES, pass_s, left))
        pages = left
        choice = decide(done, options, RAM_PAGES, cost_s, len(done) * pass_s).choice
        if choice is not Choice.CONTINUE:
            return len(done), choice


@settings(deadline=None)
@given(DIRTY_SETS, OPTIONS, st.floats(0, 2), st.floats(0.001, 5))
def test_the_number_of_passes_is_bounded_whatever_the_guest_does(
    dirty_sets: list[int], options: MigrationOptions, cost_s: float, pass_s: float
) -> None:
    count, choice = passes_until_the_end(dirty_sets, options, cost_s, pass_s)
    assert choice is Choice.SWITCH
    assert count <= options.max_iterations


@settings(deadline=None)
@given(st.integers(1, RAM_PAGES), st.floats(0.01, 5))
def test_a_guest_that_dirties_the_same_amount_for_ever_is_switched_after_a_stall(
    dirty_pages: int, pass_s: float
) -> None:
    """Long before the most passes are made."""
    count, choice = passes_until_the_end([dirty_pages], precopy(), 0.01, pass_s)
    assert choice is Choice.SWITCH
    assert count <= 2 + STALL_PASSES


@settings(deadline=None)
@given(DIRTY_SETS, st.floats(0, 2), st.floats(0.05, 5))
def test_a_hard_promise_ends_at_the_deadline(dirty_sets: list[int], cost_s: float, pass_s: float) -> None:
    options = precopy(on_deadline=OnDeadline.ABORT, deadline_s=10)
    count, choice = passes_until_the_end(dirty_sets, options, cost_s, pass_s)
    assert (count - 1) * pass_s < 10 + 1e-6
    assert choice in (Choice.SWITCH, Choice.ABORT)


# --- orders of transfer (claims 1 to 13) ---------------------------------------------------------------


@pytest.mark.parametrize("rest", Rest)
def test_so_many_passes_as_were_asked_for_and_then_the_rest(rest: Rest) -> None:
    options = precopy(iterations=2, rest=rest)
    assert verdict(passes(4096, 0), options).choice is Choice.CONTINUE
    decision = verdict(passes(4096, 3000, 2900), options)
    assert decision.choice is Choice.SWITCH
    assert decision.rest is rest


def test_a_stall_does_not_cut_the_passes_that_were_asked_for() -> None:
    done = passes(4096, *[2000] * (STALL_PASSES + 3))
    assert verdict(done).choice is Choice.SWITCH
    assert verdict(done, precopy(iterations=20)).choice is Choice.CONTINUE


def test_hybrid_makes_one_pass() -> None:
    decision = verdict(passes(4096, 4000), MigrationOptions(mode=Mode.HYBRID))
    assert (decision.choice, decision.rest) == (Choice.SWITCH, Rest.BOTH)


def test_hybrid_waits_for_the_threshold_of_pages_left() -> None:
    options = MigrationOptions(mode=Mode.HYBRID, threshold_pages=100)
    assert verdict(passes(4096, 2000), options).choice is Choice.CONTINUE
    decision = verdict(passes(4096, 2000, 100), options)
    assert (decision.choice, decision.rest) == (Choice.SWITCH, Rest.BOTH)


def test_auto_stays_with_pre_copy_while_that_converges() -> None:
    decision = verdict(passes(100_000, 10, duration_s=0.1), MigrationOptions())
    assert (decision.choice, decision.rest) == (Choice.SWITCH, Rest.BEFORE_STATE)


def test_auto_gives_way_when_memory_is_written_faster_than_the_link_carries_it() -> None:
    decision = verdict(passes(100_000, 90_000), MigrationOptions())
    assert (decision.choice, decision.rest) == (Choice.SWITCH, Rest.BOTH)
    assert decision.reason.startswith("memory is written at 37 MB/s and the link carries 41")


def test_auto_gives_way_at_a_stall() -> None:
    decision = verdict(passes(4096, 2000, 2000, 2100, 1950), MigrationOptions())
    assert (decision.choice, decision.rest) == (Choice.SWITCH, Rest.BOTH)


@pytest.mark.parametrize(
    ("on_deadline", "choice"), [(OnDeadline.SWITCH, Choice.SWITCH), (OnDeadline.ABORT, Choice.ABORT)]
)
def test_auto_at_the_deadline(on_deadline: OnDeadline, choice: Choice) -> None:
    options = MigrationOptions(deadline_s=30, on_deadline=on_deadline)
    decision = verdict(passes(4096, 2000, 1000), options, elapsed_s=30)
    assert decision.choice is choice
    assert choice is Choice.ABORT or decision.rest is Rest.BOTH


def test_auto_gives_way_whether_the_memory_is_verified_or_not() -> None:
    assert MigrationOptions(verify=True).may_page
    before, after = (
        verdict(passes(100_000, 90_000), MigrationOptions(verify=verify)) for verify in (False, True)
    )
    assert before == after
    assert after.rest is Rest.BOTH


LIMIT_S = 1.0


def test_more_than_the_residual_limit_is_not_owed() -> None:
    """In the passes of the examples a second carries a few hundred pages."""
    stuck = passes(4096, 2000, 2000, 2100, 1950)
    assert verdict(stuck, MigrationOptions()).rest is Rest.BOTH
    limited = verdict(stuck, MigrationOptions(residual_limit_s=LIMIT_S, on_deadline=OnDeadline.ABORT))
    assert limited.choice is Choice.CONTINUE
    assert verdict(passes(4096, 2000), MigrationOptions(mode=Mode.HYBRID)).choice is Choice.SWITCH
    hybrid = MigrationOptions(mode=Mode.HYBRID, max_downtime_ms=0.001, residual_limit_s=LIMIT_S)
    assert verdict(passes(4096, 2000), hybrid).choice is Choice.CONTINUE
    few = verdict(passes(4096, 2000, 90), hybrid)
    assert (few.choice, few.rest) == (Choice.SWITCH, Rest.BOTH)


def test_what_never_comes_under_the_residual_limit_goes_while_suspended() -> None:
    for mode in (Mode.AUTO, Mode.HYBRID):
        late = verdict(
            passes(4096, 2000, 2000),
            MigrationOptions(mode=mode, deadline_s=30, residual_limit_s=LIMIT_S),
            elapsed_s=30,
        )
        assert (late.choice, late.rest) == (Choice.SWITCH, Rest.BEFORE_STATE)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "post-copy"},
        {"mode": "pre-copy"},
        {"mode": "hybrid", "rest": "on-demand"},
        {"mode": "hybrid", "iterations": 2},
        {"post_copy": False},
    ],
)
def test_a_residual_limit_that_cannot_be_kept_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="residual limit"):
        MigrationOptions(residual_limit_s=1.0, **options)


def test_the_push_may_exceed_the_bandwidth_as_far_as_the_residual_limit_needs_it() -> None:
    slow = MigrationOptions(bandwidth_bytes_s=1 << 20, residual_limit_s=2.0)
    assert pace_bytes_s(slow, 0) == 1 << 20
    assert pace_bytes_s(slow, 256) == 1 << 20
    assert pace_bytes_s(slow, 4096) == 8 << 20
    assert pace_bytes_s(MigrationOptions(bandwidth_bytes_s=1 << 20), 4096) == 1 << 20
    assert pace_bytes_s(MigrationOptions(residual_limit_s=2.0), 4096) is None


def test_a_safe_copy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="owes none"):
        MigrationOptions(mode=Mode.PRE_COPY, safe_dir="/srv/shared")
    with pytest.raises(ValueError, match="safe_dir"):
        MigrationOptions(safe_dir="not/absolute")


def test_auto_without_post_copy_never_gives_way() -> None:
    decision = verdict(passes(100_000, 90_000), MigrationOptions(post_copy=False))
    assert decision.choice is Choice.CONTINUE


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "post-copy", "post_copy": False},
        {"mode": "hybrid", "rest": "before-state"},
        {"mode": "post-copy", "iterations": 1},
        {"rest": "both", "post_copy": False},
        {"mode": "post-copy", "engine": "qemu"},
    ],
)
def test_orders_that_contradict_themselves_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose|leaves pages|no pass"):
        MigrationOptions.model_validate(options)
