"""A stopped VM changes its owner without anything running: one swap of the register.

Its disks lie on shared storage, so all that moves is the right to start it. The old owner is asked first,
because it alone knows that the VM does not run there; without its word nothing changes.
"""

from __future__ import annotations

import asyncio

from transhume.farm.members import Members
from transhume.farm.records import FarmRecords, encode, ownership_key
from transhume.model.errors import Conflict, NotFound, PreflightFailed
from transhume.model.vm import Ownership, VmSpec


class VmLocks:
    """One lock for each VM, so that it is not started where it was while it is given to another host."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}

    def of(self, vm: str) -> asyncio.Lock:
        return self._locks.setdefault(vm, asyncio.Lock())


class Rehoming:
    """Gives stopped VMs to other hosts. Whoever calls holds the VM's lock."""

    def __init__(self, records: FarmRecords, members: Members) -> None:
        self._records = records
        self._members = members

    async def obstacles(self, spec: VmSpec, host: str) -> tuple[str, ...]:
        """Why `host` could not start the VM: files and disks that it does not reach. `HostLost`: no
        answer.
        """
        found = await self._members.link(host).destination_facts(spec)
        return (*found.disk_obstacles, *found.file_obstacles)

    async def rehome(self, vm: str, to: str) -> Ownership:
        """Make `to` the owner of a stopped VM. Whether the pool and the rules let it in was asked before.

        Raises `PreflightFailed` when `to` does not reach what the VM needs, `Conflict` when the VM runs,
        moves or was changed meanwhile, `HostLost` when one of the two hosts does not answer. The owner is the
        old one then.
        """
        kept, owner = await asyncio.gather(self._records.vm(vm), self._records.ownership(vm))
        if kept is None or owner is None:
            raise NotFound(f"the farm has no VM {vm}; `transhume vm list` shows those it has")
        held = owner.record
        if held.owner == to:
            return held
        if kept.record.migration or kept.record.queued:
            raise Conflict(f"VM {vm} is moving: it cannot be given to {to}")
        obstacles = await self.obstacles(kept.record.spec, to)
        if obstacles:
            raise PreflightFailed(f"VM {vm} stays with {held.owner}: {to} cannot start it", obstacles)
        # Only a VM that does not run can be deleted there, and it is started anew from the farm's record.
        await self._members.link(held.owner).delete_vm(vm)
        wanted = Ownership(owner=to, epoch=held.epoch + 1)
        done = await self._records.store.transact(
            compares=[kept.unchanged, owner.unchanged], puts={ownership_key(vm): encode(wanted)}
        )
        if done is None:
            raise Conflict(
                f"VM {vm} was changed while it was being given to {to}; it stays with {held.owner}"
            )
        return wanted
