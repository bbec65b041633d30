"""A drain on paper: every VM once, within the limits, the longest first, the same each time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from tests.farm.pools import GIB, HOSTS, demand, demands, pool, room, rooms, rule, rule_books

from transhume.farm.drain_plan import (
    Leaver,
    expected_sample,
    has_slot,
    next_steps,
    plan_steps,
    total_seconds,
)
from transhume.farm.drain_record import Drain, DrainOptions, DrainStep, StepKind, StepState
from transhume.farm.placement import place_all
from transhume.farm.pool import Demand, HostRoom, Pool
from transhume.farm.prediction import Experience
from transhume.farm.rules import RuleBook, RuleKind
from transhume.model.migration import IterationReport, Migration, MigrationReport, Outcome, Phase, Progress
from transhume.model.orders import DirtySample

OTHERS = frozenset({"beta", "gamma"})
LINK = Experience(link_bytes_s=1e9, fixed_ms=100.0, measured=True)


def known(source: str, destination: str) -> Experience:
    return LINK


def leaver(vm: str, gib: int = 1, kind: StepKind = StepKind.LIVE, **more: object) -> Leaver:
    sample = DirtySample(sample_ms=1000.0, populated_bytes=gib * GIB, zero_bytes=0, dirty_bytes=0)
    base = Leaver(demand=demand(vm, gib), source="alpha", kind=kind, sample=sample)
    return Leaver(**{**base.__dict__, **more})


def farm(*leavers: Leaver, beta: int = 8, gamma: int = 8) -> Pool:
    made = pool(room("alpha", 64), room("beta", beta), room("gamma", gamma))
    for each in leavers:
        if each.kind is StepKind.LIVE:
            made.promise(each.demand, "alpha")
    return made


def planned(
    *leavers: Leaver, rules: RuleBook | None = None, options: DrainOptions | None = None, **sizes: int
) -> dict[str, DrainStep]:
    steps = plan_steps(
        leavers, farm(*leavers, **sizes), rules or RuleBook(), OTHERS, options or DrainOptions(), known
    )
    return {step.vm: step for step in steps}


def test_the_longest_goes_first_and_two_at_once() -> None:
    steps = planned(leaver("small", 1), leaver("large", 4), leaver("middle", 2))
    assert list(steps) == ["large", "middle", "small"]
    assert [step.wave for step in steps.values()] == [1, 1, 2]
    assert [step.destination for step in steps.values()] == ["beta", "gamma", "gamma"]
    assert steps["large"].wire_bytes == 4 * GIB
    assert round(steps["large"].seconds, 6) == round(4 * GIB / 1e9 + 0.1, 6)


def test_limits_for_each_host_and_link_stretch_the_waves() -> None:
    pair = [leaver("a"), leaver("b")]
    options = DrainOptions(parallel=4, per_host=1)
    waves = planned(*pair, options=options, gamma=0)
    assert [step.wave for step in waves.values()] == [1, 2]
    waves = planned(*pair, options=DrainOptions(parallel=4, per_link=1), gamma=0)
    assert [step.wave for step in waves.values()] == [1, 2]
    waves = planned(*pair, options=options)
    assert [step.wave for step in waves.values()] == [1, 1]


def test_what_goes_at_once_shares_the_link() -> None:
    steps = planned(leaver("a", 2), leaver("b", 2))
    alone_s = steps["a"].seconds
    assert 1.9 * alone_s < total_seconds(steps.values()) <= 2 * alone_s


def test_blockers_stay_with_their_reasons_and_count_as_there() -> None:
    book = RuleBook([rule(RuleKind.AFFINITY, "gpu", "friend")])
    steps = planned(leaver("gpu", blockers=("it has a VFIO device",)), leaver("friend"), rules=book)
    assert (steps["gpu"].state, steps["gpu"].reason) == (StepState.BLOCKED, "it has a VFIO device")
    assert steps["friend"].state is StepState.BLOCKED
    assert "rule r keeps friend with gpu (alpha)" in steps["friend"].reason
    [step] = planned(leaver("big", 32)).values()
    assert step.state is StepState.BLOCKED
    assert "beta: big needs 32,768 MiB" in step.reason
    [step] = planned(leaver("a", excluded={"beta": "disk /x is not there"}), gamma=0).values()
    assert "beta: disk /x is not there" in step.reason


def test_a_stopped_vm_needs_no_room_and_is_left_where_its_disks_are() -> None:
    stopped = leaver("old", 32, StepKind.REHOME)
    [step] = planned(stopped).values()
    assert (step.state, step.destination, step.wave, step.wire_bytes) == (StepState.WAITING, "beta", 0, 0)
    excluded = {"beta": "disk /x is not there", "gamma": "disk /x is not there"}
    [step] = planned(leaver("old", 1, StepKind.REHOME, excluded=excluded)).values()
    assert (step.state, step.reason) == (
        StepState.LEFT,
        "beta: disk /x is not there; gamma: disk /x is not there",
    )


def test_one_that_moves_already_is_part_of_the_first_wave() -> None:
    steps = planned(leaver("a", 4), leaver("b"), leaver("x", migration="m1", destination="gamma"))
    assert (steps["x"].state, steps["x"].migration, steps["x"].wave) == (StepState.MOVING, "m1", 1)
    assert [steps["a"].wave, steps["b"].wave] == [1, 2]


def test_what_begins_next_keeps_all_limits() -> None:
    def step(vm: str, destination: str, state: StepState = StepState.WAITING, wave: int = 1) -> DrainStep:
        return DrainStep(vm=vm, source="alpha", destination=destination, state=state, wave=wave)

    steps = (
        step("a", "beta", StepState.MOVING),
        step("d", "beta", wave=3),
        step("c", "beta", wave=2),
        step("b", "gamma", wave=2),
        step("new", ""),
        step("old", "beta", wave=0).model_copy(update={"kind": StepKind.REHOME}),
    )
    drain = Drain(host="alpha", steps=steps, options=DrainOptions(parallel=3, per_host=1))
    busy = {("alpha", "beta"): 1}
    assert [each.vm for each in next_steps(drain, busy)] == ["old", "new", "b"]
    # A move into gamma that somebody else asked for takes its slot.
    assert [each.vm for each in next_steps(drain, {**busy, ("delta", "gamma"): 1})] == ["old", "new"]
    assert not has_slot(steps[3], drain.options, {("delta", "gamma"): 1})
    wide = drain.model_copy(update={"options": DrainOptions(parallel=9, per_link=1)})
    assert [each.vm for each in next_steps(wide, {**busy, ("delta", "gamma"): 1})] == ["old", "new", "b"]


def test_what_a_vm_was_is_expected_of_it_again() -> None:
    assert expected_sample([], "web", GIB).populated_bytes == GIB
    first = IterationReport(
        index=0, pages=1, zero_pages=0, wire_bytes=200 << 20, duration_ms=1, dirty_pages_after=0
    )
    past = Migration(
        id="m1",
        vm="web",
        source="beta",
        destination="alpha",
        epoch=1,
        outcome=Outcome.COMPLETED,
        report=MigrationReport(iterations=(first,)),
        progress=Progress(migration="m1", vm="web", phase=Phase.DONE, elapsed_s=1, dirty_rate_bytes_s=5e6),
    )
    sample = expected_sample([past], "web", GIB)
    assert (sample.populated_bytes, sample.dirty_bytes) == (200 << 20, 5_000_000)
    assert expected_sample([past], "db", GIB).populated_bytes == GIB


@given(
    data=st.data(),
    hosts=rooms(least=2),
    wanted=demands(),
    parallel=st.integers(1, 5),
    per_host=st.none() | st.integers(1, 3),
    per_link=st.none() | st.integers(1, 3),
)
def test_a_plan_moves_every_vm_once_within_the_limits(
    data: st.DataObject,
    hosts: list[HostRoom],
    wanted: list[Demand],
    parallel: int,
    per_host: int | None,
    per_link: int | None,
) -> None:
    book = data.draw(rule_books([each.vm for each in wanted]))
    kinds = {each.vm: data.draw(st.sampled_from(list(StepKind))) for each in wanted}
    blocked = data.draw(st.sets(st.sampled_from([each.vm for each in wanted])))
    options = DrainOptions(parallel=parallel, per_host=per_host, per_link=per_link)
    candidates = frozenset(HOSTS) - {"alpha"}
    leavers = [
        Leaver(
            demand=each,
            source="alpha",
            kind=kinds[each.vm],
            sample=expected_sample([], each.vm, each.memory_bytes),
            blockers=("no",) if each.vm in blocked else (),
        )
        for each in wanted
    ]

    def made() -> tuple[Pool, tuple[DrainStep, ...]]:
        scratch = Pool(hosts)
        for each in leavers:
            if each.kind is StepKind.LIVE:
                scratch.promise(each.demand, "alpha")
        return scratch, plan_steps(leavers, scratch, book, candidates, options, known)

    used, steps = made()
    assert made()[1] == steps
    assert sorted(step.vm for step in steps) == sorted(each.vm for each in wanted)
    assert all(step.reason for step in steps if step.state.over)
    assert all(step.state.over for step in steps if step.vm in blocked)
    going = [step for step in steps if step.state is StepState.WAITING and step.kind is StepKind.LIVE]
    for step in going:
        assert step.destination in candidates
        assert step.wave > 0
        assert book.broken(step.vm, step.destination, used) == []
    for host in hosts[1:]:
        held = used.promised(host.name)
        assert sum(each.memory_bytes for each in held) <= host.usable_bytes
    for wave in {step.wave for step in going}:
        at_once = [step for step in going if step.wave == wave]
        assert len(at_once) <= parallel
        assert max(Counter(step.destination for step in at_once).values()) <= (per_host or parallel)
        assert max(Counter((step.source, step.destination) for step in at_once).values()) <= (
            per_link or parallel
        )
    numbers = {step.wave for step in going}
    assert numbers == set(range(1, len(numbers) + 1))


@given(hosts=rooms(least=2), wanted=demands())
def test_a_vm_without_rules_is_blocked_only_where_packing_finds_no_room(
    hosts: list[HostRoom], wanted: list[Demand]
) -> None:
    leavers = [
        Leaver(each, "alpha", StepKind.LIVE, expected_sample([], each.vm, each.memory_bytes))
        for each in wanted
    ]
    candidates = frozenset(HOSTS) - {"alpha"}
    steps = plan_steps(leavers, Pool(hosts), RuleBook(), candidates, DrainOptions(), known)
    packing = place_all(Pool(hosts), RuleBook(), wanted, candidates=candidates)
    assert {step.vm for step in steps if step.state.over} == packing.unplaced.keys()
