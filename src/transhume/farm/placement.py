"""Which host for a VM: each host that will not do is told with its reason, the best of the others is taken.

Pure, and the same for a VM that is new, started, moved or drained. The best host is the one that the
preferred rules speak least against, then the one with most memory left. Many VMs at once are placed as bins
are packed: the hardest to place first, each on the roomiest host; where that leaves some over, each where it
fits most tightly is tried too, and the packing that leaves less memory over is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from transhume.farm.pool import Demand, HostRoom, Pool
from transhume.farm.rules import RuleBook
from transhume.model.host import HostState

Unit = tuple[Demand, ...]
"""VMs that go to one host together, or one VM."""

Excluded = Callable[[str, str], str]
"""Why a VM may not go to a host, besides what the pool and the rules know; empty: it may."""


@dataclass(frozen=True)
class Choice:
    """Where a VM goes. `host` is empty when no host will do; `against`: all reasons of those that will
    not.
    """

    host: str
    against: Mapping[str, tuple[str, ...]]

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each host that will not do."""
        return tuple(f"{host}: {'; '.join(reasons)}" for host, reasons in sorted(self.against.items()))


@dataclass
class Packing:
    """What came of placing many: the host of each VM, and why the others have none."""

    hosts: dict[str, str] = field(default_factory=dict)
    unplaced: dict[str, tuple[str, ...]] = field(default_factory=dict)
    short_bytes: int = 0


def nothing_excluded(vm: str, host: str) -> str:
    """For whoever knows no further reason."""
    return ""


def choose(
    pool: Pool,
    rules: RuleBook,
    unit: Unit,
    candidates: Iterable[str] | None = None,
    excluded: Excluded = nothing_excluded,
) -> Choice:
    """The best of `candidates` (all hosts without them). The pool is as it was afterwards.

    What is promised to the VMs of the unit already does not count against a host.
    """
    names = sorted(pool.hosts if candidates is None else candidates)
    against: dict[str, tuple[str, ...]] = {}
    fit: list[tuple[int, int, str]] = []
    for name in names:
        reasons = reasons_against(pool, rules, unit, name, excluded)
        if reasons:
            against[name] = reasons
        else:
            fit.append((_disliked(pool, rules, unit, name), -pool.left_bytes(name), name))
    return Choice(min(fit)[2] if fit else "", against)


def reasons_against(
    pool: Pool, rules: RuleBook, unit: Unit, host: str, excluded: Excluded = nothing_excluded
) -> tuple[str, ...]:
    """Every reason why `host` cannot have the VMs of the unit, in words; none when it can."""
    room = pool.hosts.get(host)
    if room is None:
        return (f"the farm has no host {host}",)
    reasons = [*_closed(room), *_too_little(pool, unit, room)]
    for demand in unit:
        reasons += _unfit(demand, room)
        if told := excluded(demand.vm, host):
            reasons.append(told)
    return (*reasons, *_broken(pool, rules, unit, host))


def place_all(
    pool: Pool,
    rules: RuleBook,
    demands: Iterable[Demand],
    excluded: Excluded = nothing_excluded,
    candidates: frozenset[str] | None = None,
) -> Packing:
    """Place many VMs, none of which may be promised anything yet, and promise each its share.

    Those for which there is no room are left out, each with its reasons.
    """
    units = _hardest_first(pool, rules, demands)
    roomy = _pack(pool, rules, units, excluded, candidates, tight=False)
    if not roomy.unplaced:
        return roomy
    _undo(pool, roomy)
    tight = _pack(pool, rules, units, excluded, candidates, tight=True)
    if (tight.short_bytes, len(tight.unplaced)) < (roomy.short_bytes, len(roomy.unplaced)):
        return tight
    _undo(pool, tight)
    return _pack(pool, rules, units, excluded, candidates, tight=False)


def _pack(
    pool: Pool,
    rules: RuleBook,
    units: list[Unit],
    excluded: Excluded,
    candidates: frozenset[str] | None,
    tight: bool,
) -> Packing:
    packing = Packing()
    for unit in units:
        needed_bytes = sum(demand.memory_bytes for demand in unit)
        order = pool.tightest_first(needed_bytes) if tight else pool.roomiest_first()
        host = _first_fit(pool, rules, unit, _among(order, candidates), excluded, tight)
        if host:
            for demand in unit:
                pool.promise(demand, host)
                packing.hosts[demand.vm] = host
            continue
        packing.short_bytes += needed_bytes
        reasons = choose(pool, rules, unit, candidates, excluded).reasons
        packing.unplaced.update((demand.vm, reasons) for demand in unit)
    return packing


