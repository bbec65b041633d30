"""The destination's half of a migration, without I/O.

It may commit exactly when it holds everything: all RAM, the device state whole, and a QEMU that has
loaded it. The commit is the swap `(source, e) -> (destination, e + 1)`. While that swap is under way,
or its outcome unknown, nothing else is decided: neither may the VM run nor may it be destroyed. "I gave
up for good" (`TellPeerFailed`) is said only after the VM here is gone and with no swap under way, so that
the source may believe it and go on without asking the register.

Pages may be owed when the VM resumes. Then the VM runs here whatever becomes of the connection: a vCPU that
needs a missing page waits for it, and the source is awaited, for ever unless `give_up_after_s` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from transhume.migration import events as ev
from transhume.migration.destination_table import PHASES, TABLE, D, DestinationState
from transhume.migration.machine import Command, Event, Machine
from transhume.model.errors import MemoryDiffers, PagesLost
from transhume.model.migration import NOWHERE, Migration, Outcome, Phase

ASK_AGAIN_S = 2.0
"""Step 3A: how often a waiting destination asks whether the migration still goes on."""

SWAP_RETRY_S = 0.5
RESUME_ATTEMPTS = 5
REVOKED = "revoked"
"""The error code of a VM that ran here and was taken back while this host could not be reached."""

COMPARE_WAIT_S = 60.0
"""How long a VM that has all its pages waits for a lost source to verify them, before it goes without."""

FINISH_LIMIT_S = 15.0
"""How long a running destination waits for the source's farewell."""


