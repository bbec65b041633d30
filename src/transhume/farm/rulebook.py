"""The farm's rules in the store: made after a look at whether they can hold, listed, removed."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel, ConfigDict

from transhume.farm.admission import Admission, Situation
from transhume.farm.pool import Demand
from transhume.farm.records import FarmRecords, absent, encode, rule_key
from transhume.farm.rule_check import contradictions, warnings
from transhume.farm.rules import Rule, RuleBook
from transhume.model.errors import Conflict, NotFound, PreflightFailed


class RuleView(BaseModel):
    """A rule with the VMs and hosts that it means, and what somebody should know of it."""

    model_config = ConfigDict(frozen=True)

    rule: Rule
    vms: tuple[str, ...]
    hosts: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Rulebook:
    """The verbs of `transhume rule`."""

    def __init__(self, records: FarmRecords, admission: Admission) -> None:
        self._records = records
        self._admission = admission
        self._lock = asyncio.Lock()

    async def add(self, rule: Rule) -> RuleView:
        """Enter a rule. It moves nothing by itself.

        Raises `NotFound` for a VM or host that is none, `Conflict` for a name that is taken,
        `PreflightFailed` when nothing could ever satisfy it beside the other rules.
        """
        # One at a time: two that contradict each other would not see each other.
        async with self._lock:
            found = await self._admission.situation()
            _demand_known(rule, found)
            if any(bound.rule.name == rule.name for bound in found.rules.bound):
                raise Conflict(f"the farm has a rule {rule.name} already; `transhume rule remove` it first")
            book = _with(rule, found)
            against = contradictions(book, rule.name, frozenset(found.pool.hosts))
            if against:
                raise PreflightFailed(f"rule {rule.name} can never hold; nothing was changed", tuple(against))
            key = rule_key(rule.name)
            done = await self._records.store.transact(compares=[absent(key)], puts={key: encode(rule)})
            if done is None:
                raise Conflict(f"the farm has a rule {rule.name} already; `transhume rule remove` it first")
            return _view(rule.name, book, found)

    async def list(self) -> list[RuleView]:
        """All rules by name, each with what breaks it now."""
        found = await self._admission.situation()
        return [_view(bound.rule.name, found.rules, found) for bound in found.rules.bound]

    async def remove(self, name: str) -> None:
        """Forget a rule. Raises `NotFound`."""
        if not any(kept.record.name == name for kept in await self._records.rules()):
            raise NotFound(f"the farm has no rule {name}; `transhume rule list` shows those it has")
        await self._records.store.transact(deletes=[rule_key(name)])


def _demand_known(rule: Rule, found: Situation) -> None:
    for vm in rule.vms:
        if not vm.startswith("@") and vm not in found.vms:
            raise NotFound(f"the farm has no VM {vm}; `transhume vm list` shows those it has")
    for host in rule.hosts:
        if not host.startswith("@") and host not in found.pool.hosts:
            raise NotFound(f"the farm has no host {host}; `transhume hosts` lists its members")


def _with(rule: Rule, found: Situation) -> RuleBook:
    rules = [bound.rule for bound in found.rules.bound]
    return RuleBook(
        [*rules, rule],
        {name: record.labels for name, record in found.vms.items()},
        found.host_labels,
    )


def _view(name: str, book: RuleBook, found: Situation) -> RuleView:
    bound = next(each for each in book.bound if each.rule.name == name)
    demands = {vm: Demand.of(record.spec) for vm, record in found.vms.items()}
    return RuleView(
        rule=bound.rule,
        vms=tuple(sorted(bound.vms)),
        hosts=tuple(sorted(bound.hosts)),
        warnings=tuple(warnings(book, name, found.pool, demands)),
    )