def _first_fit(
    pool: Pool, rules: RuleBook, unit: Unit, order: Iterator[str], excluded: Excluded, tight: bool
) -> str:
    """The first host that will do; with preferred rules, the first of those they speak least against."""
    picky = any(rules.prefers(demand.vm) for demand in unit)
    best, least = "", -1
    needed_bytes = sum(demand.memory_bytes for demand in unit)
    for host in order:
        if pool.left_bytes(host) < needed_bytes:
            if tight:
                continue
            break  # the roomiest come first: no later one has more
        if reasons_against(pool, rules, unit, host, excluded):
            continue
        disliked = _disliked(pool, rules, unit, host) if picky else 0
        if not disliked:
            return host
        if least < 0 or disliked < least:
            best, least = host, disliked
    return best


def _hardest_first(pool: Pool, rules: RuleBook, demands: Iterable[Demand]) -> list[Unit]:
    """Those with fewest hosts to go to first, then the largest."""
    by_vm = {demand.vm: demand for demand in demands}
    units = [tuple(by_vm[vm] for vm in group) for group in rules.together(by_vm)]

    def hardness(unit: Unit) -> tuple[int, int, str]:
        choices = min(
            len(rules.allowed(demand.vm, pool.hosts)) if rules.of(demand.vm) else len(pool.hosts)
            for demand in unit
        )
        return choices, -sum(demand.memory_bytes for demand in unit), unit[0].vm

    return sorted(units, key=hardness)


def _among(order: Iterator[str], candidates: frozenset[str] | None) -> Iterator[str]:
    return order if candidates is None else (host for host in order if host in candidates)


def _undo(pool: Pool, packing: Packing) -> None:
    for vm, host in packing.hosts.items():
        pool.release(vm, host)


def _closed(room: HostRoom) -> list[str]:
    reasons = []
    if room.fenced:
        reasons.append(f"{room.name} is fenced; it comes back by itself once it is switched on")
    elif room.silent:
        reasons.append(f"{room.name} was not heard from lately; start its daemon with `transhume up`")
    if room.state is HostState.DRAINING:
        reasons.append(f"{room.name} is being drained")
    if room.state is HostState.MAINTENANCE:
        reasons.append(f"{room.name} is in maintenance; `transhume undrain {room.name}` ends that")
    return reasons


def _too_little(pool: Pool, unit: Unit, room: HostRoom) -> list[str]:
    """What is missing on a host, with the numbers."""
    new = [demand for demand in unit if not pool.has(demand.vm, room.name)]
    needed_bytes, cpus = sum(demand.memory_bytes for demand in new), sum(demand.cpus for demand in new)
    reasons = []
    left_bytes, left_cpus = pool.left_bytes(room.name), pool.left_cpus(room.name)
    if needed_bytes > left_bytes:
        reasons.append(
            f"{_named(new)} {_mib(needed_bytes)} MiB; {room.name} has {_mib(max(0, left_bytes))} MiB left of "
            f"{_mib(room.memory_bytes)} ({_mib(room.reserved_bytes)} are its own, "
            f"{_mib(pool.promised_bytes(room.name))} promised)"
        )
    if cpus > left_cpus:
        reasons.append(
            f"{_named(new)} {cpus} vCPUs; {room.name} has {max(0, left_cpus)} left of {room.usable_cpus} "
            f"({room.cpus} CPUs, each promised {room.cpu_overcommit:g} times)"
        )
    return reasons


def _unfit(demand: Demand, room: HostRoom) -> list[str]:
    reasons = []
    if demand.kvm and room.kvm_obstacle:
        reasons.append(f"{demand.vm} runs under KVM and {room.name} cannot: {room.kvm_obstacle}")
    if (
        demand.machine_type
        and room.machine_types is not None
        and demand.machine_type not in room.machine_types
    ):
        reasons.append(f"the QEMU of {room.name} does not know the machine type {demand.machine_type}")
    return reasons


def _broken(pool: Pool, rules: RuleBook, unit: Unit, host: str) -> list[str]:
    """Rules against the unit on a host, among its own VMs too."""
    told: list[str] = []
    placed: list[str] = []
    names = frozenset(demand.vm for demand in unit)
    try:
        for demand in unit:
            if rules.of(demand.vm):
                told += rules.broken(demand.vm, host, pool, names - frozenset(placed) - {demand.vm})
            if len(unit) > 1 and not pool.has(demand.vm, host):
                pool.promise(demand, host)
                placed.append(demand.vm)
    finally:
        for vm in placed:
            pool.release(vm, host)
    return told


def _disliked(pool: Pool, rules: RuleBook, unit: Unit, host: str) -> int:
    names = frozenset(demand.vm for demand in unit)
    return sum(rules.disliked(demand.vm, host, pool, names - {demand.vm}) for demand in unit)


def _named(unit: Iterable[Demand]) -> str:
    names = [demand.vm for demand in unit]
    return f"{names[0]} needs" if len(names) == 1 else f"{', '.join(names)} together need"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20:,}"
