"""The words in which the machines speak: events that they take and commands that they give.

Durations are seconds, sizes bytes, amounts of memory pages of 4096 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transhume.migration.machine import Command, Event
from transhume.model.migration import MigrationOptions, PagingReport, Rest


@dataclass(frozen=True)
class PassResult:
    """One pass over the memory, as the sender measured it.

    `dirty_pages_after` were found modified by the scan that ended the pass; `unsent_pages` is not zero
    when the pass was interrupted. `written_bytes_s` is how fast the guest wrote, where that was sampled.
    """

    index: int
    pages: int
    zero_pages: int
    wire_bytes: int
    duration_s: float
    dirty_pages_after: int
    unsent_pages: int = 0
    written_bytes_s: float | None = None


# --- events at both ends ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick(Event):
    """Time passed. Comes at least ten times a second while a machine lives."""


@dataclass(frozen=True)
class PeerHeard(Event):
    """Any sign of life of the other end."""


@dataclass(frozen=True)
class LinkLost(Event):
    """The connection to the other end is gone, or it broke the protocol."""

    code: str
    message: str


@dataclass(frozen=True)
class SwapWon(Event):
    """The register took our swap."""


@dataclass(frozen=True)
class SwapLost(Event):
    """The register held something else than we expected: what it holds."""

    owner: str
    epoch: int


@dataclass(frozen=True)
class SwapUnknown(Event):
    """No answer: the swap may have been made or not."""

    message: str


@dataclass(frozen=True)
class SwapRefused(Event):
    """The store could not take the swap and certainly did not make it (no space)."""

    message: str


@dataclass(frozen=True)
class VmResumed(Event):
    """The vCPUs run on this host."""


@dataclass(frozen=True)
class MemoryDiffers(Event):
    """Pages that the guest has not written at the destination are not what the source has; which, in
    words.
    """

    difference: str


@dataclass(frozen=True)
class CommandFailed(Event):
    """A command could not be carried out; `command` is its class's name."""

    command: str
    code: str
    message: str


@dataclass(frozen=True)
class QemuDied(Event):
    """This end's QEMU process has ended."""

    message: str


# --- events at the source --------------------------------------------------------------------------


@dataclass(frozen=True)
class Started(Event):
    """The mover runs and has found its VM."""


@dataclass(frozen=True)
class Recovered(Event):
    """A new mover takes over from one that died.

    `state_may_be_sent` is read from the journal: whether the destination may hold the device state. `paging`:
    whether the destination was known to run, and to lack pages. `reviving`: whether the VM was being taken
    back from a destination that is lost.
    """

    state_may_be_sent: bool
    paging: bool = False
    reviving: bool = False


@dataclass(frozen=True)
class Connected(Event):
    """The destination knows us, has the same RAM blocks and is ready."""


@dataclass(frozen=True)
class Armed(Event):
    """Writes are tracked from here on.

    `switchover_cost_s` is what device state and commit are expected to cost, from measurements.
    """

    switchover_cost_s: float


@dataclass(frozen=True)
class PassEnded(Event):
    """A pass of the pre-copy is over."""

    result: PassResult


@dataclass(frozen=True)
class VmPaused(Event):
    """No vCPU runs at the source any more; `since_s` is when they were told to stop, if that is known."""

    since_s: float | None = None


@dataclass(frozen=True)
class RegisterSilent(Event):
    """Nobody answers for the register: a VM suspended now would wait for it, so it was not suspended."""

    message: str


@dataclass(frozen=True)
class LastPagesSent(Event):
    """Every page of the source's RAM has been sent with its final content, or named as owed."""

    result: PassResult
    verify_s: float = 0.0
    owed_pages: int = 0


@dataclass(frozen=True)
class StateSent(Event):
    """The device state has left, up to its end mark."""

    state_bytes: int


@dataclass(frozen=True)
class PeerCommitted(Event):
    """The destination won the register."""