class DestinationMachine(Machine[DestinationState]):
    """One migration, seen from the host that will run the VM."""

    table: ClassVar = TABLE
    final: ClassVar = frozenset({D.DONE, D.ABORTED})

    def __init__(self, migration: Migration, now_s: float, owed_pages: int = 0) -> None:
        """`owed_pages`: what a predecessor was still to be given, which is known before anything else."""
        super().__init__(D.CREATING)
        self.migration = migration
        self.outcome = Outcome.RUNNING
        self.error_code = ""
        self.error = ""
        self._heard_s = now_s
        self._waiting_since_s = now_s
        self._asked_s = now_s
        self._state_received_s: float | None = None
        self._loading_since_s = now_s
        self._loaded = False
        self._swap_under_way = False
        self._swap_unanswered = False
        self._swap_asked_s = now_s
        self._load_s = 0.0
        self.commit_since_s = now_s
        self.commit_s = 0.0
        self._resume_since_s = now_s
        self._resume_attempts = 0
        self._resume_due_s: float | None = None
        self._qemu_died = False
        self._cancel_wanted = False
        self._never_connected = True
        self._vm_is_lost = False
        self._owed_pages = owed_pages
        self._all_here = False
        self._all_in_place = False
        self._source_lost_since_s: float | None = now_s if owed_pages else None
        self._reading_copy = False
        self._lost_at_source = False

    @property
    def phase(self) -> Phase:
        """The patent's step that this state belongs to."""
        return PHASES[self.state]

    @property
    def runs_at(self) -> str:
        """Where the VM runs as far as this end knows, in words."""
        if self._vm_is_lost:
            return f"{NOWHERE}: {self.error}"
        if self.state is D.PAGING and self._source_lost_since_s is not None and not self._all_in_place:
            return (
                f"destination host {self.migration.destination}; it lacks pages that only host "
                f"{self.migration.source} has, and waits for them"
            )
        if self.state in (D.RESUMING, D.PAGING, D.RUNNING, D.DONE):
            return f"destination host {self.migration.destination}"
        if self.state in (D.COMMITTING, D.REVOKING):
            return "unknown until the register answers"
        return f"source host {self.migration.source}"

    @property
    def source_never_came(self) -> bool:
        """Whether no source ever connected: then no other end will report the failure."""
        return self._never_connected

    # --- the way there ---------------------------------------------------------------------------

    def _cancel_early(self, _: ev.CancelRequested, now_s: float) -> Sequence[Command]:
        self._cancel_wanted = True
        return ()

    def _begin_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        """The VM could not be made, or a successor could not look for it: the register tells which."""
        return self._revoke(event.code, event.message, now_s)

    def _listening(self, _: ev.Listening, now_s: float) -> Sequence[Command]:
        if self._qemu_died:
            return self._give_up_qemu(ev.QemuDied("it ended before the source came"), now_s)
        if self._cancel_wanted:
            return self._give_up_cancel(ev.CancelRequested(), now_s)
        self.state = D.WAITING
        self._waiting_since_s = self._asked_s = now_s
        return (ev.Publish(),)

    def _recovered(self, _: ev.Recovered, now_s: float) -> Sequence[Command]:
        """The predecessor may have sent a commit whose answer nobody read.

        So before anything is destroyed the register is moved on: after `(source, e + 1)` no late commit
        of this epoch can succeed.
        """
        return self._revoke("mover-died", "the destination's mover died", now_s)

    def _source_connected(self, _: ev.SourceConnected, now_s: float) -> Sequence[Command]:
        self.state = D.RECEIVING
        self._heard_s = now_s
        self._never_connected = False
        return (ev.Publish(),)

    def _more_owed(self, event: ev.LastPagesReceived, now_s: float) -> Sequence[Command]:
        self._owed_pages += event.owed_pages
        return self._heard(event, now_s)

    def _note_all_paged(self, _: ev.AllPaged, now_s: float) -> Sequence[Command]:
        self._all_here = True
        return ()

    def _note_all_placed(self, _: ev.AllPlaced, now_s: float) -> Sequence[Command]:
        self._all_in_place = True
        return ()

    def _last_pages(self, event: ev.LastPagesReceived, now_s: float) -> Sequence[Command]:
        self.state = D.LOADING
        self._owed_pages = event.owed_pages
        self._heard_s = now_s
        self._loading_since_s = now_s
        return ()

    def _state_received(self, _: ev.StateReceived, now_s: float) -> Sequence[Command]:
        self._heard_s = now_s
        self._state_received_s = now_s
        return self._commit_when_complete(now_s)

    def _state_loaded(self, _: ev.StateLoaded, now_s: float) -> Sequence[Command]:
        self._loaded = True
        return self._commit_when_complete(now_s)

    def _loaded_early(self, _: ev.StateLoaded, now_s: float) -> Sequence[Command]:
        """QEMU's own engine brings memory and state together, before the source's end mark."""
        self._loaded = True
        return ()

    def _commit_when_complete(self, now_s: float) -> Sequence[Command]:
        if self._state_received_s is None or not self._loaded:
            return ()
        self._load_s = now_s - self._state_received_s
        self.state = D.COMMITTING
        self.commit_since_s = self._swap_asked_s = now_s
        self._swap_under_way = True
        return (ev.SwapToDestination(),)

    def _commit_won(self, _: Event, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        self._fail("", "")  # whatever went wrong on the way, the VM is ours now
        self.commit_s = now_s - self.commit_since_s
        self._resume_since_s = now_s
        self.state = D.RESUMING
        if self._qemu_died:
            return (ev.TellPeerCommitted(), *self._vm_lost(ev.QemuDied("it ended during the commit"), now_s))
        return (ev.ResumeVm(), ev.TellPeerCommitted())

    def _commit_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        if event.owner == self.migration.destination and event.epoch == self.migration.epoch + 1:
            return self._commit_won(event, now_s)  # an earlier try was made, only its answer was lost
        self._swap_under_way = False
        return self._give_up("aborted", "the source took the migration back before the commit")

    def _commit_refused(self, event: ev.SwapRefused, now_s: float) -> Sequence[Command]:
        if self._swap_unanswered:
            return self._swap_unknown(event, now_s)  # an earlier try may still be made
        self._swap_under_way = False
        return self._give_up("store-full", event.message)

    def _resumed(self, _: ev.VmResumed, now_s: float) -> Sequence[Command]:
        self._heard_s = now_s
        running = ev.TellPeerRunning(self._load_s, self.commit_s, now_s - self._resume_since_s)
        if self._owed_pages == 0:
            self.state = D.RUNNING
            return (running, ev.Publish())
        if self._all_here:
            self.state = D.RUNNING
            return (running, ev.TellPeerPaged(), ev.Publish())
        self.state = D.PAGING
        return (running, *self._verify(), ev.Publish())

    def _verify(self) -> Sequence[Command]:
        """Once all pages are here and whenever the source is."""
        return (ev.VerifyPages(),) if self._all_in_place and self._source_lost_since_s is None else ()

    def _all_placed(self, event: ev.AllPlaced, now_s: float) -> Sequence[Command]:
        self._note_all_placed(event, now_s)
        return self._verify()

    def _memory_differs(self, event: ev.MemoryDiffers, now_s: float) -> Sequence[Command]:
        """Said by both ends: the source lets go only when it has heard that the record says so."""
        migration = self.migration
        self._fail(
            MemoryDiffers.code, MemoryDiffers.words(migration.vm, migration.destination, event.difference)
        )
        self.outcome = Outcome.FAILED
        self.state = D.DONE
        return (ev.Publish(ended=True),)

    def _all_paged(self, _: ev.AllPaged, now_s: float) -> Sequence[Command]:
        self.state = D.RUNNING
        self._heard_s = now_s
        return (ev.TellPeerPaged(), ev.Publish())

    def _note_source_lost(self, _: ev.LinkLost, now_s: float) -> Sequence[Command]:
        if self._source_lost_since_s is None:
            self._source_lost_since_s = now_s
        return ()

    def _note_source_back(self, _: ev.SourceConnected, now_s: float) -> Sequence[Command]:
        self._source_lost_since_s = None
        return ()

    def _source_lost(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        self._note_source_lost(event, now_s)
        return (ev.Publish(), *self._read_copy())

    def _source_back(self, _: ev.SourceConnected, now_s: float) -> Sequence[Command]:
        self._source_lost_since_s = None
        self._heard_s = now_s
        return (*self._verify(), ev.Publish())

    def _tick_paging(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        """Wait for a source that was lost, for ever if nobody set a limit: only it has what is missing."""
        limit_s, since_s = self.migration.options.give_up_after_s, self._source_lost_since_s
        if since_s is None:
            return ()
        if self._all_in_place and now_s - since_s >= min(limit_s or COMPARE_WAIT_S, COMPARE_WAIT_S):
            return self._all_paged(ev.AllPaged(), now_s)  # the report says that nothing was verified
        if limit_s is not None and now_s - since_s >= limit_s and not self._all_in_place:
            return self._lose_pages("host-lost", f"was not found again within {limit_s:g} s")
        if now_s - self._asked_s < ASK_AGAIN_S:
            return ()
        self._asked_s = now_s
        return (ev.AskController(), *self._read_copy())

    def _read_copy(self) -> Sequence[Command]:
        """Go on from the safe copy, if there is one: what is in it need not be waited for."""
        if self.migration.options.safe_dir is None or self._reading_copy:
            return ()
        self._reading_copy = True
        return (ev.ReadSafeCopy(),)

    def _safe_copy_read(self, event: ev.SafeCopyRead, now_s: float) -> Sequence[Command]:
        self._reading_copy = False
        if event.left_pages and self._lost_at_source:
            return self._lose_pages(PagesLost.code, "has lost them, and the safe copy does not hold them all")
        return ()

    def _safe_copy_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        """The copy is looked for again as long as the source is lost: it may only now have become
        readable.
        """
        if event.command != ev.ReadSafeCopy.__name__:
            return ()
        self._reading_copy = False
        if self._lost_at_source:
            return self._lose_pages(PagesLost.code, f"has lost them, and {event.message}")
        return ()

    def _known_while_paging(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        """The source may have told the controller that it has lost what it owed, or taken the VM back."""
        if event.revoked:
            return self._end_what_was_taken_back()
        if not event.pages_lost:
            return ()
        if self._all_in_place:
            return self._all_paged(ev.AllPaged(), now_s)
        if self.migration.options.safe_dir is None:
            return self._lose_pages(PagesLost.code, "has lost them")
        self._lost_at_source = True
        return self._read_copy()

    def _known_while_running(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        """A VM that found all its pages elsewhere may have been taken back for want of them."""
        return self._end_what_was_taken_back() if event.revoked else ()

    def _end_what_was_taken_back(self) -> Sequence[Command]:
        return self._give_up(
            REVOKED, f"VM {self.migration.vm} was taken back to host {self.migration.source}"
        )

    def _lose_pages(self, code: str, what: str) -> Sequence[Command]:
        self._fail(
            code,
            f"the VM lacks pages that only host {self.migration.source} had, which {what}: where it needs "
            "one it stands still. End it with `transhume vm kill`, and start it from its disks",
        )
        self.outcome = Outcome.FAILED
        self.state = D.DONE
        return (ev.Publish(ended=True),)

    def _finished(self, _: ev.PeerFinished, now_s: float) -> Sequence[Command]:
        self.state = D.DONE
        self.outcome = Outcome.COMPLETED
        return (ev.Publish(ended=True),)

    def _finished_alone(self, _: Event, now_s: float) -> Sequence[Command]:
        return self._finished(ev.PeerFinished(), now_s)

    # --- trouble before the commit ---------------------------------------------------------------

    def _give_up_link(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        return self._give_up(event.code, event.message)

    def _peer_aborted(self, event: ev.PeerAborted, now_s: float) -> Sequence[Command]:
        return self._give_up("aborted", event.message)

    def _give_up_command(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        return self._give_up(event.code, event.message)

    def _give_up_qemu(self, event: ev.QemuDied, now_s: float) -> Sequence[Command]:
        when = " while it loaded the device state" if self.state is D.LOADING else ""
        return self._give_up("vmm", f"the destination's QEMU died{when}: {event.message}")

    def _give_up_cancel(self, _: ev.CancelRequested, now_s: float) -> Sequence[Command]:
        return self._give_up("cancelled", "cancelled")

    def _give_up(self, code: str, message: str) -> Sequence[Command]:
        self._fail(code, message)
        self.state = D.DESTROYING
        return (ev.StopWork(), ev.DestroyVm())

    def _destroyed(self, _: ev.VmDestroyed, now_s: float) -> Sequence[Command]:
        self.state = D.ABORTED
        self.outcome = Outcome.FAILED
        return (ev.TellPeerFailed(self.error_code, self.error), ev.Publish(ended=True))

    def _destroy_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        if event.command != ev.DestroyVm.__name__:
            return ()
        # The source is not told: it must not take a VM that may still exist for gone.
        self.error = f"{self.error}; and the destination VM could not be removed: {event.message}"
        self.state = D.ABORTED
        self.outcome = Outcome.FAILED
        return (ev.Publish(ended=True),)

    # --- trouble around the commit ---------------------------------------------------------------

    def _swap_unknown(self, _: Event, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        self._swap_unanswered = True
        self._swap_asked_s = now_s
        return ()

    def _tick_committing(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        """Ask again; but with a QEMU that died meanwhile, to take the commit back rather than to make it."""
        if self._swap_under_way or now_s - self._swap_asked_s < SWAP_RETRY_S:
            return ()
        if self._qemu_died:
            return self._revoke("vmm", "the destination's QEMU died before the commit", now_s)
        self._swap_under_way = True
        self._swap_asked_s = now_s
        return (ev.SwapToDestination(),)

    def _tick_revoking(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        if self._swap_under_way or now_s - self._swap_asked_s < SWAP_RETRY_S:
            return ()
        self._swap_under_way = True
        self._swap_asked_s = now_s
        return (ev.SwapToSource(),)

    def _revoke(self, code: str, message: str, now_s: float) -> Sequence[Command]:
        self._fail(code, message)
        self.state = D.REVOKING
        self._swap_under_way = True
        self._swap_asked_s = now_s
        return (ev.SwapToSource(),)

    def _revoked(self, _: ev.SwapWon, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        return self._give_up(self.error_code, self.error)

    def _revoke_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        if event.owner == self.migration.destination:
            return self._commit_won(event, now_s)
        return self._give_up(self.error_code, self.error)

    def _note_qemu_died(self, _: ev.QemuDied, now_s: float) -> Sequence[Command]:
        self._qemu_died = True
        return ()

    def _resume_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        if event.command != ev.ResumeVm.__name__:
            return ()
        self._resume_attempts += 1
        if self._resume_attempts < RESUME_ATTEMPTS:
            self._resume_due_s = now_s + SWAP_RETRY_S
            return ()
        return self._vm_lost(ev.QemuDied(f"it would not resume: {event.message}"), now_s)

    def _tick_resuming(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        if self._resume_due_s is None or now_s < self._resume_due_s:
            return ()
        self._resume_due_s = None
        return (ev.ResumeVm(),)

    def _vm_lost(self, event: ev.QemuDied, now_s: float) -> Sequence[Command]:
        self._fail("vmm", f"the destination's QEMU died after the commit: {event.message}")
        self._vm_is_lost = True
        self.state = D.DONE
        self.outcome = Outcome.FAILED
        return (ev.Publish(ended=True),)

    # --- time ------------------------------------------------------------------------------------

    def _heard(self, _: Event, now_s: float) -> Sequence[Command]:
        self._heard_s = now_s
        return ()

    def _migration_known(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        if event.going_on:
            return ()
        return self._give_up("aborted", "the migration was given up before the source connected")

    def _tick_waiting(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        limit_s = self.migration.options.wait_limit_s
        if now_s - self._waiting_since_s > limit_s:
            return self._give_up(
                "timed-out", f"source host {self.migration.source} did not come within {limit_s:g} s"
            )
        if now_s - self._asked_s < ASK_AGAIN_S:
            return ()
        self._asked_s = now_s
        return (ev.AskController(),)

    def _tick_silence(self, _: ev.Tick, now_s: float) -> Sequence[Command]:
        limit_s = self.migration.options.peer_silence_limit_s
        if now_s - self._heard_s <= limit_s:
            return ()
        return self._give_up(
            "timed-out", f"source host {self.migration.source} said nothing for {limit_s:g} s"
        )

    def _tick_running(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        """Wait for the source's farewell; one that is lost may have taken the VM back meanwhile."""
        if now_s - self._heard_s > FINISH_LIMIT_S:
            return self._finished_alone(event, now_s)
        if self._source_lost_since_s is None or now_s - self._asked_s < ASK_AGAIN_S:
            return ()
        self._asked_s = now_s
        return (ev.AskController(),)

    def _fail(self, code: str, message: str) -> None:
        self.error_code, self.error = code, message
