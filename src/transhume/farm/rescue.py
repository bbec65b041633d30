"""A VM leaves a host that was fenced: another becomes its owner, and the old one cannot be asked.

What keeps it from running twice: the host is recorded as fenced, which somebody has answered for; the
register changes its owner in the same transaction in which that record still stands; and nobody, on any
host, has one of its disks open for writing.
"""

from __future__ import annotations

from transhume.farm.admission import Admission
from transhume.farm.members import Members
from transhume.farm.pool import Demand
from transhume.farm.records import FarmRecords, encode, ownership_key
from transhume.model.errors import Conflict, HostLost, NotFound, PreflightFailed, TranshumeError
from transhume.model.vm import Ownership, VmSpec

EPOCHS = 2
"""One more than a migration's commit: a destination that still waits for a source that is off must not find
in the register what it would have written there itself.
"""

_TRIES = 5


class Rescue:
    """Gives VMs of fenced hosts to others. Whoever calls holds the VM's lock; nothing is started here."""

    def __init__(self, records: FarmRecords, members: Members, admission: Admission) -> None:
        self._records = records
        self._members = members
        self._admission = admission

    async def take(self, spec: VmSpec, held: Ownership, ignore_rules: bool = False) -> Ownership:
        """The new owner of a VM whose owner is fenced, with its share held there.

        Raises `PreflightFailed` when no host will do, with the reasons of each, and `Conflict` when the host
        is not fenced any more or the VM was changed; the owner is the old one then.
        """
        excluded: dict[str, str] = {}
        others = [name for name in self._members.names() if name != held.owner]
        demand = Demand.of(spec)
        while True:
            choice = await self._admission.place(demand, others, excluded, ignore_rules=ignore_rules)
            if not choice.host:
                raise PreflightFailed(
                    f"VM {spec.name} cannot leave its fenced host {held.owner}: no other will do",
                    choice.reasons or ("the farm has no other host",),
                )
            try:
                await self._demand_reachable(spec, choice.host)
                return await self._give(spec.name, held, choice.host)
            except (HostLost, PreflightFailed) as error:
                reasons = error.reasons if isinstance(error, PreflightFailed) else (error.message,)
                excluded[choice.host] = "; ".join(reasons)
                self._admission.let_go(spec.name, choice.host)
            except TranshumeError:
                self._admission.let_go(spec.name, choice.host)
                raise

    async def _demand_reachable(self, spec: VmSpec, host: str) -> None:
        found = await self._members.link(host).destination_facts(spec)
        obstacles = (*found.disk_obstacles, *found.file_obstacles, *found.disks_in_use)
        if obstacles:
            raise PreflightFailed(f"VM {spec.name} cannot start on {host}", obstacles)

    async def _give(self, vm: str, held: Ownership, to: str) -> Ownership:
        wanted = Ownership(owner=to, epoch=held.epoch + EPOCHS)
        for _ in range(_TRIES):
            # The host's record may change for other reasons: then it is looked at again.
            host, kept = await self._records.host(held.owner), await self._records.vm(vm)
            owner = await self._records.ownership(vm)
            if kept is None or owner is None or host is None:
                raise NotFound(f"VM {vm} or its host {held.owner} was taken out of the farm meanwhile")
            if host.record.fence is None:
                raise Conflict(f"host {held.owner} is back: VM {vm} stays with it")
            if owner.record != held or kept.record.migration:
                break
            done = await self._records.store.transact(
                compares=[host.unchanged, kept.unchanged, owner.unchanged],
                puts={ownership_key(vm): encode(wanted)},
            )
            if done is not None:
                return wanted
        raise Conflict(f"VM {vm} was changed while it was being given to {to}; look at it and try again")
