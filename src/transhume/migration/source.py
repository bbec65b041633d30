"""The source's half of a migration, without I/O.

While the register says that the source owns the VM, only the source may run it. Up to the state
`STATE` the destination cannot commit, because it has not been given the device state: every failure
before that lets the VM go on at once. From `STATE` on the destination may win the register at any
moment, so the source, paused, decides nothing by itself: it swaps `(source, e) -> (source, e + 1)`, and goes
on only when that swap is known to have been made, or when the destination says that it gave up for good.

When pages are left for after the resume, the source keeps its RAM after the commit until the destination says
that it lacks none. Whatever breaks meanwhile, it looks for the destination again, for ever: it holds the
only copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from transhume.migration import events as ev
from transhume.migration.machine import Command, Event, Machine
from transhume.migration.policy import Choice, Decision, begins_suspended, decide, rest_of
from transhume.migration.source_table import PHASES, TABLE, S, SourceState
from transhume.model.errors import MemoryDiffers, PagesLost
from transhume.model.migration import (
    NOWHERE,
    DowntimeReport,
    Engine,
    IterationReport,
    Migration,
    MigrationReport,
    Outcome,
    PagingReport,
    Phase,
    Rest,
)
from transhume.model.vm import PAGE_BYTES

SWAP_RETRY_S = 0.5
"""How long the source waits, paused, before it asks the register again."""

RECONNECT_S = 0.5
"""How long the source waits before it looks again for a destination that lacks pages."""

RESUME_ATTEMPTS = 5
BUDGET_SHARE = 0.7
"""Of the downtime that was promised; what is left over is for what goes slower than expected."""

FINISH_LIMIT_S = 10.0
"""After the commit: how long the source waits to hear that the destination runs before it frees the VM."""

REVIVED = "revived"
"""The error code of a migration whose VM was taken back from a destination that was lost."""

CONNECT_LIMIT_S = 15.0
COMMIT_LIMIT_S = 30.0
"""How long the source stays paused for a destination that has everything, is alive, and does not commit."""


class SourceMachine(Machine[SourceState]):
    """One migration, seen from the host that runs the VM at its begin."""

    table: ClassVar = TABLE
    final: ClassVar = frozenset({S.DONE, S.ABORTED})

    def __init__(self, migration: Migration, ram_bytes: int, now_s: float, owing: bool = False) -> None:
        """`owing`: a predecessor has left pages for after the resume, which is known before anything else."""
        super().__init__(S.STARTING)
        self.migration = migration
        self.ram_bytes = ram_bytes
        self.outcome = Outcome.RUNNING
        self.error_code = ""
        self.error = ""
        self.passes: list[ev.PassResult] = []
        self.last_decision: Decision | None = None
        self.state_bytes = 0
        self.switch_reason = ""
        self._converged: bool | None = None
        self._predicted_downtime_s: float | None = None
        self._last_pages: ev.PassResult | None = None
        self._started_s = now_s
        self._heard_s = now_s
        self._switchover_cost_s = 0.0
        self._pausing_s: float | None = None
        self._state_sent_s = now_s
        self._marks_s: dict[str, float] = {}
        self._downtime = DowntimeReport()
        self._swap_under_way = False
        self._asked_register_s = now_s
        self._interrupting = False
        self._resume_attempts = 0
        self._resume_due_s: float | None = None
        self._vm_died = False
        self._cancel_wanted = False
        self._lost_everywhere = False
        self._rest = Rest.BEFORE_STATE
        self._switch_wanted = False
        self._owing = owing
        self._owed_pages = 0
        self._ended_owing = False
        self._push_begun = False
        self._paging: PagingReport | None = None
        self._difference = ""
        self._paging_since_s: float | None = None
        self._residual_s = 0.0
        self._reconnecting = False
        self._reconnect_due_s = now_s
        self._memory_lost = False
        self._revive_wanted = False
        self.revival_refused = False

    # --- what others may ask ---------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """The patent's step that this state belongs to."""
        return PHASES[self.state]

    @property
    def past_point_of_no_return(self) -> bool:
        """Whether the VM is known to be the destination's."""
        return self.state in (S.COMMITTED, S.PAGING, S.RECONNECTING, S.REVIVING, S.RETIRING, S.DONE)

    @property
    def ended_owing(self) -> bool:
        """Whether the destination was never given all that it lacked."""
        return self._ended_owing

    @property
    def vm_died(self) -> bool:
        """Whether the source's QEMU has ended."""
        return self._vm_died

    @property
    def rest(self) -> Rest:
        """When the pages left at the suspension travel, as far as it is decided."""
        return self._rest

    @property
    def deadline_s(self) -> float:
        """When the deadline passes, on the monotonic clock."""
        return self._started_s + self.migration.options.deadline_s

    @property
    def order(self) -> str:
        """The order of transfer in words, as it was or will be."""
        count = len(self.passes)
        passes = "no pre-copy pass" if count == 0 else f"{count} pre-copy pass{'es' if count > 1 else ''}"
        return f"{passes}, rest {self._rest.value}"

    @property
    def runs_at(self) -> str:
        """Where the VM runs, in words; never a guess."""
        if self._lost_everywhere:
            return f"{NOWHERE}: {self.error}"
        if self.state in (S.RESOLVING, S.REVIVING):
            return "unknown until the register answers; paused at the source meanwhile"
        if self.past_point_of_no_return:
            return f"destination host {self.migration.destination}"
        if self.state is S.RESUMING and self._resume_attempts:
            return f"{NOWHERE} for the moment: paused at source host {self.migration.source}, to go on"
        if self.state in (S.LAST_PAGES, S.STATE, S.AWAITING_COMMIT):
            return f"{NOWHERE} for the moment: paused at the switchover"
        return f"source host {self.migration.source}"

    def report(self, now_s: float) -> MigrationReport:
        """What was measured so far."""
        iterations = [
            IterationReport(
                index=result.index,
                pages=result.pages,
                zero_pages=result.zero_pages,
                wire_bytes=result.wire_bytes,
                duration_ms=result.duration_s * 1000,
                dirty_pages_after=result.dirty_pages_after,
            )
            for result in self.passes
        ]
        if self._last_pages is not None:
            last = self._last_pages
            iterations.append(
                IterationReport(
                    index=last.index,
                    pages=last.pages,
                    zero_pages=last.zero_pages,
                    wire_bytes=last.wire_bytes,
                    duration_ms=last.duration_s * 1000,
                    dirty_pages_after=0,
                    suspended=True,
                )
            )
        predicted_s = self._predicted_downtime_s
        return MigrationReport(
            iterations=tuple(iterations),
            downtime=self._downtime,
            predicted_downtime_ms=None if predicted_s is None else predicted_s * 1000,
            wire_bytes=sum(entry.wire_bytes for entry in iterations) + self.state_bytes,
            ram_bytes=self.ram_bytes,
            state_bytes=self.state_bytes,
            total_ms=(now_s - self._started_s) * 1000,
            converged=self._converged,
            switch_reason=self.switch_reason,
            order=self.order,
            paging=self._paging_report(now_s),
        )

    def _paging_report(self, now_s: float) -> PagingReport | None:
        if not self._owing:
            return None
        since_s = self._paging_since_s
        residual_s = self._residual_s or (now_s - since_s if since_s is not None else 0.0)
        known = self._paging or PagingReport(owed_pages=self._owed_pages)
        return known.model_copy(update={"residual_ms": residual_s * 1000})

    # --- the way there ---------------------------------------------------------------------------

    def _cancel_early(self, _: ev.CancelRequested, now_s: float) -> Sequence[Command]:
        self._cancel_wanted = True
        return ()

    def _started(self, _: ev.Started, now_s: float) -> Sequence[Command]:
        if self._vm_died:
            return self._vm_lost(ev.QemuDied("it ended before the migration began"), now_s)
        if self._cancel_wanted:
            return self._give_up_cancel(ev.CancelRequested(), now_s)
        self.state = S.CONNECTING
        self._heard_s = now_s
        return (ev.ConnectPeer(),)

    def _recovered(self, event: ev.Recovered, now_s: float) -> Sequence[Command]:
        """A successor cannot go on with the pre-copy: the tracker's state died with its predecessor."""
        if event.paging:
            self._owing = True
            return self._retire(event, now_s)
        if event.reviving:
            self._owing = True
            return self._take_back(now_s)
        self._fail(Outcome.FAILED, "mover-died", "the source's mover died; its successor ended the migration")
        if event.state_may_be_sent:
            return self._ask_register(now_s)
        if self._vm_died:
            return self._vm_lost(ev.QemuDied("it ended while no mover watched it"), now_s)
        return self._go_on()

    def _connected(self, _: ev.Connected, now_s: float) -> Sequence[Command]:
        self.state = S.ARMING
        self._heard_s = now_s
        return (ev.ArmTracking(), ev.Publish())

    def _armed(self, event: ev.Armed, now_s: float) -> Sequence[Command]:
        self.state = S.PRECOPY
        self._switchover_cost_s = event.switchover_cost_s
        if self.migration.options.engine is Engine.QEMU:
            return (ev.RunNative(), ev.Publish())
        if begins_suspended(self.migration.options):
            self._rest = rest_of(self.migration.options)
            self.switch_reason = "no pass before the switchover was asked for"
            return self._suspend(now_s)
        if self._switch_wanted:
            return self._switch_as_asked(now_s)
        return (ev.SendPass(0), ev.Publish())

    def _suspend(self, now_s: float) -> Sequence[Command]:
        self.state = S.SUSPENDING
        self._pausing_s = now_s
        # No report: both daemons would be busy with it while the VM stands still. The clock's comes soon.
        return (ev.PauseVm(),)

    def _note_switch(self, _: ev.SwitchRequested, now_s: float) -> Sequence[Command]:
        self._switch_wanted = True
        return ()

    def _switch_as_asked(self, now_s: float) -> Sequence[Command]:
        self.switch_reason = "post-copy was asked for while it ran"
        self._rest = Rest.BOTH
        return self._suspend(now_s)

    def _switch_requested(self, _: ev.SwitchRequested, now_s: float) -> Sequence[Command]:
        """The driver lets this through only when the destination is prepared for faults."""
        self._switch_wanted = True
        self._interrupting = True
        return (ev.InterruptPass(),)

    def _pass_ended(self, event: ev.PassEnded, now_s: float) -> Sequence[Command]:
        self.passes.append(event.result)
        decision = decide(
            self.passes,
            self.migration.options,
            self.ram_bytes // PAGE_BYTES,
            self._switchover_cost_s,
            now_s - self._started_s,
        )
        self.last_decision = decision
        self._predicted_downtime_s = decision.predicted_downtime_s
        self._interrupting = False
        if self._switch_wanted:
            return self._switch_as_asked(now_s)
        if decision.choice is Choice.ABORT:
            return self._abort(Outcome.FAILED, "deadline", decision.reason)
        if decision.choice is Choice.SWITCH:
            self.switch_reason = decision.reason
            self._converged = decision.converged
            self._rest = decision.rest
            return self._suspend(now_s)
        return (ev.SendPass(event.result.index + 1),)

    def _not_now(self, event: ev.RegisterSilent, now_s: float) -> Sequence[Command]:
        """Go on with the pre-copy until the register answers, or until the deadline."""
        if now_s - self._started_s >= self.migration.options.deadline_s:
            return self._abort(Outcome.FAILED, "store", f"the register did not answer: {event.message}")
        if not self.passes and self._rest.after_resume:
            return (ev.PauseVm(),)
        self.state = S.PRECOPY
        return (ev.SendPass(len(self.passes)), ev.Publish())

    def _native_paused(self, event: ev.VmPaused, now_s: float) -> Sequence[Command]:
        self.state = S.LAST_PAGES
        self._pausing_s = now_s if event.since_s is None else event.since_s
        self._marks_s["paused"] = now_s
        self.switch_reason = "QEMU's engine found the rest small enough"
        return (ev.Publish(),)

    def _paused(self, event: ev.VmPaused, now_s: float) -> Sequence[Command]:
        assert self._pausing_s is not None
        self.state = S.LAST_PAGES
        self._pausing_s = self._pausing_s if event.since_s is None else event.since_s
        self._marks_s["paused"] = now_s
        self._downtime = self._downtime.model_copy(update={"stop_ms": (now_s - self._pausing_s) * 1000})
        return (ev.SendLastPages(self._rest, self._budget_pages()),)

    def _budget_pages(self) -> int:
        """How many of the latest dirty pages may travel while the VM is suspended, when the others are owed.

        They are the ones that it needs first, and the promised downtime has room for them (claim 11).
        """
        decision = self.last_decision
        if decision is None or not self._rest.after_resume:
            return 0
        room_s = self.migration.options.max_downtime_ms / 1000 * BUDGET_SHARE - self._switchover_cost_s
        return max(0, round(room_s * decision.rate_bytes_s / PAGE_BYTES))

    def _last_pages_sent(self, event: ev.LastPagesSent, now_s: float) -> Sequence[Command]:
        self.state = S.STATE
        self._last_pages = event.result
        self._owed_pages = event.owed_pages
        self._owing = event.owed_pages > 0
        self._marks_s["last-pages"] = now_s
        last_pages_s = now_s - self._marks_s["paused"] - event.verify_s
        self._downtime = self._downtime.model_copy(
            update={"last_pages_ms": last_pages_s * 1000, "verify_ms": event.verify_s * 1000}
        )
        return (ev.SendState(),)

    def _state_sent(self, event: ev.StateSent, now_s: float) -> Sequence[Command]:
        self.state = S.AWAITING_COMMIT
        self.state_bytes = event.state_bytes
        self._heard_s = self._state_sent_s = now_s
        self._downtime = self._downtime.model_copy(
            update={"state_out_ms": (now_s - self._marks_s["last-pages"]) * 1000}
        )
        # At once: to load the device state may need a page, and in mode background nobody asks for it.
        self._push_begun = self._owing
        return (ev.StartPush(),) if self._owing else ()

    def _committed(self, _: ev.PeerCommitted, now_s: float) -> Sequence[Command]:
        self.state = S.COMMITTED
        self._heard_s = now_s
        self._clear_failure()
        return ()

    def _running(self, event: ev.PeerRunning, now_s: float) -> Sequence[Command]:
        self._late_running(event, now_s)
        self._clear_failure()
        if self._owing and self._paging is None:
            self.state = S.PAGING
            self._heard_s = self._paging_since_s = now_s
            # A cancel that came too late may have kept the push from its usual beginning.
            return (ev.Publish(),) if self._push_begun else (ev.StartPush(), ev.Publish())
        self.state = S.RETIRING
        return (ev.Publish(), ev.RetireVm())

    def _late_running(self, event: ev.PeerRunning, now_s: float) -> Sequence[Command]:
        downtime_s = 0.0 if self._pausing_s is None else now_s - self._pausing_s
        self._downtime = self._downtime.model_copy(
            update={
                "load_ms": event.load_s * 1000,
                "commit_ms": event.commit_s * 1000,
                "resume_ms": event.resume_s * 1000,
                "total_ms": downtime_s * 1000,
            }
        )
        return ()

    def _retire(self, event: Event, now_s: float) -> Sequence[Command]:
        if self._owing and self._paging is None:
            return self._look_again(event, now_s)
        self.state = S.RETIRING
        return (ev.StopWork(), ev.Publish(), ev.RetireVm())

    # --- pages owed after the resume -------------------------------------------------------------

    def _note_paged(self, event: ev.PeerPaged, now_s: float) -> Sequence[Command]:
        self._paging = event.paging
        return ()

    def _note_difference(self, event: ev.MemoryDiffers, now_s: float) -> Sequence[Command]:
        """The destination is told too, and ends: only when the record says so is the memory here let go."""
        self._difference = event.difference
        return ()

    def _paged(self, event: ev.PeerPaged, now_s: float) -> Sequence[Command]:
        self._paging = event.paging
        return self._all_paged(now_s)

    def _all_paged(self, now_s: float) -> Sequence[Command]:
        if self._paging_since_s is not None:
            self._residual_s = now_s - self._paging_since_s
        self.state = S.RETIRING
        return (ev.Publish(), ev.RetireVm())

    def _look_again(self, _: Event, now_s: float) -> Sequence[Command]:
        """The destination cannot be reached, and lacks pages that nobody else has."""
        self.state = S.RECONNECTING
        self._clear_failure()
        if self._paging_since_s is None:
            self._paging_since_s = now_s
        self._reconnecting = True
        return (ev.StopWork(), ev.Publish(), ev.Reconnect())

    def _reconnected(self, event: ev.Reconnected, now_s: float) -> Sequence[Command]:
        self._reconnecting = self._revive_wanted = False  # it is there after all
        self._heard_s = now_s
        if event.missing_pages == 0 and not event.to_compare:
            return self._all_paged(now_s)
        self.state = S.PAGING
        return (ev.StartPush(), ev.Publish())

    def _reconnect_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        if event.command != ev.Reconnect.__name__:
            return ()
        self._reconnecting = False
        if event.code == PagesLost.code:
            self._memory_lost = True  # which is no loss when the destination lacked none of it any more
            self._reconnect_due_s = now_s + RECONNECT_S
            return (ev.AskController(),)
        self._reconnect_due_s = now_s + RECONNECT_S
        # QEMU may have died since that was asked for: nothing is left then that could run.
        return self._take_back(now_s) if self._revive_wanted and not self._vm_died else ()

    def _tick_reconnecting(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        if self._reconnecting or now_s < self._reconnect_due_s:
            return ()
        if self._memory_lost:
            self._reconnect_due_s = now_s + RECONNECT_S
            return (ev.AskController(),)
        self._reconnecting = True
        # The destination may have all it needs, and have ended before its word came through.
        return (ev.Reconnect(), ev.AskController())

    def _migration_known(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        """Only the destination's own word counts: the controller may end a record for other reasons."""
        if event.paged:
            return self._all_paged(now_s)
        if event.failed:
            return self._end_owing("host-lost", "the destination has ended without the pages it was owed")
        if self._memory_lost:
            return self._all_paged(now_s) if event.lacks_nothing else self._lose_pages()
        return ()

    # --- back from a destination that is lost ----------------------------------------------------

    def _revive(self, _: ev.ReviveRequested, now_s: float) -> Sequence[Command]:
        """A search that is under way comes to its end first: a destination that answers keeps the VM."""
        if self._vm_died:
            return ()  # nothing is left that could run
        self._revive_wanted, self.revival_refused = True, False
        return () if self._reconnecting else self._take_back(now_s)

    def _take_back(self, now_s: float) -> Sequence[Command]:
        """Only the register makes the VM ours again; then a destination that comes back must end it."""
        self._revive_wanted = False
        self.state = S.REVIVING
        self._swap_under_way = True
        self._asked_register_s = now_s
        return (ev.SwapBack(), ev.Publish())

    def _revive_won(self, _: Event, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        destination = self.migration.destination
        self._fail(
            Outcome.FAILED,
            REVIVED,
            f"host {destination} was given up while it still lacked pages: VM {self.migration.vm} is back as "
            "it was suspended, and what it did there is lost",
        )
        if self._vm_died:
            return self._vm_lost(ev.QemuDied("it ended while the VM was taken back"), now_s)
        self.state = S.RESUMING
        return (ev.StopWork(), ev.ResumeVm())

    def _revive_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        if event.owner == self.migration.source:
            return self._revive_won(event, now_s)  # an earlier try was made, only its answer was lost
        self._reconnect_due_s = now_s
        self.revival_refused = True
        self.state = S.RECONNECTING
        return (ev.Publish(),)

    def _tick_reviving(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._swap_again(ev.SwapBack(), now_s)

    # --- pages that are lost ---------------------------------------------------------------------

    def _lose_pages(self) -> Sequence[Command]:
        """The source's QEMU and its mover have both died: what they held is gone, and that must be said."""
        return self._end_owing(
            PagesLost.code,
            f"the source's QEMU and mover died while pages were owed: VM {self.migration.vm} runs at host "
            f"{self.migration.destination} and stands still where it needs one of them; end it with "
            "`transhume vm kill`, and start it from its disks",
        )

    def _end_owing(self, code: str, message: str) -> Sequence[Command]:
        self._ended_owing = True
        self.state = S.RETIRING
        self._fail(Outcome.FAILED, code, message)
        return (ev.StopWork(), ev.Publish(), ev.RetireVm())

    def _tick_paging(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._look_again(self._silence(), now_s) if self._silent(now_s) else ()

    def _retired(self, _: ev.VmRetired, now_s: float) -> Sequence[Command]:
        self.state = S.DONE
        if self._difference:
            migration = self.migration
            words = MemoryDiffers.words(migration.vm, migration.destination, self._difference)
            self._fail(Outcome.FAILED, MemoryDiffers.code, words)
        elif not self._ended_owing:
            self.outcome = Outcome.COMPLETED
        return (ev.TellPeerFinished(), ev.Publish(ended=True))

    def _retire_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        if event.command != ev.RetireVm.__name__:
            return ()
        self.error = f"the source could not free the VM: {event.message}"
        return self._retired(ev.VmRetired(), now_s)

    # --- trouble before the destination may commit -----------------------------------------------

    def _give_up_link(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        return self._abort(Outcome.FAILED, event.code, event.message)

    def _give_up_peer(self, event: ev.PeerFailed, now_s: float) -> Sequence[Command]:
        return self._abort(Outcome.FAILED, event.code, f"the destination gave up: {event.message}")

    def _give_up_command(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        return self._abort(Outcome.FAILED, event.code, event.message)

    def _give_up_cancel(self, _: ev.CancelRequested, now_s: float) -> Sequence[Command]:
        return self._abort(Outcome.CANCELLED, "cancelled", "cancelled before the switchover")

    def _abort(self, outcome: Outcome, code: str, message: str) -> Sequence[Command]:
        self._fail(outcome, code, message)
        return self._go_on()

    def _go_on(self) -> Sequence[Command]:
        self.state = S.RESUMING
        return (ev.StopWork(), ev.ResumeVm(), ev.TellPeerAborted(self.error))

    def _resumed(self, _: ev.VmResumed, now_s: float) -> Sequence[Command]:
        self.state = S.ABORTED
        return (ev.Publish(ended=True),)

    def _resume_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        if event.command != ev.ResumeVm.__name__:
            return ()
        self._resume_attempts += 1
        # One that was taken back has no other home: its disks may be locked until a host that was only cut
        # off has ended it there.
        if self._resume_attempts < RESUME_ATTEMPTS or self.error_code == REVIVED:
            self._resume_due_s = now_s + SWAP_RETRY_S
            return ()
        self.error = f"{self.error}; and the source's QEMU would not go on: {event.message}"
        self._lost_everywhere = True
        self.state = S.ABORTED
        return (ev.Publish(ended=True),)

    def _tick_resuming(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        if self._resume_due_s is None or now_s < self._resume_due_s:
            return ()
        self._resume_due_s = None
        return (ev.ResumeVm(),)

    def _vm_lost(self, event: ev.QemuDied, now_s: float) -> Sequence[Command]:
        self._fail(Outcome.FAILED, "vmm", f"the source's QEMU died: {event.message}")
        self._lost_everywhere = True
        self.state = S.ABORTED
        return (ev.StopWork(), ev.TellPeerAborted(self.error), ev.Publish(ended=True))

    # --- trouble while the destination may commit: the register decides --------------------------

    def _resolve_link(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        self._fail(Outcome.FAILED, event.code, event.message)
        return self._ask_register(now_s)

    def _resolve_command(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        self._fail(Outcome.FAILED, event.code, event.message)
        return self._ask_register(now_s)

    def _resolve_cancel(self, _: ev.CancelRequested, now_s: float) -> Sequence[Command]:
        self._fail(Outcome.CANCELLED, "cancelled", "cancelled at the switchover")
        return self._ask_register(now_s)

    def _ask_register(self, now_s: float) -> Sequence[Command]:
        self.state = S.RESOLVING
        self._swap_under_way = True
        self._asked_register_s = now_s
        return (ev.SwapToSource(), ev.Publish())

    def _abort_won(self, _: ev.SwapWon, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        if self._vm_died:
            return self._vm_lost(ev.QemuDied("it ended during the switchover"), now_s)
        return self._go_on()

    def _abort_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        if event.owner == self.migration.source:
            # An earlier swap of ours was made although its answer was lost, or the destination's
            # successor made it for us: either way no commit can follow in this epoch.
            return self._abort_won(ev.SwapWon(), now_s)
        self._clear_failure()
        return self._retire(event, now_s)

    def _swap_unknown(self, _: Event, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        self._asked_register_s = now_s
        return ()

    def _peer_gave_up_undecided(self, event: ev.PeerFailed, now_s: float) -> Sequence[Command]:
        self._fail(Outcome.FAILED, event.code, f"the destination gave up: {event.message}")
        return self._abort_won(ev.SwapWon(), now_s)

    def _peer_gave_up_while_resolving(self, event: ev.PeerFailed, now_s: float) -> Sequence[Command]:
        """The destination cannot commit any more, so the VM need not wait for the register."""
        return self._abort_won(ev.SwapWon(), now_s)

    def _tick_resolving(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._swap_again(ev.SwapToSource(), now_s)

    def _swap_again(self, swap: Command, now_s: float) -> Sequence[Command]:
        if self._swap_under_way or now_s - self._asked_register_s < SWAP_RETRY_S:
            return ()
        self._swap_under_way = True
        self._asked_register_s = now_s
        return (swap,)

    def _qemu_died_undecided(self, _: ev.QemuDied, now_s: float) -> Sequence[Command]:
        """The destination may have all it needs: only if it does not commit is the VM lost."""
        self._vm_died = True
        return ()

    def _options_changed(self, event: ev.OptionsChanged, now_s: float) -> Sequence[Command]:
        self.migration = self.migration.model_copy(update={"options": event.options})
        return ()

    # --- time ------------------------------------------------------------------------------------

    def _heard(self, _: ev.PeerHeard, now_s: float) -> Sequence[Command]:
        self._heard_s = now_s
        return ()

    def _silent(self, now_s: float) -> bool:
        return now_s - self._heard_s > self.migration.options.peer_silence_limit_s

    def _silence(self) -> ev.LinkLost:
        limit_s = self.migration.options.peer_silence_limit_s
        return ev.LinkLost("timed-out", f"host {self.migration.destination} said nothing for {limit_s:g} s")

    def _tick_connecting(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        if now_s - self._heard_s <= CONNECT_LIMIT_S:
            return ()
        message = f"no connection to host {self.migration.destination} within {CONNECT_LIMIT_S:g} s"
        return self._abort(Outcome.FAILED, "timed-out", message)

    def _tick_silence(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._give_up_link(self._silence(), now_s) if self._silent(now_s) else ()

    def _tick_precopy(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        if self._silent(now_s):
            return self._give_up_link(self._silence(), now_s)
        options = self.migration.options
        if now_s - self._started_s < options.deadline_s or self._interrupting:
            return ()
        if options.engine is Engine.QEMU or options.on_deadline == "abort":
            return self._abort(
                Outcome.FAILED, "deadline", "the deadline passed before the migration converged"
            )
        self._interrupting = True
        return (ev.InterruptPass(),)

    def _tick_undecided(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._resolve_link(self._silence(), now_s) if self._silent(now_s) else ()

    def _tick_awaiting(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        if now_s - self._state_sent_s > COMMIT_LIMIT_S:
            message = f"host {self.migration.destination} did not commit within {COMMIT_LIMIT_S:g} s"
            return self._resolve_link(ev.LinkLost("timed-out", message), now_s)
        return self._tick_undecided(event, now_s)

    def _tick_committed(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._retire(event, now_s) if now_s - self._heard_s > FINISH_LIMIT_S else ()

    def _fail(self, outcome: Outcome, code: str, message: str) -> None:
        self.outcome, self.error_code, self.error = outcome, code, message

    def _clear_failure(self) -> None:
        self.outcome, self.error_code, self.error = Outcome.RUNNING, "", ""
