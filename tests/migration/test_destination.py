"""Conversations with the destination's machine: what it hears, what it answers."""

from __future__ import annotations

from tests.migration.conversation import Conversation, Conversations

from transhume.migration import events as ev
from transhume.migration.destination import (
    ASK_AGAIN_S,
    COMPARE_WAIT_S,
    FINISH_LIMIT_S,
    RESUME_ATTEMPTS,
    REVOKED,
    SWAP_RETRY_S,
    DestinationMachine,
)
from transhume.migration.destination_table import DestinationState
from transhume.migration.machine import Command, Event
from transhume.model.migration import Migration, MigrationOptions, Mode, Outcome, Phase

D = DestinationState
Talk = Conversation[DestinationMachine]

LINK_LOST = ev.LinkLost("host-lost", "the connection broke")
PEER_ABORTED = ev.PeerAborted("cancelled before the switchover")
WON_EARLIER = ev.SwapLost("south", 8)
LOST_TO_SOURCE = ev.SwapLost("north", 8)


def new_machine(options: MigrationOptions) -> DestinationMachine:
    migration = Migration(id="m1", vm="web", source="north", destination="south", epoch=7, options=options)
    return DestinationMachine(migration, now_s=0.0)


conversation = Conversations(new_machine)


def failed(command: type[Command]) -> ev.CommandFailed:
    return ev.CommandFailed(command.__name__, "vmm", f"{command.__name__} was refused")


# --- ways to each state, used as the first lines of conversations ------------------------------------


def at_the_begin(_: Talk) -> None:
    """Nothing was said yet."""


def to_waiting(talk: Talk) -> None:
    talk.tell(ev.Listening(), ev.Publish(), then=D.WAITING)


def to_receiving(talk: Talk) -> None:
    to_waiting(talk)
    talk.tell(ev.SourceConnected(), ev.Publish(), then=D.RECEIVING)


def to_loading(talk: Talk) -> None:
    to_receiving(talk)
    talk.tell(ev.PassReceived(0))
    talk.tell(ev.LastPagesReceived(), then=D.LOADING)


def to_committing(talk: Talk) -> None:
    to_loading(talk)
    talk.tell(ev.StateReceived())
    talk.tell(ev.StateLoaded(), ev.SwapToDestination(), then=D.COMMITTING)


def to_revoking(talk: Talk) -> None:
    talk.tell(ev.Recovered(state_may_be_sent=True), ev.SwapToSource(), then=D.REVOKING)


def to_resuming(talk: Talk) -> None:
    to_committing(talk)
    commits(talk, ev.SwapWon())


def to_running(talk: Talk) -> None:
    to_resuming(talk)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.RUNNING)


def to_owing_loading(talk: Talk) -> None:
    to_receiving(talk)
    talk.tell(ev.LastPagesReceived(owed_pages=500), then=D.LOADING)


def to_owing_committing(talk: Talk) -> None:
    to_owing_loading(talk)
    talk.tell(ev.StateReceived())
    talk.tell(ev.StateLoaded(), ev.SwapToDestination(), then=D.COMMITTING)


def to_owing_resuming(talk: Talk) -> None:
    to_owing_committing(talk)
    commits(talk, ev.SwapWon())


def to_owing_revoking(talk: Talk) -> None:
    talk.machine = DestinationMachine(talk.machine.migration, talk.now_s, owed_pages=500)
    talk.tell(ev.Recovered(state_may_be_sent=True), ev.SwapToSource(), then=D.REVOKING)


def to_paging(talk: Talk) -> None:
    to_owing_resuming(talk)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.PAGING)
    assert talk.machine.runs_at == "destination host south"


def to_destroying(talk: Talk) -> None:
    to_receiving(talk)
    gives_up(talk, LINK_LOST)


BEFORE_THE_COMMIT = (to_waiting, to_receiving, to_loading)


AFTER_THE_WAIT = (
    to_receiving,
    to_loading,
    to_committing,
    to_revoking,
    to_resuming,
    to_running,
    to_destroying,
)


def commits(talk: Talk, event: Event) -> None:
    """The event tells that the VM is ours: it resumes here."""
    talk.tell(event, ev.ResumeVm(), ev.TellPeerCommitted(), then=D.RESUMING)
    assert talk.machine.runs_at == "destination host south"


