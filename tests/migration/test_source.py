"""Conversations with the source's machine: what it hears, what it answers."""

from __future__ import annotations

import pytest
from tests.migration.conversation import Conversation, Conversations

from transhume.migration import events as ev
from transhume.migration.driver.loop import Begin
from transhume.migration.machine import Command, Event
from transhume.migration.source import (
    COMMIT_LIMIT_S,
    CONNECT_LIMIT_S,
    FINISH_LIMIT_S,
    RECONNECT_S,
    RESUME_ATTEMPTS,
    REVIVED,
    SWAP_RETRY_S,
    SourceMachine,
)
from transhume.migration.source_table import SourceState
from transhume.model.errors import PagesLost
from transhume.model.migration import (
    Engine,
    Migration,
    MigrationOptions,
    Mode,
    OnDeadline,
    Outcome,
    PagingReport,
    Phase,
    Rest,
)
from transhume.model.vm import PAGE_BYTES

S = SourceState
Talk = Conversation[SourceMachine]

RAM_PAGES = 4096
LINK_LOST = ev.LinkLost("host-lost", "the connection broke")
PEER_FAILED = ev.PeerFailed("vmm", "its QEMU refused the device state")
PEER_RUNNING = ev.PeerRunning(load_s=0.004, commit_s=0.003, resume_s=0.002)
LOST_TO_DESTINATION = ev.SwapLost("south", 8)
LOST_TO_SOURCE = ev.SwapLost("north", 8)


def new_machine(options: MigrationOptions) -> SourceMachine:
    migration = Migration(id="m1", vm="web", source="north", destination="south", epoch=7, options=options)
    return SourceMachine(migration, RAM_PAGES * PAGE_BYTES, now_s=0.0)


conversation = Conversations(new_machine)


def pass_result(index: int, pages: int, dirty_pages_after: int, unsent_pages: int = 0) -> ev.PassResult:
    """A pass over a link of 100,000 pages a second."""
    return ev.PassResult(
        index=index,
        pages=pages,
        zero_pages=0,
        wire_bytes=pages * PAGE_BYTES,
        duration_s=pages / 100_000,
        dirty_pages_after=dirty_pages_after,
        unsent_pages=unsent_pages,
    )


def failed(command: type[Command]) -> ev.CommandFailed:
    return ev.CommandFailed(command.__name__, "vmm", f"{command.__name__} was refused")


# --- ways to each state, used as the first lines of conversations ------------------------------------


def to_connecting(talk: Talk) -> None:
    talk.tell(ev.Started(), ev.ConnectPeer(), then=S.CONNECTING)


def to_arming(talk: Talk) -> None:
    to_connecting(talk)
    talk.tell(ev.Connected(), ev.ArmTracking(), ev.Publish(), then=S.ARMING)


def to_precopy(talk: Talk) -> None:
    to_arming(talk)
    first = ev.RunNative() if talk.machine.migration.options.engine is Engine.QEMU else ev.SendPass(0)
    talk.tell(ev.Armed(switchover_cost_s=0.01), first, ev.Publish(), then=S.PRECOPY)


def to_suspending(talk: Talk) -> None:
    to_precopy(talk)
    talk.tell(ev.PassEnded(pass_result(0, RAM_PAGES, 0)), ev.PauseVm(), then=S.SUSPENDING)


def to_last_pages(talk: Talk) -> None:
    to_suspending(talk)
    talk.tell(ev.VmPaused(), ev.SendLastPages(), then=S.LAST_PAGES)


def to_state(talk: Talk) -> None:
    to_last_pages(talk)
    talk.tell(ev.LastPagesSent(pass_result(1, 10, 0)), ev.SendState(), then=S.STATE)


def to_awaiting_commit(talk: Talk) -> None:
    to_state(talk)
    talk.tell(ev.StateSent(300_000), then=S.AWAITING_COMMIT)


def to_resolving(talk: Talk) -> None:
    to_awaiting_commit(talk)
    talk.tell(LINK_LOST, ev.SwapToSource(), ev.Publish(), then=S.RESOLVING)


def to_resuming(talk: Talk) -> None:
    to_precopy(talk)
    goes_on(talk, LINK_LOST)


def to_committed(talk: Talk) -> None:
    to_awaiting_commit(talk)
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)


def to_retiring(talk: Talk) -> None:
    to_committed(talk)
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


def to_owing_state(talk: Talk) -> None:
    to_last_pages(talk)
    talk.tell(ev.LastPagesSent(pass_result(1, 0, 0), owed_pages=500), ev.SendState(), then=S.STATE)


def to_owing_awaiting_commit(talk: Talk) -> None:
    to_owing_state(talk)
    talk.tell(ev.StateSent(300_000), ev.StartPush(), then=S.AWAITING_COMMIT)


def to_owing_resolving(talk: Talk) -> None:
    to_owing_awaiting_commit(talk)
    talk.tell(LINK_LOST, ev.SwapToSource(), ev.Publish(), then=S.RESOLVING)


def to_owing_committed(talk: Talk) -> None:
    to_owing_awaiting_commit(talk)
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)


def to_paging(talk: Talk) -> None:
    to_owing_committed(talk)
    talk.tell(PEER_RUNNING, ev.Publish(), then=S.PAGING)


def to_reconnecting(talk: Talk) -> None:
    to_paging(talk)
    looks_again(talk, LINK_LOST)


def looks_again(talk: Talk, event: Event) -> None:
    """The VM is the destination's and lacks pages that are only here: nothing may be freed."""
    talk.tell(event, ev.StopWork(), ev.Publish(), ev.Reconnect(), then=S.RECONNECTING)
    assert talk.machine.runs_at == "destination host south"
    assert talk.machine.past_point_of_no_return
    assert talk.machine.phase is Phase.PAGING


BEFORE_THE_STATE_IS_SENT = (to_connecting, to_arming, to_precopy, to_suspending, to_last_pages)
UNDECIDED = (to_state, to_awaiting_commit)


def goes_on(talk: Talk, event: Event) -> None:
    """The event ends the migration, and the VM goes on here without asking anybody."""
    talk.tell(event, ev.StopWork(), ev.ResumeVm(), ev.TellPeerAborted, then=S.RESUMING)


