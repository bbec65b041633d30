"""Rules that nothing can satisfy, found before they are made. Pure.

What is refused holds whatever runs: affinity against anti-affinity, VMs that pins leave no host, more VMs
to keep apart than there are hosts for them. What depends on the moment is only warned of.
"""

from __future__ import annotations

from collections.abc import Mapping

from transhume.farm.pool import Demand, Pool
from transhume.farm.rules import Bound, RuleBook, RuleKind


def contradictions(book: RuleBook, rule: str, hosts: frozenset[str]) -> list[str]:
    """Why the rule named `rule` cannot hold beside the others of the book, in sentences."""
    bound = next(each for each in book.bound if each.rule.name == rule)
    if bound.rule.preferred:
        return []
    groups = _groups(book)
    concerned = {groups[vm] for vm in bound.vms}
    told = [words for group in sorted(concerned) for words in _apart_and_together(book, group)]
    told += [words for group in sorted(concerned) if (words := _without_host(book, group, hosts))]
    if told:
        return told
    apart = [each for each in _hard(book, RuleKind.ANTI_AFFINITY) if _share(each, concerned)]
    return [words for each in apart if (words := _too_many(book, each, groups, hosts))]


def warnings(book: RuleBook, rule: str, pool: Pool, demands: Mapping[str, Demand]) -> list[str]:
    """What somebody should know of a rule that can hold: what breaks it now, and what is too large for it."""
    bound = next(each for each in book.bound if each.rule.name == rule)
    broken = book.broken_now(pool).get(rule)
    told = [f"it is broken now: {broken}"] if broken else []
    if not bound.vms:
        told.append(f"no VM carries {', '.join(bound.rule.vms)} yet: it concerns nobody")
    elif bound.rule.kind.names_hosts and not bound.hosts:
        told.append(f"no host carries {', '.join(bound.rule.hosts)} yet: its VMs can be nowhere")
    groups = _groups(book)
    for group in sorted({groups[vm] for vm in bound.vms}):
        needed_bytes = sum(demands[vm].memory_bytes for vm in group if vm in demands)
        allowed = _allowed(book, group, frozenset(pool.hosts))
        largest_bytes = max((pool.hosts[host].usable_bytes for host in allowed), default=0)
        if allowed and needed_bytes > largest_bytes:
            told.append(
                f"{', '.join(group)} would need {needed_bytes >> 20:,} MiB, and the largest host it may be "
                f"on gives {largest_bytes >> 20:,} MiB"
            )
    return told


def _groups(book: RuleBook) -> dict[str, tuple[str, ...]]:
    """Each VM that a rule is about, with those that affinity keeps it with."""
    vms = {vm for bound in book.bound for vm in bound.vms}
    return {vm: group for group in book.together(vms) for vm in group}


def _hard(book: RuleBook, kind: RuleKind) -> list[Bound]:
    return [bound for bound in book.bound if bound.rule.kind is kind and not bound.rule.preferred]


def _share(bound: Bound, groups: set[tuple[str, ...]]) -> bool:
    return any(bound.vms & set(group) for group in groups)


def _apart_and_together(book: RuleBook, group: tuple[str, ...]) -> list[str]:
    return [
        f"{' and '.join(both[:2])} must be on one host by affinity, and rule {bound.rule.name} keeps them "
        "apart"
        for bound in _hard(book, RuleKind.ANTI_AFFINITY)
        if len(both := sorted(bound.vms & set(group))) > 1
    ]


def _without_host(book: RuleBook, group: tuple[str, ...], hosts: frozenset[str]) -> str:
    if _allowed(book, group, hosts):
        return ""
    names = sorted(
        {
            bound.rule.name
            for vm in group
            for bound in book.of(vm)
            if bound.rule.kind.names_hosts and not bound.rule.preferred
        }
    )
    if not names or all(not bound.hosts for vm in group for bound in book.of(vm) if bound.rule.name in names):
        # Pinned to a label that no host carries yet: that is told as a warning.
        return ""
    return f"rules leave no host to {', '.join(group)} ({', '.join(names)})"


def _allowed(book: RuleBook, group: tuple[str, ...], hosts: frozenset[str]) -> frozenset[str]:
    left = hosts
    for vm in group:
        left &= book.allowed(vm, hosts)
    return left


def _too_many(
    book: RuleBook, bound: Bound, groups: Mapping[str, tuple[str, ...]], hosts: frozenset[str]
) -> str:
    """Whether each VM that is kept apart can have a host of its own: a matching of groups with hosts."""
    apart = sorted({groups[vm] for vm in bound.vms})
    choices = {group: sorted(_allowed(book, group, hosts)) for group in apart}
    held: dict[str, tuple[str, ...]] = {}

    def find(group: tuple[str, ...], seen: set[str]) -> bool:
        for host in choices[group]:
            if host in seen:
                continue
            seen.add(host)
            if host not in held or find(held[host], seen):
                held[host] = group
                return True
        return False

    matched = sum(find(group, set()) for group in apart)
    if matched == len(apart):
        return ""
    among = {host for group in apart for host in choices[group]}
    return (
        f"rule {bound.rule.name} keeps {len(apart)} VMs apart, and the {len(among)} hosts that they may be "
        f"on have room for {matched} such; `--prefer` keeps apart as many as can be"
    )
