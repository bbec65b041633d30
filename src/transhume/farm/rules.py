"""Rules about which VM may be where: affinity, anti-affinity, pins. Pure.

A rule names VMs and hosts, each by its name or by a label (`@db`: whatever carries the label `db`). Only VMs
that are promised a share of a host count: a stopped one is neither with nor apart from anybody. A preferred
rule is never a reason against a host; it only makes others better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from transhume.farm.pool import Pool
from transhume.model.vm import NAME_PATTERN

SELECTOR_PATTERN = r"^@?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""A name, or a label behind an `@`: labels are written as names are."""

Selector = Annotated[str, StringConstraints(pattern=SELECTOR_PATTERN)]

MAX_SELECTORS = 200


class RuleKind(StrEnum):
    """What a rule demands."""

    AFFINITY = "affinity"
    ANTI_AFFINITY = "anti-affinity"
    PIN = "pin"
    AVOID = "avoid"

    @property
    def names_hosts(self) -> bool:
        return self in (RuleKind.PIN, RuleKind.AVOID)


class Rule(BaseModel):
    """One rule. `vms` and `hosts` are names, or labels behind an `@`.

    Affinity keeps the VMs on one host, anti-affinity no two of them on the same; a pin keeps each on one of
    the hosts, `avoid` off all of them. `preferred`: only if it can be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    kind: RuleKind
    vms: tuple[Selector, ...] = Field(min_length=1, max_length=MAX_SELECTORS)
    hosts: tuple[Selector, ...] = Field(default=(), max_length=MAX_SELECTORS)
    preferred: bool = False

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Rule:
        if self.kind.names_hosts and not self.hosts:
            raise ValueError(f"a rule of the kind {self.kind} names hosts: add --host")
        if not self.kind.names_hosts and self.hosts:
            raise ValueError(f"a rule of the kind {self.kind} is about VMs alone: leave the hosts out")
        if not self.kind.names_hosts and len(set(self.vms)) == 1 and not self.vms[0].startswith("@"):
            raise ValueError(f"a rule of the kind {self.kind} needs two VMs, or a label")
        return self


@dataclass(frozen=True)
class Bound:
    """A rule with its labels looked up."""

    rule: Rule
    vms: frozenset[str]
    hosts: frozenset[str]


class RuleBook:
    """All rules of a farm, ready to be asked about one VM and one host."""

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        vm_labels: Mapping[str, Iterable[str]] | None = None,
        host_labels: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        vms_by_label, hosts_by_label = _by_label(vm_labels or {}), _by_label(host_labels or {})
        self.bound = tuple(
            Bound(rule, _members(rule.vms, vms_by_label), _members(rule.hosts, hosts_by_label))
            for rule in sorted(rules, key=lambda rule: rule.name)
        )
        self._of_vm: dict[str, list[Bound]] = {}
        for bound in self.bound:
            for vm in bound.vms:
                self._of_vm.setdefault(vm, []).append(bound)

    def of(self, vm: str) -> list[Bound]:
        """The rules about a VM, by their names."""
        return self._of_vm.get(vm, [])

    def broken(self, vm: str, host: str, pool: Pool, besides: frozenset[str] = frozenset()) -> list[str]:
        """Each rule that would be broken with the VM on `host`, in a sentence. `besides` are VMs that come
        along: where those are now does not matter.
        """
        return [
            words
            for bound in self.of(vm)
            if not bound.rule.preferred and (words := _broken(bound, vm, host, pool, besides))
        ]

    def disliked(self, vm: str, host: str, pool: Pool, besides: frozenset[str] = frozenset()) -> int:
        """How much the preferred rules speak against `host`: one for a pin, one for each VM of the others."""
        count = 0
        for bound in self.of(vm):
            if bound.rule.preferred:
                count += len(_against(bound, vm, host, pool, besides))
        return count

    def prefers(self, vm: str) -> bool:
        """Whether a preferred rule is about the VM."""
        return any(bound.rule.preferred for bound in self.of(vm))

    def together(self, vms: Iterable[str]) -> list[tuple[str, ...]]:
        """The VMs in groups that affinity keeps on one host, most VMs alone; in the order of first names."""
        leader = {vm: vm for vm in sorted(vms)}

        def root(vm: str) -> str:
            while leader[vm] != vm:
                vm = leader[vm]
            return vm

        for bound in self.bound:
            if bound.rule.kind is not RuleKind.AFFINITY or bound.rule.preferred:
                continue
            here = sorted(bound.vms & leader.keys())
            for vm in here[1:]:
                first, second = sorted((root(here[0]), root(vm)))
                leader[second] = first
        groups: dict[str, list[str]] = {}
        for vm in leader:
            groups.setdefault(root(vm), []).append(vm)
        return [tuple(group) for _, group in sorted(groups.items())]

    def allowed(self, vm: str, hosts: Iterable[str]) -> frozenset[str]:
        """The hosts that pins leave to a VM, whatever else is there."""
        left = set(hosts)
        for bound in self.of(vm):
            if bound.rule.preferred:
                continue
            if bound.rule.kind is RuleKind.PIN:
                left &= bound.hosts
            elif bound.rule.kind is RuleKind.AVOID:
                left -= bound.hosts
        return frozenset(left)

    def broken_now(self, pool: Pool) -> dict[str, str]:
        """The rules that are broken as things are, each with a sentence."""
        found = {}
        for bound in self.bound:
            if bound.rule.preferred:
                continue
            for vm in sorted(bound.vms):
                words = [
                    told
                    for host in sorted(pool.places(vm))
                    if (told := _broken(bound, vm, host, pool, frozenset()))
                ]
                if words and len(pool.places(vm)) == 1:
                    found[bound.rule.name] = f"VM {vm}: {words[0]}"
                    break
        return found


def _broken(bound: Bound, vm: str, host: str, pool: Pool, besides: frozenset[str]) -> str:
    against = _against(bound, vm, host, pool, besides)
    if not against:
        return ""
    rule = bound.rule
    match rule.kind:
        case RuleKind.PIN:
            return f"rule {rule.name} keeps {vm} on {_listed(bound.hosts) or 'hosts that the farm has not'}"
        case RuleKind.AVOID:
            return f"rule {rule.name} keeps {vm} off {host}"
        case RuleKind.ANTI_AFFINITY:
            return f"rule {rule.name} keeps {vm} apart from {_listed(against)}, on {host}"
        case RuleKind.AFFINITY:
            others = [f"{other} ({', '.join(sorted(pool.places(other)))})" for other in against]
            return f"rule {rule.name} keeps {vm} with {', '.join(others)}, which {host} is not"


def _against(bound: Bound, vm: str, host: str, pool: Pool, besides: frozenset[str]) -> list[str]:
    """The VMs, or the host, that a rule puts forward against this one."""
    match bound.rule.kind:
        case RuleKind.PIN:
            return [] if host in bound.hosts else [host]
        case RuleKind.AVOID:
            return [host] if host in bound.hosts else []
        case RuleKind.ANTI_AFFINITY:
            return sorted(pool.vms(host) & bound.vms - besides - {vm})
        case RuleKind.AFFINITY:
            others = sorted(bound.vms - {vm} - besides)
            return [other for other in others if (places := pool.places(other)) and host not in places]


def _members(selectors: Iterable[str], by_label: Mapping[str, frozenset[str]]) -> frozenset[str]:
    found: set[str] = set()
    for selector in selectors:
        if selector.startswith("@"):
            found |= by_label.get(selector[1:], frozenset())
        else:
            found.add(selector)
    return frozenset(found)


def changed_labels(labels: Iterable[str], add: Iterable[str], remove: Iterable[str]) -> tuple[str, ...]:
    """Labels with others added, and some taken away; in order, each once."""
    return tuple(sorted((set(labels) | set(add)) - set(remove)))


def _by_label(labels: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name, carried in labels.items():
        for label in carried:
            found.setdefault(label, set()).add(name)
    return {label: frozenset(names) for label, names in found.items()}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