def resumes(talk: Talk) -> None:
    """The VM runs here again, and the migration is over."""
    talk.tell(ev.VmResumed(), ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at == "source host north"
    assert talk.machine.finished


def asks_the_register(talk: Talk, event: Event) -> None:
    """The event ends the migration, but only the register can say where the VM runs."""
    talk.tell(event, ev.SwapToSource(), ev.Publish(), then=S.RESOLVING)
    assert talk.machine.runs_at == "unknown until the register answers; paused at the source meanwhile"


# --- the good way ------------------------------------------------------------------------------------


@conversation()
def test_a_migration_by_our_engine(talk: Talk) -> None:
    talk.tell(ev.Started(), ev.ConnectPeer(), then=S.CONNECTING)
    talk.tell(ev.Connected(), ev.ArmTracking(), ev.Publish(), then=S.ARMING)
    talk.tell(ev.Armed(switchover_cost_s=0.01), ev.SendPass(0), ev.Publish(), then=S.PRECOPY)
    talk.tell(ev.PassEnded(pass_result(0, 4096, 4000)), ev.SendPass(1))
    talk.tell(ev.PassEnded(pass_result(1, 4000, 300)), ev.PauseVm(), then=S.SUSPENDING)
    talk.now_s = 2.0
    talk.tell(ev.VmPaused(), ev.SendLastPages(), then=S.LAST_PAGES)
    talk.now_s = 2.010
    talk.tell(ev.LastPagesSent(pass_result(2, 310, 0), verify_s=0.004), ev.SendState(), then=S.STATE)
    talk.now_s = 2.015
    talk.tell(ev.StateSent(300_000), then=S.AWAITING_COMMIT)
    assert talk.machine.runs_at == "nowhere for the moment: paused at the switchover"
    talk.now_s = 2.020
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)
    assert talk.machine.past_point_of_no_return
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)

    machine = talk.machine
    assert machine.finished
    assert machine.phase is Phase.DONE
    assert machine.outcome is Outcome.COMPLETED
    assert machine.error == ""
    assert machine.runs_at == "destination host south"
    report = machine.report(talk.now_s)
    assert [(entry.index, entry.pages, entry.suspended) for entry in report.iterations] == [
        (0, 4096, False),
        (1, 4000, False),
        (2, 310, True),
    ]
    assert report.wire_bytes == (4096 + 4000 + 310) * PAGE_BYTES + 300_000
    assert report.converged is True
    assert report.switch_reason == "the predicted downtime is within the limit"
    downtime = report.downtime
    assert downtime.stop_ms == pytest.approx(2000)
    assert downtime.last_pages_ms == pytest.approx(6)
    assert downtime.verify_ms == pytest.approx(4)
    assert downtime.state_out_ms == pytest.approx(5)
    assert (downtime.load_ms, downtime.commit_ms, downtime.resume_ms) == pytest.approx((4, 3, 2))
    assert downtime.total_ms == pytest.approx(2020)


@conversation(engine=Engine.QEMU)
def test_a_migration_by_qemus_own_engine(talk: Talk) -> None:
    talk.tell(ev.Started(), ev.ConnectPeer(), then=S.CONNECTING)
    talk.tell(ev.Connected(), ev.ArmTracking(), ev.Publish(), then=S.ARMING)
    talk.tell(ev.Armed(switchover_cost_s=0.01), ev.RunNative(), ev.Publish(), then=S.PRECOPY)
    talk.wait(0.1)
    talk.tell(ev.VmPaused(), ev.Publish(), then=S.LAST_PAGES)
    talk.tell(ev.LastPagesSent(pass_result(0, 4200, 0)), ev.SendState(), then=S.STATE)
    talk.tell(ev.StateSent(300_000), then=S.AWAITING_COMMIT)
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


@conversation()
def test_word_of_the_commit_may_overtake_word_of_the_sent_state(talk: Talk) -> None:
    to_state(talk)
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)
    talk.echoes(ev.StateSent(300_000))
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.echoes(ev.StateSent(300_000))


@conversation()
def test_word_that_the_destination_runs_is_enough_in_every_undecided_state(talk: Talk) -> None:
    to_state(talk)
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation()
def test_word_that_the_destination_runs_without_word_of_the_commit(talk: Talk) -> None:
    to_awaiting_commit(talk)
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation()
def test_nothing_happens_before_the_mover_has_started(talk: Talk) -> None:
    talk.wait(1000)
    assert talk.machine.phase is Phase.REQUESTED
    to_connecting(talk)


# --- cancel ------------------------------------------------------------------------------------------


@conversation()
def test_cancel_before_the_connection_is_tried(talk: Talk) -> None:
    talk.tell(ev.CancelRequested())
    goes_on(talk, ev.Started())
    resumes(talk)
    assert talk.machine.outcome is Outcome.CANCELLED


@conversation(after=BEFORE_THE_STATE_IS_SENT)
def test_cancel_before_the_state_is_sent_lets_the_vm_go_on_at_once(talk: Talk) -> None:
    goes_on(talk, ev.CancelRequested())
    resumes(talk)
    assert talk.machine.outcome is Outcome.CANCELLED
    assert talk.machine.error == "cancelled before the switchover"


@conversation(after=UNDECIDED)
def test_cancel_at_the_switchover_asks_the_register(talk: Talk) -> None:
    asks_the_register(talk, ev.CancelRequested())
    goes_on(talk, ev.SwapWon())
    resumes(talk)
    assert talk.machine.outcome is Outcome.CANCELLED


