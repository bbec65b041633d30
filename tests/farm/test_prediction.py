"""What is foretold of a migration from one sample, and what is learned from earlier ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.farm.prediction import (
    ASSUMED_FIXED_MS,
    ASSUMED_LINK_BYTES_S,
    Experience,
    experience,
    predict,
)
from transhume.model.migration import (
    DowntimeReport,
    IterationReport,
    Migration,
    MigrationOptions,
    MigrationReport,
    OnDeadline,
    Outcome,
)
from transhume.model.orders import DirtySample

MB = 1_000_000
LINK = Experience(link_bytes_s=100.0 * MB, fixed_ms=20.0, measured=True)


def sample(dirty_mb_s: float, populated_mb: float = 1000.0, zero_mb: float = 0.0) -> DirtySample:
    return DirtySample(
        sample_ms=500.0,
        populated_bytes=int(populated_mb * MB),
        zero_bytes=int(zero_mb * MB),
        dirty_bytes=int(dirty_mb_s * MB / 2),
    )


def test_an_idle_guest_takes_one_pass_and_the_fixed_cost() -> None:
    found = predict(sample(0.0, zero_mb=400.0), LINK, MigrationOptions(), 1000 * MB)
    assert found.wire_bytes == 600 * MB
    assert found.total_ms == pytest.approx(6020.0)
    assert found.downtime_ms == pytest.approx(20.0)
    assert found.converges


def test_a_guest_slower_than_the_link_shrinks_to_the_limit() -> None:
    found = predict(sample(10.0), LINK, MigrationOptions(max_downtime_ms=50.0), 1000 * MB)
    # 1000, 100, 10 and 1 MB: the last takes 10 ms of the 30 that the fixed cost leaves.
    assert found.wire_bytes == 1111 * MB
    assert found.downtime_ms == pytest.approx(30.0)
    assert found.converges
    assert "slower than the link's 100 MB/s" in found.verdict


def test_a_guest_faster_than_the_link_is_told_what_it_will_cost() -> None:
    found = predict(sample(210.0, populated_mb=500.0), LINK, MigrationOptions(), 1000 * MB)
    assert not found.converges
    assert found.downtime_ms == pytest.approx(5020.0)
    assert "dirtying 210 MB/s, faster than the link's 100 MB/s" in found.verdict
    assert "does not reach 50 ms" in found.verdict


def test_a_deadline_that_aborts_is_told() -> None:
    options = MigrationOptions(deadline_s=1.0, on_deadline=OnDeadline.ABORT)
    assert "given up at its deadline" in predict(sample(200.0), LINK, options, 1000 * MB).verdict


def test_thresholds_end_it_sooner() -> None:
    loose = MigrationOptions(max_downtime_ms=1.0, threshold_fraction=0.2)
    assert predict(sample(10.0), LINK, loose, 1000 * MB).wire_bytes == 1100 * MB
    pages = MigrationOptions(max_downtime_ms=1.0, threshold_pages=3000)
    assert predict(sample(10.0), LINK, pages, 1000 * MB).wire_bytes == 1110 * MB


def test_the_operators_limit_is_the_rate() -> None:
    options = MigrationOptions(bandwidth_bytes_s=50 * MB)
    found = predict(sample(0.0), Experience(), options, 1000 * MB)
    assert found.total_ms == pytest.approx(20_000 + ASSUMED_FIXED_MS)
    assert "the limit of 50 MB/s" in found.verdict


@settings(deadline=None)
@given(
    dirty=st.integers(0, 1 << 40),
    populated=st.integers(0, 1 << 40),
    zero=st.integers(0, 1 << 40),
    sample_ms=st.floats(0, 1e4),
    rate=st.floats(1.0, 1e12),
)
def test_every_sample_has_an_answer(
    dirty: int, populated: int, zero: int, sample_ms: float, rate: float
) -> None:
    taken = DirtySample(sample_ms=sample_ms, populated_bytes=populated, zero_bytes=zero, dirty_bytes=dirty)
    found = predict(taken, Experience(link_bytes_s=rate), MigrationOptions(), populated)
    assert found.wire_bytes >= 0
    assert found.total_ms >= found.downtime_ms >= ASSUMED_FIXED_MS
    assert found.verdict


def past(source: str, destination: str, created_at_s: float, **options: int) -> Migration:
    first = IterationReport(
        index=0, pages=1, zero_pages=0, wire_bytes=200 * MB, duration_ms=1000.0, dirty_pages_after=0
    )
    return Migration(
        id=f"m{created_at_s:.0f}",
        vm="web",
        source=source,
        destination=destination,
        epoch=1,
        options=MigrationOptions.model_validate(options),
        outcome=Outcome.COMPLETED,
        created_at_s=created_at_s,
        report=MigrationReport(
            iterations=(first.model_copy(update={"duration_ms": 1000.0 * created_at_s}),),
            downtime=DowntimeReport(total_ms=40.0 + created_at_s, last_pages_ms=10.0),
        ),
    )


def test_without_a_past_there_are_assumptions() -> None:
    assert experience([], "alpha", "beta") == Experience(ASSUMED_LINK_BYTES_S, ASSUMED_FIXED_MS, False)
    others = [
        past("alpha", "gamma", 1.0),
        past("alpha", "beta", 1.0).model_copy(update={"outcome": Outcome.FAILED}),
    ]
    assert not experience(others, "alpha", "beta").measured


def test_the_latest_rate_and_the_median_cost_of_the_pair_are_learned() -> None:
    known = experience(
        [
            past("beta", "alpha", 2.0),
            past("alpha", "beta", 1.0),
            past("alpha", "beta", 4.0, bandwidth_bytes_s=1 * MB),
        ],
        "alpha",
        "beta",
    )
    assert known == Experience(link_bytes_s=100.0 * MB, fixed_ms=32.0, measured=True)