@dataclass(frozen=True)
class PeerRunning(Event):
    """The destination's vCPUs run. The parts of the downtime as the destination timed them."""

    load_s: float
    commit_s: float
    resume_s: float


@dataclass(frozen=True)
class PeerFailed(Event):
    """The destination gave up for good: its VM is gone and no swap of its is under way."""

    code: str
    message: str


@dataclass(frozen=True)
class PeerPaged(Event):
    """No page is missing at the destination any more."""

    paging: PagingReport


@dataclass(frozen=True)
class Reconnected(Event):
    """The destination was found again, and has named the pages that it lacks.

    `to_compare`: it needs the source also when it lacks none, to verify them.
    """

    missing_pages: int
    to_compare: bool = False


@dataclass(frozen=True)
class SwitchRequested(Event):
    """A person asks to suspend the VM now and to leave the rest for after the resume."""


@dataclass(frozen=True)
class OptionsChanged(Event):
    """A person set other limits for the migration under way."""

    options: MigrationOptions


@dataclass(frozen=True)
class ReviveRequested(Event):
    """A person says that the destination is lost for good, and wants the VM back as it was suspended."""


@dataclass(frozen=True)
class CancelRequested(Event):
    """A person or program asked to stop."""


@dataclass(frozen=True)
class VmRetired(Event):
    """The source's QEMU has ended and what it held is free."""


# --- events at the destination ---------------------------------------------------------------------


@dataclass(frozen=True)
class Listening(Event):
    """The destination VM exists, paused, and the port is open (steps 2 to 4)."""


@dataclass(frozen=True)
class MigrationKnown(Event):
    """The controller's answer to step 3A's question: whether the migration still goes on.

    `paged`: the destination has reported that it needs nothing from the source any more; `lacks_nothing`,
    that no page is missing there, although they may still be verified. `pages_lost`: the source, that it has
    lost pages which it owed. `failed`: an end has reported that the migration failed. `revoked`: the register
    has gone on from the commit, so the VM is the destination's no more.
    """

    going_on: bool
    paged: bool = False
    lacks_nothing: bool = False
    pages_lost: bool = False
    failed: bool = False
    revoked: bool = False


@dataclass(frozen=True)
class SourceConnected(Event):
    """The source proved who it is and named the same RAM blocks."""


@dataclass(frozen=True)
class PassReceived(Event):
    """The source ended a pass."""

    index: int


@dataclass(frozen=True)
class LastPagesReceived(Event):
    """All RAM is here with its final content, but for the pages that are owed."""

    owed_pages: int = 0


@dataclass(frozen=True)
class AllPlaced(Event):
    """The last page that was owed is in its place; whether they are what the source has is to be verified."""


@dataclass(frozen=True)
class AllPaged(Event):
    """The last page that was owed is in its place, and nothing more is needed from the source."""


@dataclass(frozen=True)
class SafeCopyRead(Event):
    """What the safe copy held so far has been placed; so many pages are still missing."""

    left_pages: int


@dataclass(frozen=True)
class StateReceived(Event):
    """The device state arrived whole."""


@dataclass(frozen=True)
class StateLoaded(Event):
    """QEMU took the device state and is ready to run."""


@dataclass(frozen=True)
class PeerAborted(Event):
    """The source says that it goes on itself."""

    message: str


@dataclass(frozen=True)
class PeerFinished(Event):
    """The source is free: nothing is owed any more."""


@dataclass(frozen=True)
class VmDestroyed(Event):
    """The destination VM is gone, with all that it held."""


# --- commands at both ends -------------------------------------------------------------------------


@dataclass(frozen=True)
class StopWork(Command):
    """Stop whatever command is under way; its result no longer matters."""


@dataclass(frozen=True)
class SwapToSource(Command):
    """Swap `(source, epoch) -> (source, epoch + 1)`: the abort.

    Answered by SwapWon, SwapLost, SwapUnknown or SwapRefused.
    """


@dataclass(frozen=True)
class ResumeVm(Command):
    """Let this end's vCPUs run (at the source: go on as before). Answered by VmResumed."""


