"""Pools for tests of what places VMs: made by hand, and at random."""

from __future__ import annotations

from hypothesis import strategies as st

from transhume.farm.pool import Demand, HostRoom, Pool
from transhume.farm.rules import Rule, RuleBook, RuleKind

GIB = 1 << 30

HOSTS = ("alpha", "beta", "gamma", "delta")


def room(name: str, gib: int = 8, cpus: int = 4, **more: object) -> HostRoom:
    base = HostRoom(name=name, cpus=cpus, memory_bytes=gib * GIB)
    return HostRoom(**{**base.__dict__, **more})


def demand(vm: str, gib: int = 1, cpus: int = 1) -> Demand:
    return Demand(vm=vm, memory_bytes=gib * GIB, cpus=cpus)


def pool(*rooms: HostRoom, **vms: tuple[str, int]) -> Pool:
    """`web=("alpha", 2)`: VM web has 2 GiB on alpha."""
    made = Pool(rooms)
    for vm, (host, gib) in vms.items():
        made.promise(demand(vm, gib), host)
    return made


def rule(
    kind: RuleKind, *vms: str, hosts: tuple[str, ...] = (), name: str = "r", prefer: bool = False
) -> Rule:
    return Rule(name=name, kind=kind, vms=vms, hosts=hosts, preferred=prefer)


def promises(made: Pool) -> dict[str, list[Demand]]:
    return {host: made.promised(host) for host in made.hosts}


@st.composite
def rooms(draw: st.DrawFn, least: int = 1) -> list[HostRoom]:
    count = draw(st.integers(least, len(HOSTS)))
    return [
        room(
            name, draw(st.integers(1, 16)), draw(st.integers(1, 4)), reserved_bytes=draw(st.integers(0, GIB))
        )
        for name in HOSTS[:count]
    ]


@st.composite
def demands(draw: st.DrawFn, most: int = 12) -> list[Demand]:
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=most))
    return [demand(f"v{index}", gib, cpus) for index, (gib, cpus) in enumerate(sizes)]


@st.composite
def rule_books(draw: st.DrawFn, vms: list[str]) -> RuleBook:
    made = []
    for index in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(list(RuleKind)))
        members = draw(st.lists(st.sampled_from(vms), min_size=1, max_size=4, unique=True))
        if not kind.names_hosts and len(members) == 1:
            continue
        hosts = draw(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3, unique=True))
        made.append(
            rule(
                kind,
                *members,
                hosts=tuple(hosts) if kind.names_hosts else (),
                name=f"r{index}",
                prefer=draw(st.booleans()),
            )
        )
    return RuleBook(made)
