"""Dead hosts. Silence means that nothing is known; only a host that was fenced counts as dead.

To fence is to switch off, by the operator's own command or by hand, and to have that recorded. From then on
its VMs that are marked for it are started on other hosts, from their disks, until none is left or the host is
back. The record alone says what is to be done, so that a controller that was restarted goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from transhume.farm.fence_command import RunFence, run_fence_command
from transhume.farm.members import Members
from transhume.farm.records import FarmRecords, FarmSettings, Fence, VmRecord
from transhume.farm.vms import Vms
from transhume.model.errors import Conflict, PreflightFailed, TranshumeError
from transhume.model.vm import VmState

AT_ONCE = 4
BY_HAND = "somebody said that it is switched off"
BY_COMMAND = "its fence command said that it is switched off"

log = logging.getLogger(__name__)


class StrandedVm(BaseModel):
    """A VM whose host is lost or fenced. `restarts`: it is, or will be, started elsewhere by the farm.

    `now_on` is where it was started. `note` says in words why it was not, and what a person can do.
    """

    model_config = ConfigDict(frozen=True)

    vm: str
    restarts: bool
    now_on: str = ""
    note: str = ""


class FenceReport(BaseModel):
    """A host, since when it is lost, since when it is fenced and how, and what that means for its VMs.

    A time is None for what is not so. `command`: it has a command that switches it off.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    lost_since_s: float | None
    fenced_at_s: float | None
    how: str = ""
    command: bool = False
    vms: tuple[StrandedVm, ...] = ()


class Fencing:
    """Fences hosts, and starts what was on them."""

    def __init__(
        self,
        records: FarmRecords,
        members: Members,
        vms: Vms,
        clock_s: Callable[[], float],
        run: RunFence = run_fence_command,
    ) -> None:
        self._records = records
        self._members = members
        self._vms = vms
        self._clock_s = clock_s
        self._run = run
        self._lock = asyncio.Lock()
        self._notes: dict[str, str] = {}
        self._working: asyncio.Task[None] | None = None

    async def show(self, host: str) -> FenceReport:
        """How it stands with a host. Raises `NotFound`."""
        status = self._members.host(host)
        record = self._members.record(host)
        fence = record.fence
        stranded = await self._on(host) if status.silent or fence else []
        return FenceReport(
            host=host,
            lost_since_s=status.lost_since_s,
            fenced_at_s=fence.at_s if fence else None,
            how=fence.how if fence else "",
            command=bool(await self._command(host)),
            vms=tuple(self._stranded(host, vm, fence is not None) for vm in stranded),
        )

    async def fence(self, host: str, powered_off: bool, force: bool) -> FenceReport:
        """Switch a lost host off, or believe that somebody did, and start its marked VMs elsewhere.

        Raises `Conflict` for the controller's own host, for one that is not lost (unless `force`), for one
        without a command (unless `powered_off`) and when its command fails, `TimedOut` when that takes too
        long; the host does not count as fenced then. What was started is told, and what not and why. A host
        that is fenced already is not switched off again.
        """
        async with self._lock:
            if self._members.record(host).fence is None:
                await self._switch_off(host, powered_off, force)
            before = await self._on(host)
            await self._restart(host, before)
            report = await self.show(host)
            left = {each.vm for each in report.vms}
            moved = [
                StrandedVm(vm=vm.spec.name, restarts=True, now_on=(await self._owner(vm.spec.name)))
                for vm in before
                if vm.spec.name not in left
            ]
            return report.model_copy(update={"vms": (*moved, *report.vms)})

    async def _switch_off(self, host: str, powered_off: bool, force: bool) -> None:
        status = self._members.host(host)
        if status.controller:
            raise Conflict(f"host {host} carries the controller, which has just answered: it is not lost")
        if not force and not self._members.lost(host):
            raise Conflict(
                f"host {host} is not known to be lost: it was heard from, or the controller has only just "
                "come up and still waits for its word. --force fences it all the same"
            )
        if not powered_off:
            command = await self._command(host)
            if not command:
                raise Conflict(
                    f"host {host} has no fence command: switch it off and say --i-have-powered-it-off, or "
                    f"set one with `transhume host set {host} --fence-command`"
                )
            await self._run(command, host, status.address)
        fence = Fence(at_s=self._clock_s(), how=BY_HAND if powered_off else BY_COMMAND)
        await self._members.configure(host, {"fence": fence})
        log.warning("host %s is fenced: %s", host, fence.how)

    def wake(self) -> None:
        """Go on with what was begun, if anything is left to do. Called every few seconds."""
        if self._working is not None and not self._working.done():
            return
        fenced = [name for name in self._members.names() if self._members.fenced(name)]
        if fenced:
            self._working = asyncio.create_task(self._go_on(fenced), name="restart VMs of fenced hosts")

    async def close(self) -> None:
        """Stop; the next controller goes on."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    async def _go_on(self, fenced: list[str]) -> None:
        async with self._lock:
            for host in fenced:
                try:
                    await self._restart(host, await self._on(host))
                except TranshumeError as error:
                    log.warning("could not look after the VMs of fenced host %s: %s", host, error.message)

    async def _restart(self, host: str, stranded: list[VmRecord]) -> None:
        """Start what is marked and ran; what did not start is noted, and tried again later."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(vm: str) -> None:
            async with turns:
                try:
                    started = await self._vms.start(vm)
                except TranshumeError as error:
                    reasons = error.reasons if isinstance(error, PreflightFailed) else ()
                    self._note(vm, "; ".join((error.message, *reasons)))
                else:
                    self._notes.pop(vm, None)
                    log.warning(
                        "VM %s was started on %s: its host %s is fenced", vm, started.ownership.owner, host
                    )

        marked = [vm.spec.name for vm in stranded if vm.restart_elsewhere and not self._stood_still(host, vm)]
        await asyncio.gather(*(one(vm) for vm in marked))

    def _note(self, vm: str, words: str) -> None:
        if self._notes.get(vm) != words:
            log.warning("VM %s was not started elsewhere: %s", vm, words)
        self._notes[vm] = words

    def _stood_still(self, host: str, vm: VmRecord) -> str:
        """Why the VM is not to run at all, as far as is known; empty when it is."""
        if vm.wanted is False:
            return "it was stopped before"
        if self._members.last_state(host, vm.spec.name) is VmState.STOPPED:
            return "it did not run when its host was last heard from"
        return ""

    def _stranded(self, host: str, vm: VmRecord, fenced: bool) -> StrandedVm:
        name = vm.spec.name
        still = self._stood_still(host, vm)
        restarts = vm.restart_elsewhere and not still
        by_hand = f"start it elsewhere with `transhume vm start {name}`"
        if not fenced:
            note = f"unknown; starts elsewhere when {host} is fenced" if restarts else "unknown"
        elif restarts:
            note = self._notes.get(name, "about to be started elsewhere")
        else:
            note = f"{still}; {by_hand}" if still else f"on fenced host {host}: {by_hand}"
        return StrandedVm(vm=name, restarts=restarts, note=note)

    async def _on(self, host: str) -> list[VmRecord]:
        vms, owners = await asyncio.gather(self._records.vms(), self._records.ownerships())
        here = {kept.key.split("/", 1)[1] for kept in owners if kept.record.owner == host}
        return [kept.record for kept in vms if kept.record.spec.name in here]

    async def _owner(self, vm: str) -> str:
        kept = await self._records.ownership(vm)
        return kept.record.owner if kept else ""

    async def _command(self, host: str) -> str:
        kept = await self._records.settings()
        return (
            self._members.record(host).fence_command
            or (kept.record if kept else FarmSettings()).fence_command
        )
