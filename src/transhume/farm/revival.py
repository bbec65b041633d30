"""Taking a VM back from a destination host that was lost before all of the VM's memory was there.

Its memory is on two hosts then. The source still holds the VM as it was at the switchover; what the VM did
at the destination is lost with that host. That is a decision for a person, never for the farm: if the
destination still ran somewhere out of reach, the VM would run twice, so it must be switched off first.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from transhume.farm.members import Members
from transhume.farm.records import FarmRecords
from transhume.model.errors import Conflict, NotFound
from transhume.model.migration import Migration, Outcome, Phase
from transhume.model.orders import ReviveReply
from transhume.model.vm import Ownership


class Revival(BaseModel):
    """What taking a VM back would mean. `warnings` are sentences for the person who decides.

    `suspended_at_s` is when the VM was suspended, `age_s` how long ago: so much of its work is lost. None:
    the source has not told. `silent_s` is how long the destination was not heard from.
    """

    model_config = ConfigDict(frozen=True)

    vm: str
    migration: str
    source: str
    destination: str
    suspended_at_s: float | None
    age_s: float | None
    silent_s: float
    warnings: tuple[str, ...]
    changed_disks: tuple[str, ...] = ()


class Revivals:
    """Offers and carries out revivals."""

    def __init__(self, records: FarmRecords, members: Members, clock_s: Callable[[], float]) -> None:
        self._records = records
        self._members = members
        self._clock_s = clock_s

    async def offer(self, vm: str, record: Migration) -> Revival:
        """What it would mean. Raises `Conflict` when the VM cannot be taken back, and `NotFound`."""
        kept = await self._records.vm(vm)
        owner = await self._records.ownership(vm)
        if kept is None or owner is None:
            raise NotFound(f"the farm has no VM {vm}; `transhume vm list` shows those it has")
        committed = Ownership(owner=record.destination, epoch=record.epoch + 1)
        if record.outcome is not Outcome.RUNNING or record.phase is not Phase.PAGING:
            raise Conflict(f"VM {vm} is not in want of pages: nothing is kept of it elsewhere")
        paging = record.report.paging
        if owner.record != committed or (paging is not None and paging.complete):
            raise Conflict(f"VM {vm} runs whole on host {owner.record.owner}; there is nothing to take back")
        destination = self._members.host(record.destination)
        if not destination.silent:
            raise Conflict(
                f"host {record.destination}, where VM {vm} runs, was heard from "
                f"{destination.seen_ago_s:.0f} s ago: a VM is taken back only from a host that is lost"
            )
        suspended_at_s = record.report.suspended_at_s
        age_s = None if suspended_at_s is None else max(0.0, self._clock_s() - suspended_at_s)
        disks = tuple(disk.path for disk in kept.record.spec.disks if not disk.read_only)
        return Revival(
            vm=vm,
            migration=record.id,
            source=record.source,
            destination=record.destination,
            suspended_at_s=suspended_at_s,
            age_s=age_s,
            silent_s=destination.seen_ago_s,
            warnings=_warnings(vm, record, age_s, destination.seen_ago_s, disks),
            changed_disks=disks,
        )

    async def carry_out(self, vm: str, record: Migration, despite_disks: bool) -> ReviveReply:
        """Let the source take the VM back: the register first, then its vCPUs.

        Raises as `offer`; `Conflict` too for a VM with disks that it went on writing, unless `despite_disks`,
        and when the source refuses; `HostLost` when the source does not answer. Nothing has changed then.
        """
        offer = await self.offer(vm, record)
        if offer.changed_disks and not despite_disks:
            raise Conflict(
                f"VM {vm} went on writing its disks on host {record.destination} "
                f"({', '.join(offer.changed_disks)}), and its memory of before does not match them any more: "
                "start it anew from its disks, or say --with-changed-disks"
            )
        reply = await self._members.link(record.source).revive(record.id)
        if not reply.revived:
            raise Conflict(f"VM {vm} was not taken back: {reply.message}")
        return reply


def _warnings(
    vm: str, record: Migration, age_s: float | None, silent_s: float, disks: tuple[str, ...]
) -> tuple[str, ...]:
    age = "a time that is not known" if age_s is None else f"{age_s:.0f} s"
    warnings = [
        f"Host {record.destination} was not heard from for {silent_s:.0f} s. If it still runs, VM {vm} would "
        "run twice: switch it off first.",
        f"VM {vm} goes back to what it was {age} ago; what it did since, and told others, is lost.",
    ]
    if disks:
        warnings.append(
            f"It went on writing {', '.join(disks)}: its memory does not match them, and its file systems "
            "may break."
        )
    return tuple(warnings)