@conversation(after=UNDECIDED)
def test_cancel_that_comes_too_late_is_no_failure(talk: Talk) -> None:
    asks_the_register(talk, ev.CancelRequested())
    talk.tell(LOST_TO_DESTINATION, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED
    assert talk.machine.error == ""


@conversation(after=(to_resolving, to_resuming, to_committed, to_retiring))
def test_cancel_after_the_decision_changes_nothing(talk: Talk) -> None:
    talk.echoes(ev.CancelRequested())


# --- the link and the peer ---------------------------------------------------------------------------


@conversation(after=BEFORE_THE_STATE_IS_SENT)
def test_a_lost_link_before_the_state_is_sent_lets_the_vm_go_on_at_once(talk: Talk) -> None:
    goes_on(talk, LINK_LOST)
    resumes(talk)
    assert talk.machine.outcome is Outcome.FAILED
    assert (talk.machine.error_code, talk.machine.error) == ("host-lost", "the connection broke")


@conversation(after=UNDECIDED)
def test_a_lost_link_at_the_switchover_asks_the_register(talk: Talk) -> None:
    asks_the_register(talk, LINK_LOST)
    goes_on(talk, ev.SwapWon())
    resumes(talk)


@conversation(after=(to_resolving, to_resuming, to_retiring))
def test_a_lost_link_after_the_decision_changes_nothing(talk: Talk) -> None:
    talk.echoes(LINK_LOST)


@conversation()
def test_a_link_lost_after_the_commit_frees_the_vm_without_waiting(talk: Talk) -> None:
    to_committed(talk)
    talk.tell(LINK_LOST, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)


@conversation(after=BEFORE_THE_STATE_IS_SENT)
def test_a_peer_that_gives_up_before_the_state_is_sent(talk: Talk) -> None:
    goes_on(talk, PEER_FAILED)
    resumes(talk)
    assert talk.machine.error == "the destination gave up: its QEMU refused the device state"


@conversation(after=UNDECIDED)
def test_a_peer_that_gives_up_at_the_switchover_is_believed_without_the_register(talk: Talk) -> None:
    goes_on(talk, PEER_FAILED)
    resumes(talk)
    assert talk.machine.error_code == "vmm"


@conversation()
def test_a_peer_that_gives_up_spares_the_wait_for_the_register(talk: Talk) -> None:
    to_resolving(talk)
    goes_on(talk, PEER_FAILED)
    talk.echoes(ev.SwapWon(), LOST_TO_SOURCE, ev.SwapUnknown("no answer"), ev.SwapRefused("no space"))
    resumes(talk)


@conversation(after=(to_resuming, to_committed, to_retiring))
def test_a_peer_that_gives_up_after_the_decision_changes_nothing(talk: Talk) -> None:
    talk.echoes(PEER_FAILED)


@conversation()
def test_a_destination_that_does_not_let_us_in(talk: Talk) -> None:
    to_connecting(talk)
    talk.wait(CONNECT_LIMIT_S)
    talk.wait(0.1, ev.StopWork(), ev.ResumeVm(), ev.TellPeerAborted, then=S.RESUMING)
    resumes(talk)
    assert talk.machine.error == "no connection to host south within 15 s"
    assert talk.machine.error_code == "timed-out"


@conversation(after=(to_arming, to_precopy, to_suspending, to_last_pages), peer_silence_limit_s=3)
def test_a_silent_peer_before_the_state_is_sent(talk: Talk) -> None:
    talk.wait(2.9)
    talk.tell(ev.PeerHeard())
    talk.wait(2.9)
    talk.wait(0.2, ev.StopWork(), ev.ResumeVm(), ev.TellPeerAborted, then=S.RESUMING)
    resumes(talk)
    assert talk.machine.error == "host south said nothing for 3 s"
    assert talk.machine.error_code == "timed-out"


@conversation(after=UNDECIDED, peer_silence_limit_s=3)
def test_a_silent_peer_at_the_switchover(talk: Talk) -> None:
    talk.wait(2.9)
    talk.tell(ev.PeerHeard())
    talk.wait(2.9)
    talk.wait(0.2, ev.SwapToSource(), ev.Publish(), then=S.RESOLVING)
    goes_on(talk, ev.SwapWon())
    resumes(talk)
    assert talk.machine.error == "host south said nothing for 3 s"


@conversation()
def test_a_peer_that_lives_but_never_commits(talk: Talk) -> None:
    to_awaiting_commit(talk)
    for _ in range(int(COMMIT_LIMIT_S)):
        talk.wait(1.0)
        talk.tell(ev.PeerHeard())
    talk.wait(0.1, ev.SwapToSource(), ev.Publish(), then=S.RESOLVING)
    assert talk.machine.error == "host south did not commit within 30 s"


@conversation()
def test_after_the_commit_the_source_waits_for_word_of_the_resume_but_not_for_ever(talk: Talk) -> None:
    to_committed(talk)
    talk.wait(FINISH_LIMIT_S)
    talk.echoes(ev.PeerHeard(), ev.PeerCommitted())
    talk.wait(0.1, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(PEER_RUNNING)
    assert talk.machine.report(talk.now_s).downtime.load_ms == pytest.approx(4)


@conversation(after=(to_connecting,))
def test_signs_of_life_keep_a_slow_greeting_alive(talk: Talk) -> None:
    talk.wait(CONNECT_LIMIT_S)
    talk.tell(ev.PeerHeard())
    talk.wait(CONNECT_LIMIT_S)


# --- the deadline ------------------------------------------------------------------------------------


@conversation(deadline_s=60, max_downtime_ms=20, mode=Mode.PRE_COPY)
def test_a_deadline_interrupts_a_long_pass_and_switches(talk: Talk) -> None:
    to_precopy(talk)
    talk.tell(ev.PassEnded(pass_result(0, 4096, 4000)), ev.SendPass(1))
    talk.now_s = 59.9
    talk.tell(ev.PeerHeard())
    talk.wait(0.1, ev.InterruptPass())
    talk.wait(0.1)
    interrupted = pass_result(1, 100, 3000, unsent_pages=3900)
    talk.tell(ev.PassEnded(interrupted), ev.PauseVm(), then=S.SUSPENDING)
    report = talk.machine.report(talk.now_s)
    assert report.switch_reason == "the deadline passed"
    assert report.converged is False


@conversation(deadline_s=60)
def test_a_vm_is_not_suspended_while_the_register_is_silent(talk: Talk) -> None:
    to_precopy(talk)
    talk.tell(ev.PassEnded(pass_result(0, 4096, 10)), ev.PauseVm(), then=S.SUSPENDING)
    talk.tell(ev.RegisterSilent("no answer"), ev.SendPass(1), ev.Publish(), then=S.PRECOPY)
    talk.tell(ev.PassEnded(pass_result(1, 10, 10)), ev.PauseVm(), then=S.SUSPENDING)
    talk.now_s = 60.0
    goes_on(talk, ev.RegisterSilent("no answer"))
    assert talk.machine.error_code == "store"


@conversation(deadline_s=60, on_deadline=OnDeadline.ABORT)
def test_a_deadline_in_the_middle_of_a_pass_aborts(talk: Talk) -> None:
    to_precopy(talk)
    talk.now_s = 59.9
    talk.tell(ev.PeerHeard())
    talk.wait(0.1, ev.StopWork(), ev.ResumeVm(), ev.TellPeerAborted, then=S.RESUMING)
    talk.echoes(ev.PassEnded(pass_result(0, 4096, 4000)))
    resumes(talk)
    assert talk.machine.error_code == "deadline"


@conversation(deadline_s=60, max_downtime_ms=20, on_deadline=OnDeadline.ABORT)
def test_a_deadline_at_the_end_of_a_pass_aborts(talk: Talk) -> None:
    to_precopy(talk)
    talk.now_s = 60.0
    goes_on(talk, ev.PassEnded(pass_result(0, 4096, 4000)))
    assert talk.machine.error_code == "deadline"


@conversation(deadline_s=60, engine=Engine.QEMU)
def test_qemus_engine_cannot_be_made_to_switch_so_its_deadline_aborts(talk: Talk) -> None:
    to_precopy(talk)
    talk.now_s = 59.9
    talk.tell(ev.PeerHeard())
    talk.wait(0.1, ev.StopWork(), ev.ResumeVm(), ev.TellPeerAborted, then=S.RESUMING)


# --- commands that fail ------------------------------------------------------------------------------


@conversation()
def test_a_mover_that_cannot_begin_may_be_a_successor_so_it_asks_the_register(talk: Talk) -> None:
    asks_the_register(talk, ev.CommandFailed("Begin", "vmm", "QEMU's monitor does not answer"))
    goes_on(talk, ev.SwapWon())
    resumes(talk)
    assert talk.machine.error == "QEMU's monitor does not answer"


@conversation(after=BEFORE_THE_STATE_IS_SENT)
def test_a_command_that_fails_before_the_state_is_sent(talk: Talk) -> None:
    goes_on(talk, failed(ev.SendPass))
    resumes(talk)
    assert talk.machine.error == "SendPass was refused"


@conversation(after=UNDECIDED)
def test_a_command_that_fails_at_the_switchover_asks_the_register(talk: Talk) -> None:
    asks_the_register(talk, failed(ev.SendState))
    talk.echoes(failed(ev.SendState))
    goes_on(talk, ev.SwapWon())
    resumes(talk)


@conversation()
def test_a_qemu_that_will_not_go_on_is_asked_again_and_then_given_up(talk: Talk) -> None:
    to_resuming(talk)
    talk.echoes(failed(ev.SendPass))
    for _ in range(RESUME_ATTEMPTS - 1):
        talk.tell(failed(ev.ResumeVm))
        talk.wait(SWAP_RETRY_S - 0.1)
        talk.wait(0.1, ev.ResumeVm())
        talk.wait(10)
    talk.tell(failed(ev.ResumeVm), ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at.startswith(
        "nowhere: the connection broke; and the source's QEMU would not go on"
    )


@conversation()
def test_a_qemu_that_goes_on_at_the_second_try(talk: Talk) -> None:
    to_resuming(talk)
    talk.tell(failed(ev.ResumeVm))
    talk.wait(SWAP_RETRY_S, ev.ResumeVm())
    resumes(talk)


@conversation()
def test_a_vm_that_cannot_be_freed_is_reported_with_the_success(talk: Talk) -> None:
    to_retiring(talk)
    talk.echoes(failed(ev.SendState))
    talk.tell(failed(ev.RetireVm), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED
    assert talk.machine.error == "the source could not free the VM: RetireVm was refused"


@conversation(after=(to_committed,))
def test_a_command_that_fails_after_the_commit_changes_nothing(talk: Talk) -> None:
    talk.echoes(failed(ev.SendState))


# --- the source's QEMU dies --------------------------------------------------------------------------


@conversation(after=(*BEFORE_THE_STATE_IS_SENT, to_resuming))
def test_a_vm_that_dies_before_the_state_is_sent_runs_nowhere(talk: Talk) -> None:
    talk.tell(
        ev.QemuDied("signal 9"), ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True), then=S.ABORTED
    )
    assert talk.machine.outcome is Outcome.FAILED
    assert talk.machine.runs_at == "nowhere: the source's QEMU died: signal 9"


@conversation()
def test_a_vm_that_died_before_the_mover_began(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(ev.Started(), ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at == "nowhere: the source's QEMU died: it ended before the migration began"


@conversation(after=UNDECIDED)
def test_a_vm_that_dies_at_the_switchover_may_still_be_taken_over(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation(after=(*UNDECIDED, to_resolving))
def test_a_vm_that_dies_at_the_switchover_is_lost_if_the_destination_gives_up(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(PEER_FAILED, ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at.startswith("nowhere: the source's QEMU died")


@conversation(after=(to_resolving,))
def test_a_vm_that_dies_while_the_register_decides(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(ev.SwapWon(), ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at.startswith("nowhere: the source's QEMU died")


@conversation(after=(to_resolving,))
def test_a_vm_that_dies_while_an_earlier_swap_has_decided(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(LOST_TO_SOURCE, ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True), then=S.ABORTED)


@conversation(after=(to_retiring,))
def test_a_vm_that_dies_after_the_commit_is_not_missed(talk: Talk) -> None:
    talk.echoes(ev.QemuDied("signal 9"))


@conversation(after=(to_committed,))
def test_a_vm_that_dies_before_its_destination_runs_is_freed_like_any_other(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    assert talk.machine.vm_died
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


# --- the register ------------------------------------------------------------------------------------


@conversation(after=(to_resolving,))
def test_the_source_waits_paused_until_the_register_answers(talk: Talk) -> None:
    talk.wait(100)
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S - 0.1)
    talk.wait(0.1, ev.SwapToSource())
    talk.tell(ev.SwapRefused("no space left"))
    talk.wait(SWAP_RETRY_S, ev.SwapToSource())
    assert talk.machine.runs_at == "unknown until the register answers; paused at the source meanwhile"
    goes_on(talk, ev.SwapWon())
    resumes(talk)


@conversation(after=(to_resolving,))
def test_an_earlier_swap_of_ours_was_made_although_its_answer_was_lost(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S, ev.SwapToSource())
    goes_on(talk, LOST_TO_SOURCE)
    resumes(talk)


@conversation(after=(to_resolving,))
def test_the_destination_was_first(talk: Talk) -> None:
    talk.tell(LOST_TO_DESTINATION, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    assert talk.machine.runs_at == "destination host south"
    assert talk.machine.error == ""


@conversation(after=(to_resolving,))
def test_word_of_the_commit_is_as_good_as_the_registers(talk: Talk) -> None:
    talk.tell(ev.PeerCommitted(), then=S.COMMITTED)
    talk.echoes(LOST_TO_DESTINATION)
    assert talk.machine.error == ""


@conversation(after=(to_resolving,))
def test_word_of_the_resume_is_as_good_as_the_registers(talk: Talk) -> None:
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.echoes(LOST_TO_DESTINATION, ev.PeerCommitted())


@conversation(after=(to_resuming, to_committed, to_retiring))
def test_answers_of_the_register_after_the_decision_change_nothing(talk: Talk) -> None:
    talk.echoes(
        ev.SwapWon(), LOST_TO_SOURCE, ev.SwapUnknown("no answer"), ev.SwapRefused("no space"), ev.PeerHeard()
    )


# --- a mover that takes over -------------------------------------------------------------------------


@conversation()
def test_a_successor_lets_the_vm_go_on_when_no_state_was_sent(talk: Talk) -> None:
    goes_on(talk, ev.Recovered(state_may_be_sent=False))
    resumes(talk)
    assert talk.machine.outcome is Outcome.FAILED
    assert talk.machine.error_code == "mover-died"


@conversation()
def test_a_successor_asks_the_register_when_the_state_may_be_sent(talk: Talk) -> None:
    asks_the_register(talk, ev.Recovered(state_may_be_sent=True))
    goes_on(talk, ev.SwapWon())
    resumes(talk)


@conversation()
def test_a_successor_that_learns_of_the_commit(talk: Talk) -> None:
    asks_the_register(talk, ev.Recovered(state_may_be_sent=True))
    talk.tell(LOST_TO_DESTINATION, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


@conversation()
def test_a_successor_that_is_cancelled_or_finds_no_qemu_asks_the_register_all_the_same(talk: Talk) -> None:
    talk.tell(ev.QemuDied("it was not running when the mover started"))
    talk.tell(ev.CancelRequested())
    asks_the_register(talk, ev.Recovered(state_may_be_sent=True))
    talk.tell(LOST_TO_DESTINATION, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert talk.machine.runs_at == "destination host south"


@conversation()
def test_a_successor_that_finds_no_qemu_and_sent_no_state(talk: Talk) -> None:
    talk.tell(ev.QemuDied("it was not running when the mover started"))
    answers = (ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True))
    talk.tell(ev.Recovered(state_may_be_sent=False), *answers, then=S.ABORTED)
    assert talk.machine.runs_at.startswith("nowhere: ")


# --- pages owed after the resume ---------------------------------------------------------------------

PAGED = ev.PeerPaged(PagingReport(owed_pages=500, faults=7, pushed_pages=493))


@conversation(mode=Mode.POST_COPY)
def test_without_a_pass_the_vm_is_suspended_at_once(talk: Talk) -> None:
    to_arming(talk)
    talk.tell(ev.Armed(switchover_cost_s=0.01), ev.PauseVm(), then=S.SUSPENDING)
    talk.tell(ev.RegisterSilent("no answer"), ev.PauseVm())
    talk.tell(ev.VmPaused(), ev.SendLastPages(Rest.BOTH), then=S.LAST_PAGES)


@conversation(after=(to_paging,))
def test_the_last_page_that_was_owed_frees_the_source(talk: Talk) -> None:
    talk.now_s = 3.0
    talk.tell(PAGED, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    report = talk.machine.report(talk.now_s)
    assert report.paging is not None
    assert (report.paging.faults, report.paging.residual_ms) == (7, 3000)
    assert report.order == "1 pre-copy pass, rest before-state"


@conversation(after=(to_owing_state, to_owing_awaiting_commit, to_owing_resolving, to_owing_committed))
def test_what_was_paged_in_before_the_resume_was_heard_is_not_owed(talk: Talk) -> None:
    talk.tell(PAGED)
    talk.tell(PEER_RUNNING, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation(after=(to_owing_state, to_owing_awaiting_commit, to_owing_resolving))
def test_a_destination_that_runs_is_given_its_pages(talk: Talk) -> None:
    push = (ev.StartPush(),) if talk.machine.state is S.STATE else ()
    talk.tell(PEER_RUNNING, *push, ev.Publish(), then=S.PAGING)


@conversation(after=(to_paging, to_owing_committed))
def test_a_lost_link_never_frees_what_is_owed(talk: Talk) -> None:
    looks_again(talk, LINK_LOST)


@conversation(after=(to_paging,))
def test_a_push_that_fails_is_tried_on_a_new_connection(talk: Talk) -> None:
    looks_again(talk, failed(ev.StartPush))


@conversation(after=(to_paging,))
def test_a_silent_destination_is_looked_for(talk: Talk) -> None:
    talk.tell(ev.PeerHeard())
    talk.now_s += 11.0
    looks_again(talk, ev.Tick())


@conversation(after=(to_owing_committed,))
def test_a_destination_that_committed_and_never_resumed_is_looked_for(talk: Talk) -> None:
    talk.now_s = FINISH_LIMIT_S + 0.1
    looks_again(talk, ev.Tick())


@conversation(after=(to_owing_resolving,))
def test_an_abort_that_lost_looks_for_the_destination(talk: Talk) -> None:
    looks_again(talk, LOST_TO_DESTINATION)


@conversation(after=(to_reconnecting,))
def test_the_destination_is_looked_for_until_it_is_found(talk: Talk) -> None:
    talk.wait(100)
    talk.tell(failed(ev.StartPush))
    for _ in range(100):
        talk.tell(failed(ev.Reconnect))
        talk.wait(RECONNECT_S / 2)
        talk.wait(RECONNECT_S, ev.Reconnect(), ev.AskController())
        talk.tell(ev.MigrationKnown(going_on=True))
    talk.tell(ev.Reconnected(200), ev.StartPush(), ev.Publish(), then=S.PAGING)
    assert talk.machine.outcome is Outcome.RUNNING


@conversation(after=(to_reconnecting,))
def test_a_destination_that_lacks_nothing_needs_no_more(talk: Talk) -> None:
    talk.tell(ev.Reconnected(0), ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation(after=(to_reconnecting,))
def test_a_destination_that_has_finished_needs_no_more(talk: Talk) -> None:
    paged = ev.MigrationKnown(going_on=False, paged=True)
    talk.tell(paged, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation(after=(to_reconnecting,))
def test_memory_that_nobody_holds_ends_it(talk: Talk) -> None:
    gone = ev.CommandFailed("Reconnect", PagesLost.code, "QEMU has ended, and nobody else has its memory")
    talk.tell(gone, ev.AskController())
    talk.wait(RECONNECT_S + 0.1, ev.AskController())  # as long as nobody answers
    going_on = ev.MigrationKnown(going_on=True)
    talk.tell(going_on, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    assert talk.machine.error_code == "pages-lost"


@conversation(after=(to_reconnecting,))
def test_memory_that_nobody_needs_any_more_is_no_loss(talk: Talk) -> None:
    gone = ev.CommandFailed("Reconnect", PagesLost.code, "QEMU has ended, and nobody else has its memory")
    talk.tell(gone, ev.AskController())
    paged = ev.MigrationKnown(going_on=True, paged=True)
    talk.tell(paged, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    assert talk.machine.error_code == ""


@conversation(after=(to_reconnecting,), verify=True)
def test_memory_that_is_needed_for_a_comparison_alone_is_no_loss(talk: Talk) -> None:
    placed = ev.MigrationKnown(going_on=True, lacks_nothing=True)
    talk.tell(placed)  # it is still to be verified
    gone = ev.CommandFailed("Reconnect", PagesLost.code, "QEMU has ended, and nobody else has its memory")
    talk.tell(gone, ev.AskController())
    talk.tell(placed, ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    assert talk.machine.error_code == ""


@conversation(after=(to_reconnecting,))
def test_a_destination_that_failed_ends_it(talk: Talk) -> None:
    failed_there = ev.MigrationKnown(going_on=False, failed=True)
    talk.tell(failed_there, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert talk.machine.outcome is Outcome.FAILED


@conversation(after=(to_reconnecting,))
def test_a_record_that_ended_otherwise_frees_nothing_that_is_owed(talk: Talk) -> None:
    talk.tell(ev.MigrationKnown(going_on=False))


@conversation(after=(to_reconnecting,))
def test_the_last_words_of_the_old_connection_still_count(talk: Talk) -> None:
    talk.tell(PAGED, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation()
def test_a_successor_goes_on_paging(talk: Talk) -> None:
    looks_again(talk, ev.Recovered(state_may_be_sent=True, paging=True))


@conversation()
def test_a_successor_at_the_switchover_asks_the_register_and_then_goes_on_paging(talk: Talk) -> None:
    talk.machine = SourceMachine(talk.machine.migration, RAM_PAGES * PAGE_BYTES, talk.now_s, owing=True)
    asks_the_register(talk, ev.Recovered(state_may_be_sent=True))
    looks_again(talk, LOST_TO_DESTINATION)


@conversation()
def test_a_successor_that_cannot_begin_frees_nothing_that_is_owed(talk: Talk) -> None:
    talk.machine = SourceMachine(talk.machine.migration, RAM_PAGES * PAGE_BYTES, talk.now_s, owing=True)
    asks_the_register(talk, failed(Begin))
    looks_again(talk, LOST_TO_DESTINATION)


@conversation()
def test_memory_that_died_with_qemu_and_mover_is_told(talk: Talk) -> None:
    talk.tell(ev.QemuDied("it was not running when the mover started"))
    looks = (ev.StopWork(), ev.Publish(), ev.Reconnect())
    talk.tell(ev.Recovered(state_may_be_sent=True, paging=True), *looks, then=S.RECONNECTING)
    talk.tell(ev.CommandFailed("Reconnect", PagesLost.code, "nobody has its memory"), ev.AskController())
    answers = (ev.StopWork(), ev.Publish(), ev.RetireVm())
    talk.tell(ev.MigrationKnown(going_on=True), *answers, then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, "pages-lost")
    assert talk.machine.runs_at == "destination host south"


@conversation(after=(to_precopy,))
def test_a_person_switches_to_post_copy(talk: Talk) -> None:
    talk.tell(ev.SwitchRequested(), ev.InterruptPass())
    talk.tell(ev.PassEnded(pass_result(0, 1000, 900, unsent_pages=3096)), ev.PauseVm(), then=S.SUSPENDING)
    talk.tell(ev.VmPaused(), ev.SendLastPages, then=S.LAST_PAGES)
    assert talk.machine.switch_reason == "post-copy was asked for while it ran"


@conversation(after=(to_connecting, to_arming))
def test_a_person_switches_to_post_copy_before_the_first_pass(talk: Talk) -> None:
    talk.tell(ev.SwitchRequested())
    if talk.machine.state is S.CONNECTING:
        talk.tell(ev.Connected(), ev.ArmTracking(), ev.Publish(), then=S.ARMING)
    talk.tell(ev.Armed(switchover_cost_s=0.01), ev.PauseVm(), then=S.SUSPENDING)
    talk.tell(ev.RegisterSilent("no answer"), ev.PauseVm())
    talk.tell(ev.VmPaused(), ev.SendLastPages(Rest.BOTH), then=S.LAST_PAGES)


@conversation(mode=Mode.HYBRID, max_downtime_ms=100)
def test_what_the_promised_downtime_has_room_for_is_not_owed(talk: Talk) -> None:
    """70 ms less 10 for the switchover, at 100,000 pages a second."""
    to_precopy(talk)
    talk.tell(ev.PassEnded(pass_result(0, 4096, 4000)), ev.PauseVm(), then=S.SUSPENDING)
    talk.tell(ev.VmPaused(), ev.SendLastPages(Rest.BOTH, 6000), then=S.LAST_PAGES)


@conversation(
    after=(*BEFORE_THE_STATE_IS_SENT, *UNDECIDED, to_resolving, to_committed, to_paging, to_reconnecting)
)
def test_other_limits_count_from_now_on(talk: Talk) -> None:
    changed = talk.machine.migration.options.model_copy(update={"max_downtime_ms": 7.0})
    talk.tell(ev.OptionsChanged(changed))
    assert talk.machine.migration.options.max_downtime_ms == 7.0


@conversation(after=(to_paging, to_reconnecting))
def test_nothing_takes_a_paging_vm_back(talk: Talk) -> None:
    talk.echoes(
        ev.CancelRequested(),
        ev.PeerCommitted(),
        ev.SwapWon(),
        LOST_TO_SOURCE,
        ev.SwapUnknown("late"),
        ev.SwapRefused("full"),
        PEER_FAILED,
        ev.StateSent(1),
    )
    talk.tell(ev.QemuDied("killed"))


def to_search(talk: Talk) -> None:
    """Between two searches for the destination."""
    to_reconnecting(talk)
    talk.tell(ev.CommandFailed("Reconnect", "host-lost", "no route"))


def to_reviving(talk: Talk) -> None:
    to_search(talk)
    talk.tell(ev.ReviveRequested(), ev.SwapBack(), ev.Publish(), then=S.REVIVING)


DIFFERS = ev.MemoryDiffers("page 7 of transhume-ram0")


@conversation(after=(to_reconnecting,), verify=True)
def test_a_destination_that_is_still_to_be_verified_needs_the_source(talk: Talk) -> None:
    talk.tell(ev.Reconnected(0, to_compare=True), ev.StartPush(), ev.Publish(), then=S.PAGING)
    talk.tell(PAGED, ev.Publish(), ev.RetireVm(), then=S.RETIRING)


@conversation(
    after=(to_owing_state, to_owing_awaiting_commit, to_owing_resolving, to_owing_committed, to_paging),
    verify=True,
)
def test_memory_that_differs_is_let_go_when_the_record_says_so(talk: Talk) -> None:
    """The destination ends its mover when it has heard of it; whatever comes first."""
    talk.tell(DIFFERS)
    if talk.machine.state is not S.PAGING:
        push = (ev.StartPush(),) if talk.machine.state is S.STATE else ()
        talk.tell(PEER_RUNNING, *push, ev.Publish(), then=S.PAGING)
    looks_again(talk, LINK_LOST)
    talk.tell(failed(ev.Reconnect))
    talk.tell(ev.MigrationKnown(going_on=True))
    known = ev.MigrationKnown(going_on=False, failed=True)
    talk.tell(known, ev.StopWork(), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, "memory-differs")
    assert "runs at host south with memory that differs" in talk.machine.error
    assert "page 7 of transhume-ram0" in talk.machine.error
    assert talk.machine.runs_at == "destination host south"


@conversation(after=(to_paging, to_reconnecting), verify=True)
def test_memory_that_differed_is_never_forgotten(talk: Talk) -> None:
    """The destination's mover died before it had said so, and its successor knows nothing of it."""
    talk.tell(DIFFERS)
    if talk.machine.state is S.PAGING:
        looks_again(talk, LINK_LOST)
    talk.tell(ev.Reconnected(0), ev.Publish(), ev.RetireVm(), then=S.RETIRING)
    talk.tell(ev.VmRetired(), ev.TellPeerFinished(), ev.Publish(ended=True), then=S.DONE)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, "memory-differs")


@conversation(after=(to_retiring, to_resuming, to_reviving))
def test_late_word_of_a_difference_changes_nothing(talk: Talk) -> None:
    talk.echoes(DIFFERS)


@conversation(after=(to_paging,))
def test_a_vm_whose_destination_answers_is_not_taken_back(talk: Talk) -> None:
    talk.echoes(ev.ReviveRequested())


@conversation(after=(to_reviving,))
def test_a_vm_is_taken_back_by_the_register_first(talk: Talk) -> None:
    assert talk.machine.runs_at.startswith("unknown until the register answers")
    talk.tell(ev.SwapWon(), ev.StopWork(), ev.ResumeVm(), then=S.RESUMING)
    talk.tell(ev.VmResumed(), ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.outcome is Outcome.FAILED
    assert talk.machine.error_code == REVIVED
    assert talk.machine.runs_at == "source host north"


@conversation(after=(to_reviving,))
def test_a_vm_that_was_taken_back_is_tried_until_it_goes_on(talk: Talk) -> None:
    talk.tell(ev.SwapWon(), ev.StopWork(), ev.ResumeVm(), then=S.RESUMING)
    for _ in range(2 * RESUME_ATTEMPTS):
        talk.tell(failed(ev.ResumeVm))
        assert talk.machine.runs_at.startswith("nowhere for the moment")
        talk.wait(SWAP_RETRY_S + 0.1, ev.ResumeVm())
    talk.tell(ev.VmResumed(), ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at == "source host north"


@conversation(after=(to_reconnecting,))
def test_a_search_under_way_ends_before_a_vm_is_taken_back(talk: Talk) -> None:
    talk.tell(ev.ReviveRequested())
    talk.tell(
        ev.CommandFailed("Reconnect", "host-lost", "no route"), ev.SwapBack(), ev.Publish(), then=S.REVIVING
    )


@conversation(after=(to_reconnecting,))
def test_a_destination_that_is_found_keeps_its_vm(talk: Talk) -> None:
    talk.tell(ev.ReviveRequested())
    talk.tell(ev.Reconnected(7), ev.StartPush(), ev.Publish(), then=S.PAGING)
    talk.tell(
        ev.LinkLost("host-lost", "reset"), ev.StopWork(), ev.Publish(), ev.Reconnect(), then=S.RECONNECTING
    )
    talk.tell(ev.CommandFailed("Reconnect", "host-lost", "no route"))  # the wish was dropped


@conversation(after=(to_reviving,))
def test_a_revival_whose_answer_was_lost_asks_again(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("no answer"))
    talk.wait(SWAP_RETRY_S + 0.1, ev.SwapBack())
    talk.tell(ev.SwapLost("north", 9), ev.StopWork(), ev.ResumeVm(), then=S.RESUMING)


@conversation(after=(to_reviving,))
def test_a_register_without_room_is_asked_again(talk: Talk) -> None:
    talk.tell(ev.SwapRefused("full"))
    talk.wait(SWAP_RETRY_S + 0.1, ev.SwapBack())


@conversation(after=(to_reviving,))
def test_a_vm_that_the_register_gives_to_another_is_not_taken_back(talk: Talk) -> None:
    talk.tell(ev.SwapLost("gamma", 9), ev.Publish(), then=S.RECONNECTING)
    assert talk.machine.revival_refused


@conversation(after=(to_reviving,))
def test_a_vm_that_dies_while_it_is_taken_back_is_lost(talk: Talk) -> None:
    talk.tell(ev.QemuDied("killed"))
    talk.tell(ev.SwapWon(), ev.StopWork(), ev.TellPeerAborted, ev.Publish(ended=True), then=S.ABORTED)
    assert talk.machine.runs_at.startswith("nowhere")


@conversation(after=(to_search,))
def test_a_vm_without_qemu_is_not_taken_back(talk: Talk) -> None:
    talk.tell(ev.QemuDied("killed"))
    talk.tell(ev.ReviveRequested())


@conversation(after=(to_reconnecting,))
def test_a_vm_whose_qemu_dies_during_the_last_search_is_not_taken_back(talk: Talk) -> None:
    talk.tell(ev.ReviveRequested())
    talk.tell(ev.QemuDied("killed"))
    talk.tell(ev.CommandFailed("Reconnect", "host-lost", "no route"))


@conversation(after=(to_owing_committed,))
def test_a_vm_whose_qemu_died_right_after_the_commit_is_not_taken_back(talk: Talk) -> None:
    talk.tell(ev.QemuDied("killed"))
    talk.tell(
        ev.LinkLost("host-lost", "reset"), ev.StopWork(), ev.Publish(), ev.Reconnect(), then=S.RECONNECTING
    )
    talk.tell(ev.CommandFailed("Reconnect", "host-lost", "no route"))
    talk.tell(ev.ReviveRequested())


@conversation(after=(to_reviving,))
def test_echoes_while_a_vm_is_taken_back(talk: Talk) -> None:
    talk.echoes(
        ev.CancelRequested(),
        ev.ReviveRequested(),
        ev.CommandFailed("Reconnect", "host-lost", "late"),
        ev.LinkLost("host-lost", "late"),
        ev.MigrationKnown(going_on=True),
        ev.PeerHeard(),
        PEER_RUNNING,
        ev.PeerCommitted(),
        PEER_FAILED,
        ev.PeerPaged(PagingReport()),
        ev.StateSent(1),
    )
    talk.tell(ev.OptionsChanged(MigrationOptions(deadline_s=5)))
    talk.tell(ev.SwapWon(), ev.StopWork(), ev.ResumeVm(), then=S.RESUMING)
    talk.echoes(ev.ReviveRequested(), ev.MigrationKnown(going_on=True))


@conversation()
def test_a_successor_goes_on_taking_a_vm_back(talk: Talk) -> None:
    talk.tell(
        ev.Recovered(state_may_be_sent=True, reviving=True), ev.SwapBack(), ev.Publish(), then=S.REVIVING
    )


@conversation(after=(to_paging,))
def test_echoes_while_paging(talk: Talk) -> None:
    talk.tell(PEER_RUNNING)
    talk.echoes(ev.MigrationKnown(going_on=False))
    talk.wait(0.1)


@conversation(after=(to_reconnecting,))
def test_echoes_while_the_destination_is_looked_for(talk: Talk) -> None:
    talk.echoes(LINK_LOST, ev.PeerHeard(), PEER_RUNNING)


@conversation(after=(to_retiring,))
def test_echoes_of_paging_while_the_vm_is_freed(talk: Talk) -> None:
    talk.echoes(PAGED, ev.Reconnected(3), ev.MigrationKnown(going_on=False), ev.ReviveRequested())


# --- late echoes -------------------------------------------------------------------------------------


@conversation(after=(to_resolving, to_resuming))
def test_echoes_of_work_that_was_given_up(talk: Talk) -> None:
    talk.echoes(
        ev.Connected(),
        ev.Armed(0.01),
        ev.PassEnded(pass_result(0, 4096, 10)),
        ev.VmPaused(),
        ev.RegisterSilent("no answer"),
        ev.LastPagesSent(pass_result(1, 10, 0)),
        ev.StateSent(300_000),
        ev.PeerHeard(),
    )


@conversation(after=(to_resuming, to_retiring))
def test_time_alone_changes_nothing_when_all_is_decided(talk: Talk) -> None:
    talk.wait(1000)


@conversation(after=(to_retiring,))
def test_echoes_while_the_vm_is_freed(talk: Talk) -> None:
    talk.echoes(ev.PeerHeard(), ev.PeerCommitted(), ev.StateSent(300_000))


@conversation(after=(to_resuming,))
def test_nothing_is_heard_after_the_end(talk: Talk) -> None:
    resumes(talk)
    talk.echoes(ev.SwapWon(), LINK_LOST, ev.CancelRequested(), ev.PeerCommitted())


# --- what must never be believed ---------------------------------------------------------------------


@conversation(after=(*BEFORE_THE_STATE_IS_SENT, to_resuming))
def test_a_commit_without_the_device_state_is_not_believed(talk: Talk) -> None:
    talk.refuses(ev.PeerCommitted())
    talk.refuses(PEER_RUNNING)


@conversation(after=(*BEFORE_THE_STATE_IS_SENT, *UNDECIDED))
def test_answers_of_the_register_that_nobody_asked_for_are_not_believed(talk: Talk) -> None:
    talk.refuses(ev.SwapWon())
    talk.refuses(LOST_TO_DESTINATION)


# --- the whole table ---------------------------------------------------------------------------------


def test_every_rule_is_taken_by_some_conversation() -> None:
    assert conversation.rules_never_taken() == []