def gives_up(talk: Talk, event: Event) -> None:
    """The event ends the migration here, with nothing left."""
    talk.tell(event, ev.StopWork(), ev.DestroyVm(), then=D.DESTROYING)
    assert talk.machine.runs_at == "source host north"


def is_gone(talk: Talk) -> None:
    """Only when the VM here is gone is the source told that we gave up."""
    machine = talk.machine
    told = ev.TellPeerFailed(machine.error_code, machine.error)
    talk.tell(ev.VmDestroyed(), told, ev.Publish(ended=True), then=D.ABORTED)
    assert machine.finished
    assert machine.phase is Phase.ABORTED


# --- the good way ------------------------------------------------------------------------------------


@conversation()
def test_a_migration_that_goes_well(talk: Talk) -> None:
    talk.tell(ev.Listening(), ev.Publish(), then=D.WAITING)
    talk.tell(ev.SourceConnected(), ev.Publish(), then=D.RECEIVING)
    assert not talk.machine.source_never_came
    talk.tell(ev.PassReceived(0))
    talk.tell(ev.PassReceived(1))
    talk.tell(ev.LastPagesReceived(), then=D.LOADING)
    assert talk.machine.runs_at == "source host north"
    talk.now_s = 1.0
    talk.tell(ev.StateReceived())
    talk.now_s = 1.5
    talk.tell(ev.StateLoaded(), ev.SwapToDestination(), then=D.COMMITTING)
    assert talk.machine.runs_at == "unknown until the register answers"
    talk.now_s = 1.75
    talk.tell(ev.SwapWon(), ev.ResumeVm(), ev.TellPeerCommitted(), then=D.RESUMING)
    talk.now_s = 1.875
    told = ev.TellPeerRunning(load_s=0.5, commit_s=0.25, resume_s=0.125)
    talk.tell(ev.VmResumed(), told, ev.Publish(), then=D.RUNNING)
    assert talk.machine.phase is Phase.RUNNING_AT_DESTINATION
    talk.tell(ev.PeerFinished(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED
    assert talk.machine.runs_at == "destination host south"


@conversation()
def test_the_commit_needs_the_whole_state_even_when_qemu_was_quick(talk: Talk) -> None:
    to_loading(talk)
    talk.tell(ev.StateLoaded())
    talk.wait(1)
    talk.tell(ev.StateReceived(), ev.SwapToDestination(), then=D.COMMITTING)


@conversation()
def test_pages_written_while_the_state_was_saved_come_before_its_end_mark(talk: Talk) -> None:
    to_loading(talk)
    talk.tell(ev.StateLoaded())
    talk.tell(ev.LastPagesReceived())
    talk.tell(ev.StateReceived(), ev.SwapToDestination(), then=D.COMMITTING)


@conversation()
def test_qemus_own_engine_loads_before_the_sources_end_mark(talk: Talk) -> None:
    to_receiving(talk)
    talk.tell(ev.StateLoaded())
    talk.tell(ev.LastPagesReceived(), then=D.LOADING)
    talk.tell(ev.StateReceived(), ev.SwapToDestination(), then=D.COMMITTING)


@conversation()
def test_a_finished_destination_needs_no_farewell(talk: Talk) -> None:
    to_running(talk)
    talk.tell(LINK_LOST, ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


@conversation()
def test_a_running_destination_does_not_wait_for_ever(talk: Talk) -> None:
    to_running(talk)
    talk.wait(FINISH_LIMIT_S)
    talk.wait(0.1, ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


# --- step 3A: the destination waits, asks again, gives up --------------------------------------------


@conversation()
def test_a_waiting_destination_asks_again_whether_the_migration_goes_on(talk: Talk) -> None:
    talk.wait(1000)
    to_waiting(talk)
    talk.wait(ASK_AGAIN_S - 0.1)
    talk.wait(0.1, ev.AskController())
    talk.tell(ev.MigrationKnown(going_on=True))
    talk.wait(ASK_AGAIN_S - 0.1)
    talk.wait(0.1, ev.AskController())
    talk.wait(ASK_AGAIN_S, ev.AskController())
    gives_up(talk, ev.MigrationKnown(going_on=False))
    is_gone(talk)
    assert talk.machine.error == "the migration was given up before the source connected"
    assert talk.machine.source_never_came


@conversation(wait_limit_s=10)
def test_a_waiting_destination_gives_up_after_the_limit(talk: Talk) -> None:
    to_waiting(talk)
    for _ in range(5):
        talk.wait(2.0, ev.AskController())
    talk.wait(0.1, ev.StopWork(), ev.DestroyVm(), then=D.DESTROYING)
    is_gone(talk)
    assert talk.machine.error_code == "timed-out"
    assert talk.machine.error == "source host north did not come within 10 s"


@conversation(
    after=(to_receiving, to_loading, to_committing, to_revoking, to_resuming, to_running, to_destroying)
)
def test_an_answer_of_the_controller_that_comes_late_changes_nothing(talk: Talk) -> None:
    talk.echoes(ev.MigrationKnown(going_on=True), ev.MigrationKnown(going_on=False))


# --- trouble before the commit is tried --------------------------------------------------------------


@conversation(after=BEFORE_THE_COMMIT)
def test_cancel_leaves_nothing(talk: Talk) -> None:
    gives_up(talk, ev.CancelRequested())
    is_gone(talk)
    assert talk.machine.error_code == "cancelled"


@conversation()
def test_cancel_while_the_vm_is_made(talk: Talk) -> None:
    talk.tell(ev.CancelRequested())
    gives_up(talk, ev.Listening())
    is_gone(talk)
    assert talk.machine.error_code == "cancelled"


@conversation()
def test_a_qemu_that_dies_while_the_vm_is_made(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    gives_up(talk, ev.Listening())
    is_gone(talk)
    assert talk.machine.error_code == "vmm"


@conversation()
def test_a_vm_that_cannot_be_made_is_removed_after_the_register_was_moved_on(talk: Talk) -> None:
    failure = ev.CommandFailed("Begin", "vmm", "no memory for the guest's RAM")
    talk.tell(failure, ev.SwapToSource(), then=D.REVOKING)
    gives_up(talk, ev.SwapWon())
    is_gone(talk)
    assert (talk.machine.error_code, talk.machine.error) == ("vmm", "no memory for the guest's RAM")


@conversation(after=BEFORE_THE_COMMIT)
def test_a_lost_link_leaves_nothing(talk: Talk) -> None:
    gives_up(talk, LINK_LOST)
    is_gone(talk)
    assert talk.machine.outcome is Outcome.FAILED
    assert (talk.machine.error_code, talk.machine.error) == ("host-lost", "the connection broke")


@conversation(after=BEFORE_THE_COMMIT)
def test_a_source_that_goes_on_leaves_nothing(talk: Talk) -> None:
    gives_up(talk, PEER_ABORTED)
    is_gone(talk)
    assert talk.machine.error == "cancelled before the switchover"


@conversation(after=BEFORE_THE_COMMIT)
def test_a_command_that_fails_leaves_nothing(talk: Talk) -> None:
    gives_up(talk, ev.CommandFailed("LoadState", "vmm", "QEMU refused the device state"))
    is_gone(talk)
    assert (talk.machine.error_code, talk.machine.error) == ("vmm", "QEMU refused the device state")


@conversation(after=BEFORE_THE_COMMIT)
def test_a_qemu_that_dies_leaves_nothing(talk: Talk) -> None:
    gives_up(talk, ev.QemuDied("signal 9"))
    is_gone(talk)
    assert talk.machine.error.startswith("the destination's QEMU died")
    assert talk.machine.error.endswith(": signal 9")


@conversation(after=(to_receiving, to_loading), peer_silence_limit_s=3)
def test_a_silent_source_leaves_nothing(talk: Talk) -> None:
    talk.wait(2.9)
    talk.tell(ev.PeerHeard())
    talk.wait(2.9)
    talk.wait(0.2, ev.StopWork(), ev.DestroyVm(), then=D.DESTROYING)
    is_gone(talk)
    assert talk.machine.error == "source host north said nothing for 3 s"


@conversation(after=(to_waiting,))
def test_a_source_that_greets_slowly_is_waited_for(talk: Talk) -> None:
    talk.tell(ev.PeerHeard())


@conversation(peer_silence_limit_s=3)
def test_every_pass_is_a_sign_of_life(talk: Talk) -> None:
    to_receiving(talk)
    for index in range(10):
        talk.wait(2.9)
        talk.tell(ev.PassReceived(index))


@conversation()
def test_a_vm_that_cannot_be_removed_is_not_reported_as_gone(talk: Talk) -> None:
    to_destroying(talk)
    talk.echoes(ev.CommandFailed("LoadState", "vmm", "QEMU refused the device state"))
    talk.tell(failed(ev.DestroyVm), ev.Publish(ended=True), then=D.ABORTED)
    assert talk.machine.error == (
        "the connection broke; and the destination VM could not be removed: DestroyVm was refused"
    )


# --- trouble around the commit -----------------------------------------------------------------------


@conversation(after=(to_committing,))
def test_nothing_but_the_register_decides_while_a_commit_is_under_way(talk: Talk) -> None:
    talk.tell(LINK_LOST)
    talk.echoes(
        PEER_ABORTED,
        failed(ev.ResumeVm),
        ev.PeerHeard(),
        ev.CancelRequested(),
        ev.MigrationKnown(True),
    )
    talk.wait(1000)
    commits(talk, ev.SwapWon())


@conversation(after=(to_committing,))
def test_the_source_was_first(talk: Talk) -> None:
    gives_up(talk, LOST_TO_SOURCE)
    is_gone(talk)
    assert talk.machine.error == "the source took the migration back before the commit"


@conversation(after=(to_committing,))
def test_an_unanswered_commit_is_asked_again_until_the_outcome_is_known(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S - 0.1)
    talk.wait(0.1, ev.SwapToDestination())
    talk.wait(1000)
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S, ev.SwapToDestination())
    assert talk.machine.runs_at == "unknown until the register answers"
    commits(talk, WON_EARLIER)


@conversation(after=(to_committing,))
def test_a_store_without_space_ends_the_migration(talk: Talk) -> None:
    gives_up(talk, ev.SwapRefused("no space left"))
    is_gone(talk)
    assert (talk.machine.error_code, talk.machine.error) == ("store-full", "no space left")


@conversation(after=(to_committing,))
def test_a_refusal_after_an_unanswered_commit_is_no_proof(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S, ev.SwapToDestination())
    talk.tell(ev.SwapRefused("no space left"))
    talk.wait(SWAP_RETRY_S, ev.SwapToDestination())
    commits(talk, WON_EARLIER)


@conversation(after=(to_committing,))
def test_a_register_that_another_migration_has_moved_on(talk: Talk) -> None:
    gives_up(talk, ev.SwapLost("south", 11))


@conversation(after=(to_committing,))
def test_a_commit_that_is_made_for_a_dead_qemu_loses_the_vm_and_says_so(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.wait(10)
    talk.tell(ev.SwapWon(), ev.TellPeerCommitted(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.FAILED
    assert talk.machine.runs_at.startswith("nowhere: the destination's QEMU died")


@conversation(after=(to_committing,))
def test_a_dead_qemu_is_not_committed_again_but_the_commit_taken_back(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S, ev.SwapToSource(), then=D.REVOKING)
    talk.echoes(PEER_ABORTED)
    gives_up(talk, ev.SwapWon())
    is_gone(talk)
    assert talk.machine.error_code == "vmm"


@conversation(after=(to_committing,))
def test_an_unanswered_commit_of_a_dead_qemu_was_made(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.tell(ev.QemuDied("signal 9"))
    talk.wait(SWAP_RETRY_S, ev.SwapToSource(), then=D.REVOKING)
    talk.tell(WON_EARLIER, ev.TellPeerCommitted(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.runs_at.startswith("nowhere: the destination's QEMU died")


@conversation(after=(to_committing,))
def test_a_source_that_has_gone_proves_it_even_to_a_dead_qemu(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.tell(ev.QemuDied("signal 9"))
    talk.wait(SWAP_RETRY_S, ev.SwapToSource(), then=D.REVOKING)
    talk.tell(ev.PeerFinished(), ev.TellPeerCommitted(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.runs_at.startswith("nowhere: ")


@conversation(after=(to_committing,))
def test_an_earlier_commit_of_a_dead_qemu_was_made(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(WON_EARLIER, ev.TellPeerCommitted(), ev.Publish(ended=True), then=D.DONE)


@conversation(after=(to_committing,))
def test_a_source_that_has_gone_proves_that_the_commit_was_made(talk: Talk) -> None:
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S, ev.SwapToDestination())
    commits(talk, ev.PeerFinished())
    talk.echoes(ev.SwapRefused("no space left"))
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.RUNNING)
    talk.echoes(ev.SwapRefused("no space left"))


# --- after the commit --------------------------------------------------------------------------------


@conversation(after=(to_resuming,))
def test_the_vm_is_resumed_whatever_becomes_of_the_source(talk: Talk) -> None:
    talk.tell(LINK_LOST)
    talk.echoes(
        PEER_ABORTED,
        ev.PeerHeard(),
        ev.CancelRequested(),
        ev.SwapUnknown("no answer"),
        WON_EARLIER,
        ev.SwapWon(),
        ev.PeerFinished(),
        failed(ev.DestroyVm),
    )
    talk.wait(1000)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.RUNNING)


@conversation(after=(to_resuming,))
def test_a_qemu_that_will_not_resume_is_asked_again_and_then_given_up(talk: Talk) -> None:
    for _ in range(RESUME_ATTEMPTS - 1):
        talk.tell(failed(ev.ResumeVm))
        talk.wait(SWAP_RETRY_S - 0.1)
        talk.wait(0.1, ev.ResumeVm())
        talk.wait(10)
    talk.tell(failed(ev.ResumeVm), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.FAILED
    assert talk.machine.runs_at.startswith("nowhere: ")


@conversation(after=(to_resuming, to_running))
def test_a_qemu_that_dies_after_the_commit_loses_the_vm(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.FAILED
    assert talk.machine.runs_at == "nowhere: the destination's QEMU died after the commit: signal 9"


@conversation(after=(to_running,))
def test_a_running_vm_is_left_alone(talk: Talk) -> None:
    talk.echoes(
        PEER_ABORTED,
        ev.PeerHeard(),
        ev.CancelRequested(),
        failed(ev.ResumeVm),
        ev.SwapWon(),
        WON_EARLIER,
        ev.SwapUnknown("no answer"),
    )


# --- a mover that takes over -------------------------------------------------------------------------


@conversation()
def test_a_successor_moves_the_register_on_before_it_destroys(talk: Talk) -> None:
    talk.tell(ev.Recovered(state_may_be_sent=True), ev.SwapToSource(), then=D.REVOKING)
    assert talk.machine.runs_at == "unknown until the register answers"
    talk.tell(LINK_LOST)
    talk.echoes(PEER_ABORTED, failed(ev.SwapToDestination), ev.PeerHeard(), ev.CancelRequested())
    gives_up(talk, ev.SwapWon())
    is_gone(talk)
    assert talk.machine.error_code == "mover-died"


@conversation()
def test_a_successor_that_is_cancelled_before_it_knows_what_it_is_destroys_nothing(talk: Talk) -> None:
    talk.tell(ev.CancelRequested())
    talk.tell(ev.QemuDied("its process ended"))
    talk.tell(ev.Recovered(state_may_be_sent=True), ev.SwapToSource(), then=D.REVOKING)


@conversation()
def test_a_successor_that_cannot_look_for_its_vm_destroys_nothing(talk: Talk) -> None:
    talk.tell(ev.CommandFailed("Begin", "system", "no such file"), ev.SwapToSource(), then=D.REVOKING)
    commits(talk, WON_EARLIER)


@conversation(after=(to_revoking,))
def test_a_successor_asks_until_the_register_answers(talk: Talk) -> None:
    talk.wait(1000)
    talk.tell(ev.SwapUnknown("the store did not answer"))
    talk.wait(SWAP_RETRY_S - 0.1)
    talk.wait(0.1, ev.SwapToSource())
    talk.tell(ev.SwapRefused("no space left"))
    talk.wait(SWAP_RETRY_S, ev.SwapToSource())
    gives_up(talk, LOST_TO_SOURCE)
    is_gone(talk)


@conversation(after=(to_revoking,))
def test_a_successor_whose_predecessor_had_committed_resumes(talk: Talk) -> None:
    commits(talk, WON_EARLIER)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.RUNNING)
    talk.wait(FINISH_LIMIT_S + 0.1, ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED
    assert talk.machine.error == ""


@conversation(after=(to_revoking,))
def test_a_successor_that_finds_its_qemu_dead_after_the_commit(talk: Talk) -> None:
    talk.tell(ev.QemuDied("signal 9"))
    talk.tell(WON_EARLIER, ev.TellPeerCommitted(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.runs_at.startswith("nowhere: ")


# --- late echoes -------------------------------------------------------------------------------------


@conversation(after=(to_destroying,))
def test_echoes_while_the_vm_is_destroyed(talk: Talk) -> None:
    talk.wait(1000)
    talk.echoes(
        LINK_LOST,
        PEER_ABORTED,
        ev.PeerHeard(),
        ev.CancelRequested(),
        ev.QemuDied("signal 15"),
        ev.Listening(),
        ev.SourceConnected(),
        ev.PassReceived(1),
        ev.LastPagesReceived(),
        ev.StateReceived(),
        ev.StateLoaded(),
        ev.SwapWon(),
        LOST_TO_SOURCE,
        ev.SwapUnknown("no answer"),
        ev.SwapRefused("no space"),
    )
    is_gone(talk)
    talk.echoes(ev.SwapWon(), LINK_LOST, ev.CancelRequested())


# --- what must never be believed ---------------------------------------------------------------------


@conversation(after=(at_the_begin, *BEFORE_THE_COMMIT))
def test_no_swap_is_won_that_nobody_asked_for(talk: Talk) -> None:
    talk.refuses(ev.SwapWon())
    talk.refuses(WON_EARLIER)
    talk.refuses(ev.VmResumed())


@conversation(after=(to_waiting, to_receiving))
def test_a_device_state_before_the_last_pages_is_not_taken(talk: Talk) -> None:
    talk.refuses(ev.StateReceived())


# --- the whole table ---------------------------------------------------------------------------------


# --- pages owed after the resume ---------------------------------------------------------------------


@conversation(after=(to_paging,))
def test_the_last_page_that_was_owed_is_told(talk: Talk) -> None:
    talk.tell(ev.AllPaged(), ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)
    talk.tell(ev.PeerFinished(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


@conversation(after=(to_owing_loading,))
def test_pages_that_all_came_while_the_state_was_loaded(talk: Talk) -> None:
    talk.tell(ev.LastPagesReceived(owed_pages=3))
    talk.tell(ev.AllPaged())
    talk.tell(ev.StateReceived())
    talk.tell(ev.StateLoaded(), ev.SwapToDestination(), then=D.COMMITTING)
    commits(talk, ev.SwapWon())
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_owing_committing, to_owing_revoking))
def test_pages_that_all_came_before_the_register_answered(talk: Talk) -> None:
    talk.tell(ev.AllPaged())
    commits(talk, WON_EARLIER)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_owing_resuming,))
def test_pages_that_all_came_before_the_resume(talk: Talk) -> None:
    talk.tell(ev.AllPaged())
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_paging,))
def test_a_lost_source_is_waited_for(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    assert talk.machine.runs_at.startswith("destination host south; it lacks pages that only host north has")
    talk.tell(LINK_LOST, ev.Publish())
    for _ in range(1000):
        talk.wait(0.01 + ASK_AGAIN_S, ev.AskController())
        talk.tell(ev.MigrationKnown(going_on=True))
    talk.tell(ev.SourceConnected(), ev.Publish())
    assert talk.machine.runs_at == "destination host south"
    talk.tell(ev.AllPaged(), ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_paging,), give_up_after_s=30)
def test_a_lost_source_is_waited_for_as_long_as_was_said(talk: Talk) -> None:
    talk.wait(100)
    talk.tell(LINK_LOST, ev.Publish())
    talk.wait(29, ev.AskController())
    talk.wait(1, ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.FAILED
    assert "lacks pages that only host north had" in talk.machine.error
    assert talk.machine.runs_at == "destination host south"


@conversation(after=(to_paging,))
def test_a_qemu_that_dies_while_paging_is_lost(talk: Talk) -> None:
    talk.tell(ev.QemuDied("killed"), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.runs_at.startswith("nowhere: ")


@conversation(after=(to_paging,))
def test_nothing_takes_a_paging_vm_away(talk: Talk) -> None:
    talk.echoes(
        PEER_ABORTED,
        ev.PeerFinished(),
        ev.CancelRequested(),
        failed(ev.TellPeerRunning),
        ev.MigrationKnown(going_on=False),
        ev.SwapWon(),
        LOST_TO_SOURCE,
        ev.SwapUnknown("late"),
        ev.SwapRefused("full"),
    )
    talk.tell(ev.PeerHeard())


@conversation(after=(to_paging,))
def test_a_source_that_has_lost_what_it_owed_is_not_waited_for(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    lost = ev.MigrationKnown(going_on=False, pages_lost=True)
    talk.tell(lost, ev.Publish(ended=True), then=D.DONE)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, "pages-lost")


DIFFERS = ev.MemoryDiffers("page 7 of transhume-ram0")


def to_verifying(talk: Talk) -> None:
    to_paging(talk)
    talk.tell(ev.AllPlaced(), ev.VerifyPages())


@conversation(after=(to_verifying,), verify=True)
def test_pages_that_are_verified_are_told(talk: Talk) -> None:
    talk.tell(ev.AllPaged(), ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)
    talk.tell(ev.PeerFinished(), ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


@conversation(after=(to_verifying, to_running), verify=True)
def test_memory_that_differs_ends_it_and_the_vm_runs_on(talk: Talk) -> None:
    talk.tell(DIFFERS, ev.Publish(ended=True), then=D.DONE)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, "memory-differs")
    assert "runs at host south with memory that differs" in talk.machine.error
    assert "page 7 of transhume-ram0" in talk.machine.error
    assert talk.machine.runs_at == "destination host south"


@conversation(after=(to_owing_loading, to_owing_committing, to_owing_resuming), verify=True)
def test_pages_that_are_all_placed_before_the_resume_are_verified_after_it(talk: Talk) -> None:
    talk.tell(ev.AllPlaced())
    if talk.machine.state is D.LOADING:
        talk.tell(ev.StateReceived())
        talk.tell(ev.StateLoaded(), ev.SwapToDestination(), then=D.COMMITTING)
    if talk.machine.state is not D.RESUMING:
        commits(talk, WON_EARLIER)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.VerifyPages(), ev.Publish(), then=D.PAGING)


@conversation(after=(to_owing_revoking,), verify=True)
def test_a_successor_verifies_with_a_source_that_has_come_to_it(talk: Talk) -> None:
    talk.tell(ev.AllPlaced())
    commits(talk, WON_EARLIER)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.PAGING)
    talk.tell(ev.SourceConnected(), ev.VerifyPages(), ev.Publish())


@conversation(after=(to_verifying,), verify=True)
def test_a_comparison_is_made_again_with_a_source_that_comes_back(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    assert talk.machine.runs_at == "destination host south"  # it lacks nothing
    talk.wait(ASK_AGAIN_S + 0.1, ev.AskController())
    talk.tell(ev.SourceConnected(), ev.VerifyPages(), ev.Publish())
    talk.tell(ev.AllPaged(), ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_verifying,), verify=True)
def test_a_vm_that_has_all_its_pages_does_without_a_source_that_never_comes(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    talk.wait(COMPARE_WAIT_S - 1, ev.AskController())
    talk.wait(1, ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_verifying,), verify=True, give_up_after_s=3)
def test_a_source_that_is_given_up_takes_no_page_with_it(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    talk.wait(3, ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_verifying,), verify=True)
def test_a_source_that_lost_its_memory_takes_no_page_with_it(talk: Talk) -> None:
    lost = ev.MigrationKnown(going_on=False, pages_lost=True)
    talk.tell(lost, ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)


@conversation(after=(to_destroying,))
def test_late_word_of_pages_and_differences_changes_nothing(talk: Talk) -> None:
    talk.echoes(ev.AllPlaced(), DIFFERS)


@conversation(after=(to_running,))
def test_pages_cannot_be_placed_twice(talk: Talk) -> None:
    talk.echoes(ev.AllPlaced())


SAFE = MigrationOptions(mode=Mode.POST_COPY, safe_dir="/srv/shared")


def to_safe_paging(talk: Talk) -> None:
    to_paging(talk)
    talk.machine.migration = talk.machine.migration.model_copy(update={"options": SAFE})
    talk.tell(LINK_LOST, ev.Publish(), ev.ReadSafeCopy())


@conversation(after=(to_safe_paging,))
def test_a_safe_copy_that_holds_all_takes_the_sources_place(talk: Talk) -> None:
    talk.tell(ev.AllPaged(), ev.TellPeerPaged, ev.Publish(), then=D.RUNNING)
    talk.tell(ev.SafeCopyRead(0))
    talk.wait(FINISH_LIMIT_S + 0.1, ev.Publish(ended=True), then=D.DONE)
    assert talk.machine.outcome is Outcome.COMPLETED


@conversation(after=(to_safe_paging,))
def test_a_safe_copy_that_grows_is_read_again(talk: Talk) -> None:
    talk.wait(ASK_AGAIN_S + 0.1, ev.AskController())  # one reading at a time
    talk.tell(ev.SafeCopyRead(5))
    talk.wait(ASK_AGAIN_S + 0.1, ev.AskController(), ev.ReadSafeCopy())
    talk.tell(failed(ev.ReadSafeCopy))
    talk.wait(ASK_AGAIN_S + 0.1, ev.AskController(), ev.ReadSafeCopy())
    talk.tell(ev.SourceConnected(), ev.Publish())
    talk.tell(ev.SafeCopyRead(5))
    talk.wait(ASK_AGAIN_S + 0.1)


@conversation(after=(to_safe_paging,))
def test_what_neither_source_nor_copy_has_is_lost(talk: Talk) -> None:
    talk.tell(ev.MigrationKnown(going_on=False, pages_lost=True))
    talk.tell(ev.SafeCopyRead(5), ev.Publish(ended=True), then=D.DONE)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, "pages-lost")


@conversation(after=(to_safe_paging,))
def test_a_lost_source_without_a_readable_copy_is_lost(talk: Talk) -> None:
    talk.tell(failed(ev.ReadSafeCopy))
    talk.tell(ev.MigrationKnown(going_on=False, pages_lost=True), ev.ReadSafeCopy())
    talk.tell(failed(ev.ReadSafeCopy), ev.Publish(ended=True), then=D.DONE)


@conversation(after=(to_destroying,))
def test_a_safe_copy_that_was_read_too_late(talk: Talk) -> None:
    talk.echoes(ev.SafeCopyRead(5))


@conversation(after=(to_paging,))
def test_a_vm_that_was_taken_back_is_ended_here(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    revoked = ev.MigrationKnown(going_on=False, failed=True, revoked=True)
    talk.tell(revoked, ev.StopWork(), ev.DestroyVm(), then=D.DESTROYING)
    talk.tell(ev.VmDestroyed(), ev.TellPeerFailed, ev.Publish(ended=True), then=D.ABORTED)
    assert (talk.machine.outcome, talk.machine.error_code) == (Outcome.FAILED, REVOKED)


@conversation(after=(to_owing_committing, to_owing_resuming, to_owing_revoking))
def test_a_source_lost_before_the_resume_is_missed_after_it(talk: Talk) -> None:
    talk.tell(ev.SourceConnected())
    talk.tell(LINK_LOST)
    if talk.machine.state is not D.RESUMING:
        commits(talk, WON_EARLIER)
    talk.tell(ev.VmResumed(), ev.TellPeerRunning, ev.Publish(), then=D.PAGING)
    assert "waits for them" in talk.machine.runs_at


@conversation(after=(to_committing, to_revoking, to_resuming, to_running))
def test_a_source_that_comes_again_changes_nothing(talk: Talk) -> None:
    talk.tell(ev.SourceConnected())
    talk.tell(ev.SourceConnected())


@conversation(after=(to_paging,))
def test_a_vm_that_found_its_pages_elsewhere_is_ended_when_it_was_taken_back(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    talk.tell(ev.AllPaged(), ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)
    talk.wait(ASK_AGAIN_S, ev.AskController())
    talk.tell(ev.MigrationKnown(going_on=True))
    talk.wait(ASK_AGAIN_S - 0.1)
    talk.wait(0.1, ev.AskController())
    revoked = ev.MigrationKnown(going_on=False, failed=True, revoked=True)
    talk.tell(revoked, ev.StopWork(), ev.DestroyVm(), then=D.DESTROYING)
    assert talk.machine.error_code == "revoked"


@conversation(after=(to_paging,))
def test_a_source_that_is_back_is_not_asked_about(talk: Talk) -> None:
    talk.tell(LINK_LOST, ev.Publish())
    talk.tell(ev.AllPaged(), ev.TellPeerPaged(), ev.Publish(), then=D.RUNNING)
    talk.tell(ev.SourceConnected())
    talk.wait(ASK_AGAIN_S)


@conversation(after=(to_running, to_destroying))
def test_a_late_word_of_the_pager_changes_nothing(talk: Talk) -> None:
    talk.echoes(ev.AllPaged())


def test_every_rule_is_taken_by_some_conversation() -> None:
    assert conversation.rules_never_taken() == []
