"""A pace is kept; time is only ever an argument."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from transhume.migration.transfer.pace import Pace

BURST_S = 0.05


def test_no_limit_never_waits() -> None:
    pace = Pace(None)
    assert pace.delay_s(0.0, 1 << 40) == 0.0
    assert pace.step_bytes(1000) == 1000


def test_the_wait_is_what_the_bytes_take() -> None:
    pace = Pace(1000.0)
    assert pace.delay_s(0.0, 50) == 0.0  # within the burst
    assert pace.delay_s(0.0, 100) == 0.1
    assert round(pace.delay_s(0.1, 100), 9) == 0.1


def test_unused_time_is_not_saved_up() -> None:
    pace = Pace(1000.0)
    pace.delay_s(0.0, 1)
    assert round(pace.delay_s(1000.0, 1000), 9) == round(1 - BURST_S, 9)


def test_the_rate_may_change() -> None:
    pace = Pace(1000.0)
    pace.rate_bytes_s = 10.0
    assert round(pace.delay_s(0.0, 10), 9) == round(1 - BURST_S, 9)
    pace.rate_bytes_s = None
    assert pace.delay_s(0.0, 10) == 0.0


def test_steps_are_short_in_time() -> None:
    assert Pace(1000.0).step_bytes(1 << 20) == 50
    assert Pace(1e12).step_bytes(1 << 20) == 1 << 20


@settings(deadline=None)
@given(
    st.floats(1e3, 1e10),
    st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(0, 2)), min_size=1, max_size=50),
)
def test_the_rate_is_never_exceeded_by_more_than_a_burst(
    rate_bytes_s: float, steps: list[tuple[int, float]]
) -> None:
    """However long each step takes, all bytes sent by any time fit the rate, but for one burst and step."""
    pace = Pace(rate_bytes_s)
    now_s, sent_bytes = 100.0, 0
    for step_bytes, took_s in steps:
        now_s += took_s
        sent_bytes += step_bytes
        now_s += pace.delay_s(now_s, step_bytes)
        allowed = rate_bytes_s * (now_s - 100.0 + BURST_S)
        assert sent_bytes <= allowed * (1 + 1e-6) + 1


@settings(deadline=None)
@given(st.floats(1e4, 1e9), st.integers(1, 200))
def test_the_rate_is_reached(rate_bytes_s: float, count: int) -> None:
    """A sender that is never slower than the pace is not held back below it."""
    pace = Pace(rate_bytes_s)
    step_bytes = int(rate_bytes_s / 100)
    now_s = 0.0
    for _ in range(count):
        now_s += pace.delay_s(now_s, step_bytes)
    assert now_s <= count * step_bytes / rate_bytes_s + 1e-6
