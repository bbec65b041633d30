"""The farm as one machine: what it has, what of it is promised, and whether it could lose a host."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel, ConfigDict

from transhume.farm.admission import Admission, Situation
from transhume.farm.fence_command import demand_fence_command
from transhume.farm.headroom import Loss, losses, worst
from transhume.farm.members import Members
from transhume.farm.records import SETTINGS_KEY, FarmRecords, FarmSettings, absent, encode
from transhume.farm.rules import changed_labels
from transhume.model.errors import Conflict
from transhume.model.host import HostState
from transhume.model.vm import VmState


class HostShare(BaseModel):
    """One host's part of the pool. `reserved_bytes` is its own, `promised_bytes` the VMs'.

    `short_bytes` is the memory of the VMs that no other host could take if this one were lost, and `stranded`
    are those, each with why.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    state: HostState
    silent: bool
    fenced: bool = False
    cpus: int
    cpu_overcommit: float
    promised_cpus: int
    memory_bytes: int
    reserved_bytes: int
    promised_bytes: int
    left_bytes: int
    vms: int
    running: int
    labels: tuple[str, ...]
    short_bytes: int
    stranded: dict[str, tuple[str, ...]]


class FarmView(BaseModel):
    """The pool. `can_lose_one`: whichever host is lost, the others have room for its VMs.

    `short_bytes` and `worst_host` tell of the worst loss; `broken_rules` are sentences.
    """

    model_config = ConfigDict(frozen=True)

    hosts: tuple[HostShare, ...]
    cpus: int
    promised_cpus: int
    memory_bytes: int
    reserved_bytes: int
    promised_bytes: int
    left_bytes: int
    vms: int
    running: int
    can_lose_one: bool
    short_bytes: int
    worst_host: str
    broken_rules: tuple[str, ...]
    cpu_overcommit: float


class Overview:
    """`transhume farm`, and what is set for a host or for the whole farm."""

    def __init__(self, records: FarmRecords, members: Members, admission: Admission) -> None:
        self._records = records
        self._members = members
        self._admission = admission

    async def view(self) -> FarmView:
        """The pool as it is now. Raises `StoreError`."""
        found = await self._admission.situation()
        # In a thread: in a large farm it takes a second, and commits do not wait for it.
        lost = await asyncio.to_thread(losses, found.pool, found.rules)
        bad = worst(lost)
        owned: dict[str, list[str]] = {}
        for vm, ownership in found.owners.items():
            owned.setdefault(ownership.owner, []).append(vm)
        hosts = tuple(_share(lost[name], found, owned.get(name, [])) for name in found.pool.hosts)
        return FarmView(
            hosts=hosts,
            cpus=sum(host.cpus for host in hosts),
            promised_cpus=sum(host.promised_cpus for host in hosts),
            memory_bytes=sum(host.memory_bytes for host in hosts),
            reserved_bytes=sum(host.reserved_bytes for host in hosts),
            promised_bytes=sum(host.promised_bytes for host in hosts),
            left_bytes=sum(max(0, host.left_bytes) for host in hosts),
            vms=sum(host.vms for host in hosts),
            running=sum(host.running for host in hosts),
            can_lose_one=bad is None,
            short_bytes=bad.short_bytes if bad else 0,
            worst_host=bad.host if bad else "",
            broken_rules=tuple(found.rules.broken_now(found.pool).values()),
            cpu_overcommit=found.settings.cpu_overcommit,
        )

    async def configure_farm(self, cpu_overcommit: float | None, fence_command: str | None = None) -> None:
        """Change what holds for hosts that are not set otherwise. What is None stays as it is."""
        changes: dict[str, object] = {}
        if cpu_overcommit is not None:
            changes["cpu_overcommit"] = cpu_overcommit
        if fence_command is not None:
            demand_fence_command(fence_command)
            changes["fence_command"] = fence_command
        kept = await self._records.settings()
        settings = (kept.record if kept else FarmSettings()).model_copy(update=changes)
        condition = kept.unchanged if kept else absent(SETTINGS_KEY)
        puts = {SETTINGS_KEY: encode(settings)}
        if await self._records.store.transact(compares=[condition], puts=puts) is None:
            raise Conflict("somebody else changed the farm's settings at this moment; try again")

    async def configure_host(
        self,
        name: str,
        reserve_memory_bytes: int | None,
        cpu_overcommit: float | None,
        add: tuple[str, ...],
        remove: tuple[str, ...],
        fence_command: str | None = None,
    ) -> None:
        """Change what a host keeps for itself, how often its CPUs are promised, its labels, and the command
        that switches it off.

        What is None stays as it is. What is promised already stays promised, however little is left.
        """
        changes: dict[str, object] = {}
        if reserve_memory_bytes is not None:
            changes["reserve_memory_bytes"] = reserve_memory_bytes
        if cpu_overcommit is not None:
            changes["cpu_overcommit"] = cpu_overcommit
        if fence_command is not None:
            demand_fence_command(fence_command)
            changes["fence_command"] = fence_command
        await self._members.configure(
            name, lambda record: {**changes, "labels": changed_labels(record.labels, add, remove)}
        )


def _share(loss: Loss, found: Situation, own: list[str]) -> HostShare:
    name, pool, room = loss.host, found.pool, found.pool.hosts[loss.host]
    return HostShare(
        name=name,
        state=room.state,
        silent=room.silent,
        fenced=room.fenced,
        cpus=room.cpus,
        cpu_overcommit=room.cpu_overcommit,
        promised_cpus=pool.promised_cpus(name),
        memory_bytes=room.memory_bytes,
        reserved_bytes=room.reserved_bytes,
        promised_bytes=pool.promised_bytes(name),
        left_bytes=pool.left_bytes(name),
        vms=len(own),
        running=sum(found.states[vm] not in (VmState.STOPPED, VmState.UNKNOWN) for vm in own),
        labels=tuple(sorted(found.host_labels.get(name, ()))),
        short_bytes=loss.short_bytes,
        stranded=loss.stranded,
    )
