"""A drain on paper: which VM goes where, in which order, in which wave, and what that takes. Pure.

A wave is what goes at once within the limits; the next VM begins as soon as one has ended, so waves tell the
order and the time, not a rhythm. What takes longest begins first, which ends the whole soonest. Bytes and
seconds come from what earlier migrations measured: between the same hosts, and of the same VM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from transhume.farm.drain_record import Drain, DrainOptions, DrainStep, StepKind, StepState
from transhume.farm.placement import Packing, choose, place_all
from transhume.farm.pool import Demand, Pool
from transhume.farm.prediction import Experience, predict
from transhume.farm.rules import RuleBook
from transhume.model.migration import Migration, MigrationOptions, Outcome
from transhume.model.orders import DirtySample

REHOME_S = 0.1
"""What giving a stopped VM to another host takes: a few requests and a transaction."""

Known = Callable[[str, str], Experience]
"""What earlier migrations between two hosts measured."""


@dataclass(frozen=True)
class Leaver:
    """A VM that is to go. `blockers` hold wherever it would go, `excluded` for the hosts named.

    `migration` is the one under way that takes it to `destination` already, or empty.
    """

    demand: Demand
    source: str
    kind: StepKind
    sample: DirtySample
    blockers: tuple[str, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    migration: str = ""
    destination: str = ""


def plan_steps(
    leavers: Iterable[Leaver],
    pool: Pool,
    rules: RuleBook,
    candidates: frozenset[str],
    options: DrainOptions,
    known: Known,
) -> tuple[DrainStep, ...]:
    """Each VM once: with its host and its wave, or with why it stays. Uses the pool up.

    VMs without a host that will do are blocked; stopped ones are left where they are instead.
    """
    by_vm = {each.demand.vm: each for each in sorted(leavers, key=lambda each: each.demand.vm)}
    going = {vm: each for vm, each in by_vm.items() if not each.blockers and not each.migration}
    for vm, each in going.items():
        pool.release(vm, each.source)

    def excluded(vm: str, host: str) -> str:
        return by_vm[vm].excluded.get(host, "")

    live = [each.demand for each in going.values() if each.kind is StepKind.LIVE]
    packing = place_all(pool, rules, live, excluded, candidates)
    stopped = [each.demand for each in going.values() if each.kind is StepKind.REHOME]
    _place_stopped(pool, rules, stopped, excluded, candidates, packing)
    steps = [_step(each, packing, options.migration, known) for each in by_vm.values()]
    return _in_waves(steps, options)


def next_steps(drain: Drain, busy: Mapping[tuple[str, str], int]) -> list[DrainStep]:
    """The waiting VMs that may begin now, in order. `busy` counts the moves under way, this drain's among
    them, by source and destination.

    One that has no destination yet counts towards `parallel` alone; its own is checked when it is chosen.
    """
    options, moving = drain.options, len(drain.moving)
    links = Counter(busy)
    found = []
    for step in sorted(drain.waiting, key=lambda step: (step.kind is StepKind.LIVE, step.wave, step.vm)):
        if step.kind is StepKind.LIVE:
            if moving >= options.parallel or not has_slot(step, options, links):
                continue
            moving += 1
            links[step.source, step.destination] += 1
        found.append(step)
    return found


def has_slot(step: DrainStep, options: DrainOptions, busy: Mapping[tuple[str, str], int]) -> bool:
    """Whether the limits of the destination and of the link let one VM more through."""
    if not step.destination:
        return True
    to_host = sum(count for (_, host), count in busy.items() if host == step.destination)
    on_link = busy.get((step.source, step.destination), 0)
    most_to_host, most_on_link = options.per_host or options.parallel, options.per_link or options.parallel
    return to_host < most_to_host and on_link < most_on_link


def expected_sample(past: Sequence[Migration], vm: str, memory_bytes: int) -> DirtySample:
    """What a look at a VM would find, from its own last migration; all of its memory if there was none."""
    own = [each for each in past if each.vm == vm and each.outcome is Outcome.COMPLETED]
    latest = max(own, key=lambda each: each.created_at_s, default=None)
    populated_bytes, dirty_bytes_s = memory_bytes, 0.0
    if latest is not None:
        first = [each.wire_bytes for each in latest.report.iterations[:1] if each.wire_bytes]
        populated_bytes = min([memory_bytes, *first])
        progress = latest.progress
        dirty_bytes_s = (progress.dirty_rate_bytes_s or 0.0) if progress is not None else 0.0
    return DirtySample(
        sample_ms=1000.0, populated_bytes=populated_bytes, zero_bytes=0, dirty_bytes=round(dirty_bytes_s)
    )


def total_seconds(steps: Iterable[DrainStep]) -> float:
    """What the waves take one after the other. In a wave all share the way out of their host, so it takes as
    long as its bytes at the best rate that any of them has, and at least as long as its longest.
    """
    waves: dict[int, list[DrainStep]] = {}
    for step in steps:
        if step.state in (StepState.WAITING, StepState.MOVING):
            waves.setdefault(step.wave, []).append(step)
    total_s = 0.0
    for wave in waves.values():
        rates = [step.wire_bytes / step.seconds for step in wave if step.seconds > 0 and step.wire_bytes]
        shared_s = sum(step.wire_bytes for step in wave) / max(rates) if rates else 0.0
        total_s += max([shared_s, *(step.seconds for step in wave)])
    return total_s


def _place_stopped(
    pool: Pool,
    rules: RuleBook,
    demands: list[Demand],
    excluded: Callable[[str, str], str],
    candidates: frozenset[str],
    packing: Packing,
) -> None:
    """Stopped VMs take what room is left, and need none: they find some when they are started."""
    roomy = place_all(pool, rules, demands, excluded, candidates)
    packing.hosts.update(roomy.hosts)
    for demand in demands:
        if demand.vm in roomy.unplaced:
            choice = choose(pool, rules, (demand.at_rest(),), candidates, excluded)
            if choice.host:
                packing.hosts[demand.vm] = choice.host
            else:
                packing.unplaced[demand.vm] = choice.reasons


def _step(each: Leaver, packing: Packing, options: MigrationOptions, known: Known) -> DrainStep:
    vm = each.demand.vm
    step = DrainStep(vm=vm, kind=each.kind, source=each.source, memory_bytes=each.demand.memory_bytes)
    if each.migration:
        update = {"state": StepState.MOVING, "migration": each.migration, "destination": each.destination}
        return _predicted(step.model_copy(update=update), each, options, known)
    stays = StepState.LEFT if each.kind is StepKind.REHOME else StepState.BLOCKED
    if each.blockers:
        return step.model_copy(update={"state": stays, "reason": "; ".join(each.blockers)})
    if vm not in packing.hosts:
        reasons = packing.unplaced.get(vm) or ("the farm has no other host",)
        return step.model_copy(update={"state": stays, "reason": "; ".join(reasons)})
    step = step.model_copy(update={"destination": packing.hosts[vm]})
    if each.kind is StepKind.REHOME:
        return step.model_copy(update={"seconds": REHOME_S})
    return _predicted(step, each, options, known)


def _predicted(step: DrainStep, each: Leaver, options: MigrationOptions, known: Known) -> DrainStep:
    told = predict(each.sample, known(step.source, step.destination), options, each.demand.memory_bytes)
    return step.model_copy(update={"wire_bytes": told.wire_bytes, "seconds": told.total_ms / 1000})


def _in_waves(steps: Sequence[DrainStep], options: DrainOptions) -> tuple[DrainStep, ...]:
    """Numbers for the waves: what goes first, the longest first; stopped VMs and those that stay have
    none.
    """
    left = sorted(
        (step for step in steps if step.state is StepState.WAITING and step.kind is StepKind.LIVE),
        key=lambda step: (-step.seconds, step.vm),
    )
    numbered = {step.vm: 1 for step in steps if step.state is StepState.MOVING}
    busy = Counter((step.source, step.destination) for step in steps if step.state is StepState.MOVING)
    wave = 1
    while left:
        kept = []
        for step in left:
            if sum(busy.values()) < options.parallel and has_slot(step, options, busy):
                busy[step.source, step.destination] += 1
                numbered[step.vm] = wave
            else:
                kept.append(step)
        left = kept
        wave, busy = wave + 1, Counter()
    order = [step.model_copy(update={"wave": numbered.get(step.vm, 0)}) for step in steps]
    return tuple(sorted(order, key=lambda step: (step.wave, -step.seconds, step.vm)))
