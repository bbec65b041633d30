"""Progress: a bar that never runs backwards, a rate that follows the link, a verdict in words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.migration.events import PassResult
from transhume.migration.policy import STALL_PASSES, Choice, Decision
from transhume.migration.progress import SHARE_BEFORE_THE_END, VERDICTS, ProgressTracker
from transhume.model.migration import MigrationOptions, OnDeadline, Phase, Progress
from transhume.model.vm import PAGE_BYTES

PAGES_S = 25_000
"""About 100 MB/s."""


def clock_of(now_s: float) -> str:
    return f"{now_s:.0f} o'clock"


def tracker(options: MigrationOptions | None = None) -> ProgressTracker:
    return ProgressTracker("m1", "web", options or MigrationOptions(), now_s=100.0)


def look(progress: ProgressTracker, now_s: float, phase: Phase = Phase.PRECOPY) -> Progress:
    return progress.snapshot(phase, now_s, clock_of)


def decision(
    dirty_pages_s: float, remaining_pages: int, converged: bool = False, stalled: bool = False
) -> Decision:
    return Decision(
        choice=Choice.CONTINUE,
        reason="",
        predicted_downtime_s=remaining_pages / PAGES_S,
        rate_bytes_s=PAGES_S * PAGE_BYTES,
        dirty_rate_bytes_s=dirty_pages_s * PAGE_BYTES,
        remaining_pages=remaining_pages,
        converged=converged,
        stalled=stalled,
    )


def result(pages: int, left: int) -> PassResult:
    return PassResult(0, pages, 0, pages * PAGE_BYTES, pages / PAGES_S, left)


def test_before_anything_is_sent_nothing_is_claimed() -> None:
    seen = look(tracker(), 101.0, Phase.REQUESTED)
    assert (seen.migration, seen.vm, seen.phase) == ("m1", "web", Phase.REQUESTED)
    assert seen.elapsed_s == 1.0
    assert seen.fraction == 0.0
    assert seen.wire_bytes == 0
    assert (seen.rate_bytes_s, seen.eta_s, seen.remaining_bytes) == (None, None, None)
    assert seen.predicted_downtime_ms is None
    assert seen.verdict == "waiting for the destination"


def test_a_pass_moves_the_bar() -> None:
    progress = tracker()
    progress.pass_started(0, 100_000)
    progress.sent(25_000, 25_000 * PAGE_BYTES, 101.0)
    seen = look(progress, 101.0)
    assert seen.iteration == 0
    assert seen.wire_bytes == 25_000 * PAGE_BYTES
    assert seen.remaining_bytes == 75_000 * PAGE_BYTES
    assert seen.fraction == pytest.approx(0.225)
    assert seen.rate_bytes_s == pytest.approx(PAGES_S * PAGE_BYTES)
    assert seen.eta_s == pytest.approx(3.0)
    assert seen.verdict == "first pass over the memory"


def test_the_rate_is_that_of_the_latest_seconds() -> None:
    progress = tracker()
    progress.pass_started(0, 1_000_000)
    progress.sent(1000, 1000 * PAGE_BYTES, 110.0)
    progress.sent(1000, 1000 * PAGE_BYTES, 120.0)
    progress.sent(10_000, 10_000 * PAGE_BYTES, 121.0)
    progress.sent(10_000, 10_000 * PAGE_BYTES, 122.0)
    progress.sent(10_000, 10_000 * PAGE_BYTES, 123.0)
    assert look(progress, 123.0).rate_bytes_s == pytest.approx(10_000 * PAGE_BYTES)


def test_what_the_guest_dirtied_is_left_to_send() -> None:
    progress = tracker()
    progress.pass_started(0, 1000)
    progress.sent(1000, 1000 * PAGE_BYTES, 101.0)
    progress.pass_ended(result(1000, left=400), decision(dirty_pages_s=10_000, remaining_pages=400))
    seen = look(progress, 101.0)
    assert seen.remaining_bytes == 400 * PAGE_BYTES
    assert seen.predicted_downtime_ms == pytest.approx(16.0)
    assert seen.dirty_rate_bytes_s == pytest.approx(10_000 * PAGE_BYTES)


def test_the_bar_is_full_only_when_the_vm_runs_there() -> None:
    progress = tracker()
    progress.pass_started(0, 1000)
    progress.sent(1000, 1000 * PAGE_BYTES, 101.0)
    assert look(progress, 101.0, Phase.SUSPENDED).fraction == SHARE_BEFORE_THE_END
    assert look(progress, 102.0, Phase.RUNNING_AT_DESTINATION).fraction == 1.0
    assert look(progress, 103.0, Phase.DONE).fraction == 1.0


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.integers(0, 10_000)),
            st.tuples(st.just("sent"), st.integers(0, 5_000)),
            st.tuples(st.just("end"), st.integers(0, 10_000)),
        ),
        max_size=40,
    )
)
def test_the_bar_never_runs_backwards(steps: list[tuple[str, int]]) -> None:
    progress = tracker()
    before = 0.0
    for index, (step, pages) in enumerate(steps):
        if step == "start":
            progress.pass_started(index, pages)
        elif step == "sent":
            progress.sent(pages, pages * PAGE_BYTES, 100.0 + index / 10)
        else:
            progress.pass_ended(result(1, left=pages), None)
        seen = look(progress, 100.0 + index / 10)
        assert before <= seen.fraction <= SHARE_BEFORE_THE_END
        assert seen.remaining_bytes is None or seen.remaining_bytes >= 0
        before = seen.fraction


def test_a_migration_that_converges_says_so() -> None:
    progress = tracker()
    progress.pass_ended(result(1000, 500), decision(100, 500, converged=True))
    assert look(progress, 101.0).verdict == "converging: about 20 ms of downtime expected"
    progress.pass_ended(result(1000, 5000), decision(100, 5000))
    assert look(progress, 101.0).verdict == "converging: about 200 ms of downtime if it switched now"


def test_a_guest_that_is_faster_than_the_link_is_told_with_what_will_happen() -> None:
    progress = tracker(MigrationOptions(deadline_s=600))
    progress.pass_ended(result(1000, 25_000), decision(dirty_pages_s=50_000, remaining_pages=25_000))
    assert look(progress, 110.0).verdict == (
        "dirtying 205 MB/s, faster than the link's 102 MB/s: "
        f"will switch at {110 + STALL_PASSES} o'clock with about 1,000 ms of downtime"
    )


def test_the_verdict_never_promises_a_switch_after_the_deadline() -> None:
    progress = tracker(MigrationOptions(deadline_s=11))
    progress.pass_ended(result(1000, 25_000), decision(dirty_pages_s=50_000, remaining_pages=25_000))
    assert "will switch at 111 o'clock" in look(progress, 110.0).verdict


def test_a_hard_promise_is_told_with_its_deadline() -> None:
    progress = tracker(MigrationOptions(deadline_s=60, on_deadline=OnDeadline.ABORT))
    progress.pass_ended(result(1000, 25_000), decision(dirty_pages_s=50_000, remaining_pages=25_000))
    assert look(progress, 110.0).verdict.endswith("will give up at 160 o'clock unless it calms down")


@pytest.mark.parametrize("phase", VERDICTS)
def test_every_other_phase_has_a_sentence_of_its_own(phase: Phase) -> None:
    assert look(tracker(), 101.0, phase).verdict == VERDICTS[phase]


def test_qemus_own_numbers_are_shown_for_its_engine() -> None:
    progress = tracker()
    progress.native(
        wire_bytes=1000,
        remaining_bytes=3000,
        dirty_rate_bytes_s=200.0,
        iteration=2,
        expected_downtime_ms=40.0,
        now_s=101.0,
    )
    seen = look(progress, 101.0)
    assert (seen.wire_bytes, seen.remaining_bytes, seen.iteration) == (1000, 3000, 2)
    assert seen.dirty_rate_bytes_s == 200.0
    assert seen.predicted_downtime_ms == 40.0
    assert seen.rate_bytes_s == pytest.approx(1000)
    assert seen.eta_s == pytest.approx(3.0)
    assert seen.fraction == pytest.approx(0.25)
    progress.native(500, 0, 0.0, 3, None, 102.0)
    assert look(progress, 102.0).wire_bytes == 1000
