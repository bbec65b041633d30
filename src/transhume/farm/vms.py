"""The VMs of the farm: made, started, stopped and deleted on the host that owns each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from transhume.farm.admission import Admission
from transhume.farm.baseline import with_baseline
from transhume.farm.lodging import Lodging
from transhume.farm.members import Members
from transhume.farm.pool import Demand
from transhume.farm.records import FarmRecords, Kept, VmRecord, absent, encode, ownership_key, vm_key
from transhume.farm.rehome import Rehoming, VmLocks
from transhume.farm.rescue import Rescue
from transhume.farm.rules import changed_labels
from transhume.model.errors import Conflict, HostLost, NotFound, Refused, TranshumeError
from transhume.model.vm import Ownership, Vm, VmSpec, VmState

FIRST_EPOCH = 1


class Vms:
    """The verbs of `transhume vm`. Each is carried out by the VM's owner and by no other host."""

    def __init__(
        self, records: FarmRecords, members: Members, clock_s: Callable[[], float], admission: Admission
    ) -> None:
        self._records = records
        self._members = members
        self._clock_s = clock_s
        self._admission = admission
        self.lodging = Lodging(members, admission, Rehoming(records, members))
        self.rescue = Rescue(records, members, admission)
        self.locks = VmLocks()
        self._strict: set[str] = set()

    async def load(self) -> None:
        """Read what is asked for at each heartbeat. Call before the first one."""
        self._strict = {kept.record.spec.name for kept in await self._records.vms() if kept.record.strict}

    def strict(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of them that stand still while their host cannot reach the register."""
        return tuple(sorted(self._strict.intersection(names)))

    async def create(
        self,
        spec: VmSpec,
        host: str | None,
        labels: tuple[str, ...] = (),
        reserve: bool = False,
        restart_elsewhere: bool = False,
        strict: bool = False,
    ) -> Vm:
        """Enter a VM owned by `host`, or by the best one. Nothing runs yet.

        Raises `Conflict` for a name that is taken, `NotFound` for a host that is none, `Refused` when the
        host cannot run such a VM (a missing file, no KVM) or the farm has no CPU baseline, and
        `PreflightFailed` when there is no room for it or a rule is against it, with all reasons.
        """
        if await self._records.vm(spec.name) is not None:
            raise Conflict(f"the farm has a VM {spec.name} already; choose another name")
        host, resolved = await self.lodging.for_new(spec, host, labels, reserve)
        try:
            resolved = with_baseline(resolved, self._members.inventories())
        except Refused:
            self._admission.let_go(spec.name, host)
            raise
        record = VmRecord(
            spec=resolved,
            created_at_s=self._clock_s(),
            labels=labels,
            reserve=reserve,
            restart_elsewhere=restart_elsewhere,
            strict=strict,
            wanted=False,
        )
        ownership = Ownership(owner=host, epoch=FIRST_EPOCH)
        keys = (vm_key(spec.name), ownership_key(spec.name))
        done = await self._records.store.transact(
            compares=[absent(key) for key in keys],
            puts=dict(zip(keys, (encode(record), encode(ownership)), strict=True)),
        )
        if done is None:
            self._admission.let_go(spec.name, host)
            raise Conflict(f"the farm has a VM {spec.name} already; choose another name")
        self._mark_strict(record)
        return self._view(record, ownership)

    async def show(self, name: str) -> Vm:
        kept, ownership = await self._known(name)
        return self._view(kept.record, ownership)

    async def list(self) -> list[Vm]:
        """All VMs by name."""
        vms, ownerships = await asyncio.gather(self._records.vms(), self._records.ownerships())
        owners = {kept.key: kept.record for kept in ownerships}
        return [
            self._view(kept.record, owners[key])
            for kept in vms
            if (key := ownership_key(kept.record.spec.name)) in owners
        ]

    async def configure(
        self,
        name: str,
        add: tuple[str, ...],
        remove: tuple[str, ...],
        reserve: bool | None,
        restart_elsewhere: bool | None = None,
        strict: bool | None = None,
    ) -> Vm:
        """Change a VM's labels, whether it keeps its share while it is stopped, and what becomes of it when
        its host is lost. What is None stays as it is.

        Raises `PreflightFailed` when its owner has no room to reserve.
        """
        while True:
            kept, ownership = await self._known(name)
            if reserve and not kept.record.reserve:
                await self.lodging.demand_room(kept.record.spec, ownership.owner)
            changes: dict[str, object] = {"labels": changed_labels(kept.record.labels, add, remove)}
            wanted = {"reserve": reserve, "restart_elsewhere": restart_elsewhere, "strict": strict}
            changes |= {field: value for field, value in wanted.items() if value is not None}
            record = kept.record.model_copy(update=changes)
            puts = {kept.key: encode(record)}
            if await self._records.store.transact(compares=[kept.unchanged], puts=puts) is not None:
                self._mark_strict(record)
                return self._view(record, ownership)

    async def set_memory(self, name: str, memory_bytes: int) -> Vm:
        """Give a VM another size: at once while it runs, when it can only grow, else from its next start on.

        Raises `Conflict` when it moves, `Refused` when it cannot have that size and `PreflightFailed` when
        its host has no room; it is as it was then. After `HostLost` the host may have given it or not: asking
        again settles it.
        """
        async with self.locks.of(name):
            kept, ownership = await self._resting(name)
            spec = kept.record.spec
            running = self._members.vm_state(ownership.owner, name) is not VmState.STOPPED
            grown = spec.resized(memory_bytes, running)
            demand = Demand.of(grown)
            if grown.memory_bytes > spec.memory_bytes and (running or kept.record.reserve):
                await self.lodging.demand_more(demand, ownership.owner)
            # The record first: a share is promised before it is used, whatever dies in between.
            kept = await self._replace(kept, kept.record.model_copy(update={"spec": grown}))
            if running:
                try:
                    await self._members.link(ownership.owner).grow_vm(name, memory_bytes)
                except HostLost:
                    raise
                except TranshumeError:
                    await self._replace(kept, kept.record.model_copy(update={"spec": spec}))
                    raise
            return self._view(kept.record, ownership)

    async def _replace(self, kept: Kept[VmRecord], record: VmRecord) -> Kept[VmRecord]:
        done = await self._records.store.transact(compares=[kept.unchanged], puts={kept.key: encode(record)})
        found = await self._records.vm(record.spec.name)
        if done is None or found is None:
            raise Conflict(f"VM {record.spec.name} was changed meanwhile; look at it and try again")
        return found

    async def start(self, name: str, ignore_rules: bool = False) -> Vm:
        """Start the VM on its owner; where that has no room for it, or is fenced, on another host, which owns
        it then.

        Raises `Conflict` when it runs or moves, `PreflightFailed` when there is no room for it, `VmmError`
        when QEMU dies.
        """
        async with self.locks.of(name):
            kept, ownership = await self._resting(name)
            if self._members.fenced(ownership.owner):
                ownership = await self.rescue.take(kept.record.spec, ownership, ignore_rules)
            elif self._members.vm_state(ownership.owner, name) is VmState.STOPPED:
                ownership = await self.lodging.for_start(kept.record.spec, ownership, ignore_rules)
            await self._note_wanted(name, True)
            try:
                await self._members.link(ownership.owner).start_vm(kept.record.spec)
            except TranshumeError:
                self._admission.let_go(name, ownership.owner)
                raise
            return self._changed(kept.record, ownership, VmState.RUNNING)

    async def stop(self, name: str, timeout_s: float) -> Vm:
        """Ask the guest to power down; `TimedOut` leaves it running."""
        kept, ownership = await self._resting(name)
        await self._members.link(ownership.owner).stop_vm(name, timeout_s)
        await self._note_wanted(name, False)
        self._admission.let_go(name, ownership.owner)
        return self._changed(kept.record, ownership, VmState.STOPPED)

    async def kill(self, name: str) -> Vm:
        """End the VM at once."""
        kept, ownership = await self._resting(name)
        await self._members.link(ownership.owner).kill_vm(name)
        await self._note_wanted(name, False)
        self._admission.let_go(name, ownership.owner)
        return self._changed(kept.record, ownership, VmState.STOPPED)

    async def delete(self, name: str) -> None:
        """Forget a stopped VM. Its disks are left alone. `Conflict` when it runs or moves."""
        kept, ownership = await self._resting(name)
        # The host first: it alone knows whether the VM runs, and asking it again does no harm.
        await self._members.link(ownership.owner).delete_vm(name)
        self._admission.let_go(name, ownership.owner)
        done = await self._records.store.transact(
            compares=[kept.unchanged], deletes=[vm_key(name), ownership_key(name)]
        )
        if done is None:
            raise Conflict(f"VM {name} was changed while it was being deleted; look at it and try again")
        self._strict.discard(name)

    async def log(self, name: str, serial: bool, lines: int) -> str:
        """The last lines of what QEMU said, or of what the guest printed, on the host that owns the VM."""
        _, ownership = await self._known(name)
        return await self._members.link(ownership.owner).vm_log(name, serial, lines)

    async def screendump(self, name: str) -> bytes:
        """The guest's screen as a PNG."""
        _, ownership = await self._known(name)
        return await self._members.link(ownership.owner).screendump(name)

    async def console(self, name: str, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Join the guest's serial console on its owner: what it prints, for what is typed."""
        _, ownership = await self._known(name)
        return self._members.link(ownership.owner).console(name, received)

    async def _note_wanted(self, name: str, wanted: bool) -> None:
        """Remember whether it was last started or stopped: a host that is lost cannot tell."""
        while (kept := await self._records.vm(name)) is not None and kept.record.wanted is not wanted:
            record = kept.record.model_copy(update={"wanted": wanted})
            puts = {kept.key: encode(record)}
            if await self._records.store.transact(compares=[kept.unchanged], puts=puts) is not None:
                return

    def _mark_strict(self, record: VmRecord) -> None:
        if record.strict:
            self._strict.add(record.spec.name)
        else:
            self._strict.discard(record.spec.name)

    async def _known(self, name: str) -> tuple[Kept[VmRecord], Ownership]:
        kept, ownership = await asyncio.gather(self._records.vm(name), self._records.ownership(name))
        if kept is None or ownership is None:
            raise NotFound(f"the farm has no VM {name}; `transhume vm list` shows those it has")
        return kept, ownership.record

    async def _resting(self, name: str) -> tuple[Kept[VmRecord], Ownership]:
        kept, ownership = await self._known(name)
        if kept.record.migration:
            raise Conflict(
                f"VM {name} is moving (migration {kept.record.migration}); wait for it, "
                f"or `transhume cancel {name}` first"
            )
        if kept.record.queued:
            raise Conflict(
                f"VM {name} is about to move (migration {kept.record.queued}); wait for it, "
                f"or `transhume cancel {name}` first"
            )
        return kept, ownership

    def _view(self, record: VmRecord, ownership: Ownership) -> Vm:
        return Vm(
            spec=record.spec,
            ownership=ownership,
            state=self._members.vm_state(ownership.owner, record.spec.name),
            migration=record.migration,
            queued=record.queued,
            created_at_s=record.created_at_s,
            reserve=record.reserve,
            labels=record.labels,
            restart_elsewhere=record.restart_elsewhere,
            strict=record.strict,
            fenced=self._members.fenced(ownership.owner),
        )

    def _changed(self, record: VmRecord, ownership: Ownership, state: VmState) -> Vm:
        self._members.note_vm_state(ownership.owner, record.spec.name, state)
        return self._view(record, ownership)
