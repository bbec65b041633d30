"""Whether the farm could lose a host: its VMs are placed on the others, as they would be. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from transhume.farm.placement import Packing, place_all
from transhume.farm.pool import Pool
from transhume.farm.rules import RuleBook


@dataclass(frozen=True)
class Loss:
    """What losing one host would mean. `stranded` are VMs for which no other host has room, each with why."""

    host: str
    short_bytes: int
    stranded: dict[str, tuple[str, ...]]


def losses(pool: Pool, rules: RuleBook) -> dict[str, Loss]:
    """The loss of each host, one at a time. The pool is as it was afterwards.

    "No" may be wrong by a little where a cleverer packing would fit; "yes" never is.
    """
    return {host: loss(pool, rules, host) for host in pool.hosts}


def loss(pool: Pool, rules: RuleBook, host: str) -> Loss:
    """What it would mean to lose `host` with all that is promised there."""
    others = frozenset(name for name in pool.hosts if name != host)
    lost = pool.promised(host)
    # A VM on the move has its share elsewhere already, and needs no other.
    stranded = [demand for demand in lost if pool.places(demand.vm) == {host}]
    for demand in lost:
        pool.release(demand.vm, host)
    packing = Packing()
    try:
        packing = place_all(pool, rules, stranded, candidates=others)
        return Loss(host, packing.short_bytes, dict(packing.unplaced))
    finally:
        for vm, where in packing.hosts.items():
            pool.release(vm, where)
        for demand in lost:
            pool.promise(demand, host)


def worst(found: dict[str, Loss]) -> Loss | None:
    """The loss that strands most memory, the first by name of equal ones; None: every one can be borne."""
    short = [each for each in found.values() if each.stranded]
    return max(sorted(short, key=lambda each: each.host), key=lambda each: each.short_bytes, default=None)
