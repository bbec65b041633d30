"""The destination's mover in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine
from transhume.migration.destination_table import DestinationState
from transhume.migration.machine import Command, Event
from transhume.model.migration import Engine, Outcome, Rest
from transhume.sim.controller import Update
from transhume.sim.host import SimHost
from transhume.sim.invariants import Violation
from transhume.sim.link import Message, Word
from transhume.sim.mover import HEARD, TICK, MoverWorld, SimMover
from transhume.sim.plan import Side
from transhume.sim.vm import VmStatus

TAKE_OVER_RETRY_S = 1.0
GIVE_UP_SLACK_S = 5.0
"""How much longer than asked for a destination may wait for a lost source."""


class LoadState(Command):
    """Not the machine's: the driver feeds QEMU while the state arrives."""


class SimDestinationMover(SimMover):
    """Makes a VM, fills it with what arrives, and lets it run or removes it."""

    side = Side.DESTINATION

    def __init__(
        self,
        world: MoverWorld,
        host: SimHost,
        machine: DestinationMachine,
        prepared: Callable[[], None],
    ) -> None:
        super().__init__(world, host, machine)
        self._destination = machine
        self._prepared = prepared
        self._predecessor_state = host.last_state
        self._owed: set[int] = set()
        self._pages: set[int] | None = None
        self._alone_since_s: float | None = None
        self._heard_s = 0.0
        self._paging_since_s = 0.0
        self._paged_is_due = False
        self._compares = False
        self.heard_difference = ""

    @property
    def accepts(self) -> bool:
        """Whether a source that connects now is let in; once pages were owed it may come again."""
        if self._pages is not None:
            return self.alive
        return self.alive and self.machine.state is DestinationState.WAITING and self.link is None

    def begin(self, predecessor_state: str | None) -> None:
        if predecessor_state is not None:
            self._recover(predecessor_state)
        elif not self.fails_to_begin(predecessor_state):
            self.qemu(self._made)

    def _recover(self, predecessor_state: str) -> None:
        """Nobody else serves the faults of a VM that lacks pages: it is tried until that is taken over."""
        if self.host.owed is None or not self.vm.lives:
            if not self.fails_to_begin(predecessor_state):
                self.tell(ev.Recovered(state_may_be_sent=True))
            return
        if self.strikes(self.world.plan.begin_failure_share):
            self.after(TAKE_OVER_RETRY_S, self._recover, predecessor_state)
            return
        self._take_over_paging(self.host.owed)
        self.tell(ev.Recovered(state_may_be_sent=True))
        if not self._pages:
            self.after(0.0, self.tell, self._when_placed())

    def _when_placed(self) -> Event:
        """A predecessor that was past the comparison may have ended the account of writes: no second one."""
        compared = self._predecessor_state == DestinationState.RUNNING
        return ev.AllPlaced() if self.world.plan.options.verify and not compared else ev.AllPaged()

    def update(self) -> Update:
        machine = self._destination
        outcome = Outcome.RUNNING
        if machine.finished and (machine.state is DestinationState.DONE or machine.source_never_came):
            outcome = machine.outcome
        lacks_nothing = self._pages is not None and not self._pages
        return Update(
            self.side,
            machine.phase,
            outcome,
            machine.runs_at,
            machine.error_code,
            machine.error,
            lacks_nothing,
            paged=lacks_nothing and not self._needs_comparison,
        )

    @property
    def _needs_comparison(self) -> bool:
        """Whether the source is needed although no page is missing."""
        machine = self._destination
        past = machine.state in (DestinationState.RUNNING, DestinationState.DONE) and not machine.error_code
        return self.world.plan.options.verify and not past

    def _made(self) -> None:
        if self.vm.status is VmStatus.ABSENT:
            self.vm.change(VmStatus.PAUSED)
        self.after(self.world.rng.uniform(0.01, 0.3), self._listen)

    def _listen(self) -> None:
        if not self.vm.lives or not self.world.register.reachable(self.side):
            self.tell(ev.CommandFailed("Begin", "vmm", "QEMU or the controller does not answer"))
            return
        self.tell(ev.Listening())
        if self.alive:
            self._prepared()

    def carry_out(self, command: Command) -> None:
        if isinstance(command, ev.TellPeerCommitted):
            self.send(Word.COMMITTED)
        elif isinstance(command, ev.TellPeerRunning):
            self.send(Word.RUNNING)
        elif isinstance(command, ev.VerifyPages):
            self._compares = True
            self.work(self.world.rng.uniform(0.001, 1.0), self._send_digests)
        elif isinstance(command, ev.TellPeerPaged):
            self._paged_is_due = True
            self.after(0.01, self._paged)
        elif isinstance(command, ev.ReadSafeCopy):
            self.after(self.world.rng.uniform(0.001, 0.3), self._read_safe_copy)
        elif isinstance(command, ev.TellPeerFailed):
            self.send(Word.FAILED, text=command.message)
        elif isinstance(command, ev.DestroyVm):
            self._destroy()
        else:
            raise NotImplementedError(f"the simulated destination cannot carry out {command}")

    def tell(self, event: Event) -> None:
        if event is TICK and (self._pages or self._compares):
            self._miss_the_source()
        super().tell(event)
        if isinstance(event, ev.VmResumed):
            self._paging_since_s = self.world.schedule.now_s

    def taken(self, event: Event) -> None:
        self.vm.uncompared &= self.machine.state not in (DestinationState.RUNNING, DestinationState.DONE)

    def _miss_the_source(self) -> None:
        """The stream itself notices silence: it ends, and the source hears that, if it hears anything."""
        options, now_s = self.world.plan.options, self.world.schedule.now_s
        if self.link is not None and now_s - self._heard_s > options.peer_silence_limit_s:
            self.drop_link()
            super().tell(ev.LinkLost("timed-out", "the source says nothing"))
            self.lost()
        give_up_s, since_s = options.give_up_after_s, self._alone_since_s
        if since_s is None or not self._pages or self.machine.state is not DestinationState.PAGING:
            return
        if "lacks pages" not in self.machine.runs_at:
            raise Violation(f"alone since {since_s:.1f} s, and does not say so: {self.machine.runs_at}")
        if give_up_s is not None and now_s - max(since_s, self._paging_since_s) > give_up_s + GIVE_UP_SLACK_S:
            raise Violation(f"alone since {since_s:.1f} s, and gives up after {give_up_s:g} s")

    def hear(self, message: Message) -> None:
        self._heard_s = self.world.schedule.now_s
        if message.word is Word.HELLO:
            self._welcome()
        elif message.word is Word.PAGE:
            self._take_pages(message.pages)
        elif message.word is Word.PING:
            self.tell(HEARD)
        elif message.word is Word.PASS_END:
            self.send(Word.PASS_ACK, message.number)
            self.tell(ev.PassReceived(message.number or 0))
        elif message.word is Word.LAST_PAGES:
            self._take_last_pages(message)
        elif message.word is Word.STATE:
            self._take_state(message.number)
        elif message.word is Word.NATIVE_STREAM:
            self.work(self.world.rng.uniform(0.001, 0.1), self._native_loaded, message.number)
        elif message.word is Word.ABORT:
            self.tell(ev.PeerAborted(message.text))
        elif message.word is Word.COMPARED:
            self._take_comparison(message.text)
        elif message.word is Word.FINISHED:
            self.tell(ev.PeerFinished())

    def _welcome(self) -> None:
        self._alone_since_s = None
        self.tell(ev.SourceConnected())
        if self._pages is None:
            self.send(Word.WELCOME)
        else:
            text = "to compare" if self._needs_comparison else ""
            self.send(Word.MISSING, text=text, pages=tuple(sorted(self._pages)))

    def _take_last_pages(self, message: Message) -> None:
        if self.world.plan.options.engine is not Engine.QEMU:
            self.vm.ram_content = message.number
        self._owed |= set(message.pages)
        self.tell(ev.LastPagesReceived(len(message.pages)))

    def _take_state(self, content: int | None) -> None:
        """QEMU loads while the state arrives, and may have taken it before its end mark is here."""
        if self.world.plan.options.engine is Engine.QEMU:
            self.tell(ev.StateReceived())
        elif self._owed:
            self._start_paging()
            self.tell(ev.StateReceived())
            if not self.world.plan.load_hangs:
                self.work(self.world.rng.uniform(0.001, 0.2), self._load_with_missing, content)
        elif self.world.rng.random() < 0.3 and not self.world.plan.load_hangs and self.vm.lives:
            self._load(content)
            self.work(0.001, self.tell, ev.StateReceived())
        else:
            self.tell(ev.StateReceived())
            if not self.world.plan.load_hangs:
                self.work(self.world.rng.uniform(0.001, 0.2), self._load, content)

    def _load(self, content: int | None) -> None:
        if not self.vm.lives:
            self.fail(LoadState, 0.0, "QEMU does not run")
        elif not self.fails(LoadState):
            self.vm.state_content = content
            self.tell(ev.StateLoaded())

    # --- pages owed after the resume -------------------------------------------------------------

    def _start_paging(self) -> None:
        """From here on nobody reads a page that was named as owed before it is placed."""
        self.host.owed = frozenset(self._owed)
        self._pages = set(self._owed)
        self.vm.owe(self._owed)
        self.vm.uncompared = self.world.plan.options.verify
        self.vm.guard(True)
        self.after(0.01, self._fault)

    def _take_over_paging(self, owed: frozenset[int]) -> None:
        """A successor: what is in memory was placed; the rest of what was noted is missing."""
        self._pages = self.still_missing(owed)
        self._alone_since_s = self.world.schedule.now_s
        self.vm.guard(True)
        if self._pages:
            self.after(0.01, self._fault)

    def still_missing(self, owed: frozenset[int]) -> set[int]:
        """What a successor takes for missing."""
        return set(owed) - self.vm.placed

    def _fault(self) -> None:
        """Some vCPU needs some page, now and then, and asks for it again until it is there."""
        if self._pages and self.vm.lives:
            if self.vm.status is VmStatus.RUNNING:
                self._fetch(self.world.rng.choice(sorted(self._pages)))
            self.after(self.world.rng.uniform(0.01, 1.0), self._fault)

    def _fetch(self, page: int) -> None:
        if self.world.plan.options.rest is not Rest.BACKGROUND:
            self.send(Word.FETCH, pages=(page,))

    def _load_with_missing(self, content: int | None) -> None:
        """To load the device state may need a page: it waits for it like everybody else."""
        if self._pages and self.world.rng.random() < 0.3:
            self._load_when_here(content, self.world.rng.choice(sorted(self._pages)))
        else:
            self._load(content)

    def _load_when_here(self, content: int | None, page: int) -> None:
        if self._pages and page in self._pages and self.vm.lives:
            self._fetch(page)
            self.work(0.05, self._load_when_here, content, page)
        else:
            self._load(content)

    def _take_pages(self, pages: tuple[int, ...]) -> None:
        self.tell(HEARD)
        self._place(pages)

    def _place(self, pages: Iterable[int]) -> None:
        if not self._pages or not self.vm.lives:
            return
        for page in self.unplaced(pages):
            self.vm.place(page)
            self._pages.discard(page)
        if not self._pages:
            self.tell(self._when_placed())

    def _send_digests(self) -> None:
        """What is said on a connection that has ended is said again on the next."""
        if not self._compares:
            return
        if self.strikes(self.world.plan.command_failure_share):
            self._compares = False
            self.tell(ev.AllPaged())  # the kernel has lost the account of writes: nothing can be compared
        else:
            self.send(Word.DIGESTS)

    def _take_comparison(self, difference: str) -> None:
        if not self._compares:
            return
        self._compares = False
        if difference:
            self.heard_difference = difference
            self.vm.guard(False)
            self.tell(ev.MemoryDiffers(difference))
        else:
            self.tell(ev.AllPaged())

    def unplaced(self, pages: Iterable[int]) -> tuple[int, ...]:
        """What has come twice is dropped the second time: the guest may have written it since."""
        assert self._pages is not None
        return tuple(page for page in pages if page in self._pages)

    def _paged(self) -> None:
        if self._paged_is_due:
            self._paged_is_due = False
            self.vm.guard(False)
            self.world.safe_copy.remove()  # a source that never comes back cannot do it
            self.send(Word.PAGED)

    def farewell(self) -> None:
        self._paged()

    def _read_safe_copy(self) -> None:
        copy = self.world.safe_copy
        if self._pages is None or not copy.readable:
            self.tell(ev.CommandFailed(ev.ReadSafeCopy.__name__, "vmm", "it cannot be read"))
            return
        self._place(sorted(copy.pages))
        self.tell(ev.SafeCopyRead(len(self._pages)))

    def lost(self) -> None:
        self._compares = False
        if self._alone_since_s is None:
            self._alone_since_s = self.world.schedule.now_s

    def _native_loaded(self, content: int | None) -> None:
        self.vm.ram_content = content
        self._load(content)

    def _destroy(self) -> None:
        if self.strikes(self.world.plan.command_failure_share):
            self.world.cleaning_failed = True
            self.after(0.05, self.tell, ev.CommandFailed("DestroyVm", "vmm", "it was refused"))
        else:
            self.qemu(self._destroyed)

    def _destroyed(self) -> None:
        self.vm.change(VmStatus.GONE)
        self.after(0.001, self.tell, ev.VmDestroyed())
