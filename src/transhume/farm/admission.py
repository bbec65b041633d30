"""Admission: what is promised in the farm at this moment, and room for one VM more, held while it gets there.

What is promised is read from the store and from what the hosts last said, never kept beside them. Between the
decision that a VM goes to a host and the moment when that shows in either, the share is held in memory; two
requests at once therefore never take the same room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from transhume.farm.members import Members
from transhume.farm.placement import Choice, choose, reasons_against
from transhume.farm.pool import Demand, HostRoom, Pool, default_reserve_bytes
from transhume.farm.records import FarmRecords, FarmSettings, HostRecord, VmRecord, ownership_key
from transhume.farm.rules import RuleBook
from transhume.model.migration import Migration, Outcome, Phase
from transhume.model.vm import Ownership, VmState

HOLD_S = 30.0
"""How long a share is held for a VM that was let in: by then its host has said that it runs, or it does
not.
"""


@dataclass(frozen=True)
class Situation:
    """The farm at one moment: who is promised what, and every VM, its owner and its state by its name."""

    pool: Pool
    rules: RuleBook
    vms: Mapping[str, VmRecord]
    owners: Mapping[str, Ownership]
    states: Mapping[str, VmState]
    host_labels: Mapping[str, tuple[str, ...]]
    settings: FarmSettings

    def without(self, leaving: Mapping[str, str]) -> None:
        """Take back what these VMs have on these hosts: they go."""
        for vm, host in leaving.items():
            self.pool.release(vm, host)


@dataclass(frozen=True)
class Judgement:
    """What the pool and the rules say of hosts for one VM. `chosen` is empty when none will do."""

    chosen: str
    against: Mapping[str, tuple[str, ...]]


class Admission:
    """Reads the farm as a pool and lets VMs in. Raises `StoreError` as the store does."""

    def __init__(self, records: FarmRecords, members: Members, clock_s: Callable[[], float]) -> None:
        self._records = records
        self._members = members
        self._clock_s = clock_s
        self._lock = asyncio.Lock()
        self._held: dict[tuple[str, str], tuple[Demand, float]] = {}

    async def situation(
        self, labels: Mapping[str, tuple[str, ...]] | None = None, all_answer: bool = False
    ) -> Situation:
        """The farm as it is now, with what is held. `labels` of VMs that it does not have yet; `all_answer`
        when it was asked of the hosts themselves whether they do.
        """
        vms, owners, rules, kept_settings = await asyncio.gather(
            self._records.vms(), self._records.ownerships(), self._records.rules(), self._records.settings()
        )
        records = {kept.record.spec.name: kept.record for kept in vms}
        moving = await self._moving(records.values())
        by_vm = {kept.key: kept.record for kept in owners}
        owned = {name: by_vm[key] for name in records if (key := ownership_key(name)) in by_vm}
        settings = kept_settings.record if kept_settings else FarmSettings()
        rooms = self._rooms(settings)
        pool = Pool([replace(room, silent=False) for room in rooms] if all_answer else rooms)
        states = {}
        for name, record in records.items():
            if name not in owned:
                continue
            owner = owned[name].owner
            states[name] = self._members.vm_state(owner, name)
            if states[name] is not VmState.STOPPED or record.reserve or name in moving:
                pool.promise(Demand.of(record.spec), owner)
            for host in moving.get(name, ()):
                pool.promise(Demand.of(record.spec), host)
        host_labels = {host: self._members.record(host).labels for host in pool.hosts}
        vm_labels = {**(labels or {}), **{name: record.labels for name, record in records.items()}}
        book = RuleBook([kept.record for kept in rules], vm_labels, host_labels)
        self._promise_held(pool)
        return Situation(pool, book, records, owned, states, host_labels, settings)

    async def place(
        self,
        demand: Demand,
        candidates: Iterable[str] | None = None,
        excluded: Mapping[str, str] | None = None,
        leaving: Mapping[str, str] | None = None,
        ignore_rules: bool = False,
        labels: tuple[str, ...] = (),
    ) -> Choice:
        """Choose a host for a VM that is to run, and hold its share there. `excluded` has hosts with why not.

        `leaving` are VMs that go from the hosts named with them, whatever they have there now; `labels` are
        those of a VM that the farm does not have yet.
        """
        async with self._lock:
            found = await self.situation({demand.vm: labels})
            found.without(leaving or {})
            rules = RuleBook() if ignore_rules else found.rules
            known = excluded or {}
            chosen = choose(found.pool, rules, (demand,), candidates, lambda _vm, host: known.get(host, ""))
            if chosen.host:
                self.hold(demand, chosen.host)
            return chosen

    async def judge(
        self,
        demand: Demand,
        candidates: Mapping[str, int],
        source: str,
        unfit: frozenset[str] = frozenset(),
        leaving: frozenset[str] = frozenset(),
        ignore_rules: bool = False,
        hold: bool = True,
    ) -> Judgement:
        """What speaks against each of `candidates` as the destination of a move, and the best of them, held.

        `candidates` have the memory that is available there right now: of what is left to promise and what is
        available, the lesser counts. Whether a host answers and what its QEMU can do was asked of it already;
        those that are `unfit` by that are judged too, and not chosen.
        """
        async with self._lock:
            found = await self.situation(all_answer=True)
            found.without(dict.fromkeys((demand.vm, *leaving), source))
            rules = RuleBook() if ignore_rules else found.rules
            asked = replace(demand, machine_type="", kvm=False)
            against, fit = {}, []
            for host, available_bytes in candidates.items():
                reasons = reasons_against(found.pool, rules, (asked,), host)
                if reasons:
                    against[host] = reasons
                if reasons or host in unfit:
                    continue
                disliked = rules.disliked(demand.vm, host, found.pool) if rules.prefers(demand.vm) else 0
                fit.append((disliked, -min(available_bytes, found.pool.left_bytes(host)), host))
            chosen = min(fit)[2] if fit else ""
            if chosen and hold:
                self.hold(demand, chosen)
            return Judgement(chosen, against)

    async def against_making(self, demand: Demand, host: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Why `host` should not own a new VM that is not promised anything yet: it could never run there."""
        found = await self.situation({demand.vm: labels}, all_answer=True)
        room = found.pool.hosts[host]
        asked = replace(demand, machine_type="", kvm=False)
        reasons = reasons_against(Pool([room]), RuleBook(), (asked,), host)
        return (*reasons, *found.rules.broken(demand.vm, host, found.pool))

    def hold(self, demand: Demand, host: str) -> None:
        """Keep a share for a VM that is on its way to a host."""
        self._held[demand.vm, host] = (demand, self._clock_s() + HOLD_S)

    def let_go(self, vm: str, host: str) -> None:
        """The VM does not come, or has ended: its share is free, unless the store or the host say
        otherwise.
        """
        self._held.pop((vm, host), None)

    def _promise_held(self, pool: Pool) -> None:
        now_s = self._clock_s()
        for (vm, host), (demand, until_s) in list(self._held.items()):
            if until_s <= now_s:
                del self._held[vm, host]
            else:
                pool.promise(demand, host)

    def _rooms(self, settings: FarmSettings) -> list[HostRoom]:
        return [_room(self._members.record(name), settings, self._members) for name in self._members.names()]

    async def _moving(self, records: Iterable[VmRecord]) -> dict[str, tuple[str, ...]]:
        """VMs on the move, with both hosts of each."""
        ids = [record.migration for record in records if record.migration]
        found = await asyncio.gather(*(self._records.migration(each) for each in ids))
        return {
            kept.record.vm: _ends(kept.record)
            for kept in found
            if kept is not None and kept.record.outcome is Outcome.RUNNING
        }


def _ends(migration: Migration) -> tuple[str, ...]:
    if migration.phase is Phase.QUEUED:
        return (migration.source,)
    return (migration.source, migration.destination)


def _room(record: HostRecord, settings: FarmSettings, members: Members) -> HostRoom:
    inventory = members.host(record.name).inventory
    reserved_bytes = record.reserve_memory_bytes
    return HostRoom(
        name=record.name,
        cpus=inventory.cpus,
        memory_bytes=inventory.memory_bytes,
        reserved_bytes=(
            default_reserve_bytes(inventory.memory_bytes) if reserved_bytes is None else reserved_bytes
        ),
        cpu_overcommit=record.cpu_overcommit or settings.cpu_overcommit,
        state=record.state,
        fenced=record.fence is not None,
        silent=members.silent(record.name),
        machine_types=frozenset(inventory.machine_types),
        kvm_obstacle=inventory.kvm_obstacle,
    )
