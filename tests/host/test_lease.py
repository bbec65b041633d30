"""When a host without the register stops its strict VMs, and when it lets them go on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transhume.host.lease import Holding, decide

NAMES = st.frozensets(st.sampled_from("abcd"))
HOLDINGS = st.builds(
    Holding,
    answered_s=st.floats(0, 100),
    strict=NAMES,
    running=NAMES,
    held=NAMES,
    moving=NAMES,
)


def holding(**known: frozenset[str]) -> Holding:
    nothing: frozenset[str] = frozenset()
    fields = {"strict": nothing, "running": nothing, "held": nothing, "moving": nothing, **known}
    return Holding(answered_s=100.0, **fields)


def test_only_strict_vms_that_run_and_do_not_move_are_stopped_and_only_after_the_lease() -> None:
    known = holding(
        strict=frozenset("abc"), running=frozenset("abx"), moving=frozenset("b"), held=frozenset()
    )
    assert decide(115.0, known, 15.0).hold == frozenset()
    assert decide(115.1, known, 15.0).hold == frozenset("a")


def test_what_was_stopped_may_go_on_when_the_register_answers() -> None:
    known = holding(strict=frozenset("a"), held=frozenset("ac"), moving=frozenset("c"))
    assert decide(101.0, known, 15.0).let_go == frozenset("a")
    assert decide(116.0, known, 15.0).let_go == frozenset()


@given(HOLDINGS, st.floats(0, 200))
def test_no_vm_is_stopped_and_let_go_at_once_and_no_mover_disturbed(known: Holding, now_s: float) -> None:
    steps = decide(now_s, known, 15.0)
    assert not (steps.hold and steps.let_go)
    assert not (steps.hold | steps.let_go) & known.moving
    assert steps.hold <= known.strict & known.running
    assert steps.let_go <= known.held