@dataclass(frozen=True)
class Publish(Command):
    """Tell the controller how far we are; with `ended` this is the last word."""

    ended: bool = False


# --- commands at the source ------------------------------------------------------------------------


@dataclass(frozen=True)
class ConnectPeer(Command):
    """Connect to the destination and prove who we are. Answered by Connected."""


@dataclass(frozen=True)
class ArmTracking(Command):
    """Start to track writes (ours), or check QEMU's readiness (native). Answered by Armed."""


@dataclass(frozen=True)
class SendPass(Command):
    """Send everything (index 0) or what the last scan found. Answered by PassEnded."""

    index: int


@dataclass(frozen=True)
class RunNative(Command):
    """Let QEMU's own engine copy. Answered by VmPaused when it stops the VM, then LastPagesSent."""


@dataclass(frozen=True)
class InterruptPass(Command):
    """End the pass under way after the batch in hand; PassEnded follows."""


@dataclass(frozen=True)
class PauseVm(Command):
    """Stop the vCPUs, if the register answers. Answered by VmPaused or RegisterSilent."""


@dataclass(frozen=True)
class SendLastPages(Command):
    """Scan once more and send what is left, or name it as owed; `rest` says when. Answered by LastPagesSent.

    With AFTER_STATE the device state goes first, without its end mark. When the rest is for after the resume,
    up to `budget_pages` of what was written last are sent all the same.
    """

    rest: Rest = Rest.BEFORE_STATE
    budget_pages: int = 0


@dataclass(frozen=True)
class SendState(Command):
    """Send the device state up to its end mark. Answered by StateSent."""


@dataclass(frozen=True)
class TellPeerAborted(Command):
    """Tell the destination, if it can be reached, that the source goes on."""

    message: str


@dataclass(frozen=True)
class RetireVm(Command):
    """End the source's QEMU and free what it held. Answered by VmRetired."""


@dataclass(frozen=True)
class TellPeerFinished(Command):
    """Tell the destination, if it can be reached, that nothing is owed any more."""


@dataclass(frozen=True)
class StartPush(Command):
    """Send what is owed in the background, if the order of transfer has that. Not answered."""


@dataclass(frozen=True)
class SwapBack(Command):
    """Swap `(destination, epoch + 1) -> (source, epoch + 2)`: take the VM back. Answered as SwapToSource."""


@dataclass(frozen=True)
class Reconnect(Command):
    """Find the destination again while pages are owed. Answered by Reconnected or CommandFailed."""


# --- commands at the destination -------------------------------------------------------------------


@dataclass(frozen=True)
class VerifyPages(Command):
    """Let the source compare every page that the guest has not written.

    Answered by AllPaged or MemoryDiffers; not at all when the connection is lost, and then commanded again.
    """


@dataclass(frozen=True)
class TellPeerPaged(Command):
    """Tell the source that no page is missing any more, with what paging was like."""


@dataclass(frozen=True)
class ReadSafeCopy(Command):
    """Place what the safe copy holds of the missing pages. Answered by SafeCopyRead or CommandFailed."""


@dataclass(frozen=True)
class AskController(Command):
    """Step 3A: ask whether the migration still goes on. Answered by MigrationKnown, or not at all."""


@dataclass(frozen=True)
class SwapToDestination(Command):
    """Swap `(source, epoch) -> (destination, epoch + 1)`: the commit. Answered as SwapToSource."""


@dataclass(frozen=True)
class TellPeerCommitted(Command):
    """Tell the source that the destination owns the VM."""


@dataclass(frozen=True)
class TellPeerRunning(Command):
    """Tell the source that the vCPUs run, with the timings."""

    load_s: float
    commit_s: float
    resume_s: float


@dataclass(frozen=True)
class DestroyVm(Command):
    """End the destination's QEMU and remove what it held. Answered by VmDestroyed."""


@dataclass(frozen=True)
class TellPeerFailed(Command):
    """Tell the source that we gave up for good, after the VM here is gone."""

    code: str
    message: str
