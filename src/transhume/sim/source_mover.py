"""The source's mover in the simulator."""

from __future__ import annotations

from collections.abc import Callable

from transhume.migration import events as ev
from transhume.migration.machine import Command, Event
from transhume.migration.source import SourceMachine
from transhume.migration.source_table import DESTINATION_MAY_COMMIT, SourceState
from transhume.model.errors import HostLost, PagesLost
from transhume.model.migration import Engine, Outcome, PagingReport, Rest
from transhume.model.vm import PAGE_BYTES
from transhume.sim.controller import Update
from transhume.sim.host import SimHost
from transhume.sim.link import Message, SimLink, Word
from transhume.sim.mover import HEARD, MoverWorld, SimMover
from transhume.sim.plan import Side
from transhume.sim.vm import VmStatus

STATE_BYTES = 300_000
SWITCHOVER_COST_S = 0.02
NATIVE_PASSES_LIMIT = 60
REGISTER_SILENT_S = 1.5
"""After so long a register that says nothing is asked again, before the VM is suspended."""

RECONNECT_LIMIT_S = 3.0
"""How long a destination that does not answer is waited for before it is looked for again."""

_MAY_BE_SENT = frozenset(
    state.value for state in (*DESTINATION_MAY_COMMIT, SourceState.COMMITTED, SourceState.RETIRING)
)
"""In the last two the register is known to be the destination's; the successor hears it again from there."""

_PAGING = frozenset({SourceState.PAGING.value, SourceState.RECONNECTING.value})


class SimSourceMover(SimMover):
    """Sends pages of a guest that dirties them again, as its plan says, and then pauses and retires it."""

    side = Side.SOURCE

    def __init__(
        self,
        world: MoverWorld,
        host: SimHost,
        machine: SourceMachine,
        connect: Callable[[SimSourceMover], None],
    ) -> None:
        super().__init__(world, host, machine)
        self._source = machine
        self._connect = connect
        self._pages_left = world.plan.guest.ram_pages
        self._pass_began_s = 0.0
        self._pass_index: int | None = None
        self._pass_pages = 0
        self._interrupted_unsent_pages = 0
        self._last_pages_index = 0
        self.has_ram = False
        self._owed: list[int] = []
        self._owed_at_switchover: set[int] = set(host.owed or ())
        self._copying: list[int] | None = None
        self._resumed_there = False
        self._reconnects = 0
        self._reconnecting = False
        self.found_difference = ""

    def begin(self, predecessor_state: str | None) -> None:
        # Whoever has opened the RAM keeps it, even when QEMU ends.
        self.has_ram = self.vm.lives
        if not self.has_ram:
            self.tell(ev.QemuDied("it does not run"))
        if self.fails_to_begin(predecessor_state):
            return
        if predecessor_state is None:
            self.tell(ev.Started())
        elif predecessor_state in _PAGING:
            self._begin_copying()
            self.tell(ev.Recovered(state_may_be_sent=True, paging=True))
        elif predecessor_state == SourceState.REVIVING:
            self.tell(ev.Recovered(state_may_be_sent=True, reviving=True))
        else:
            self.tell(ev.Recovered(state_may_be_sent=predecessor_state in _MAY_BE_SENT))

    def taken(self, event: Event) -> None:
        lacks = isinstance(event, ev.Reconnected) and event.missing_pages > 0
        if lacks or isinstance(event, ev.PeerRunning):
            self._begin_copying()

    def update(self) -> Update:
        machine = self._source
        return Update(
            self.side,
            machine.phase,
            machine.outcome if machine.finished else Outcome.RUNNING,
            machine.runs_at,
            machine.error_code,
            machine.error,
        )

    def farewell(self) -> None:
        return

    def carry_out(self, command: Command) -> None:
        rng = self.world.rng
        if isinstance(command, ev.ConnectPeer):
            self.work(rng.uniform(0.001, 0.2), self._connect, self)
        elif isinstance(command, ev.ArmTracking):
            self.work(rng.uniform(0.005, 0.1), self._arm)
        elif isinstance(command, ev.SendPass):
            self._send_pass(command.index)
        elif isinstance(command, ev.InterruptPass):
            self._interrupt()
        elif isinstance(command, ev.RunNative):
            self._run_native()
        elif isinstance(command, ev.PauseVm):
            self._pause_if_the_register_answers()
        elif isinstance(command, ev.SendLastPages):
            if command.rest.after_resume:
                self.work(0.002, self._name_owed)
            else:
                self.work(self._pages_left / self.world.plan.guest.link_pages_s, self._last_pages_sent)
        elif isinstance(command, ev.SendState):
            self.work(rng.uniform(0.002, 0.05), self._state_sent)
        elif isinstance(command, ev.TellPeerAborted):
            self.send(Word.ABORT, text=command.message)
        elif isinstance(command, ev.RetireVm):
            self._retire()
        elif isinstance(command, ev.TellPeerFinished):
            self.send(Word.FINISHED)
        elif isinstance(command, ev.StartPush):
            self.work(0.0, self._push)
        elif isinstance(command, ev.Reconnect):
            self.after(rng.uniform(0.001, 0.2), self._reconnect)
        else:
            raise NotImplementedError(f"the simulated source cannot carry out {command}")

    def hear(self, message: Message) -> None:
        self.tell(HEARD)
        if message.word is Word.WELCOME:
            self.tell(ev.Connected())
        elif message.word is Word.PASS_ACK:
            self._pass_acknowledged(message.number)
        elif message.word is Word.COMMITTED:
            self.tell(ev.PeerCommitted())
        elif message.word is Word.RUNNING:
            self._resumed_there = True
            self.tell(ev.PeerRunning(0.001, 0.001, 0.001))
        elif message.word is Word.FETCH:
            self._answer(message.pages)
        elif message.word is Word.DIGESTS:
            self.after(self.world.rng.uniform(0.001, 1.0), self._compare, self.link)
        elif message.word is Word.MISSING:
            self._reconnected(message.pages, to_compare=bool(message.text))
        elif message.word is Word.PAGED:
            self.host.owed = None  # a successor must not take for owed what has come
            self.tell(ev.PeerPaged(PagingReport()))
        elif message.word is Word.FAILED:
            self.tell(ev.PeerFailed("failed", message.text))

    # --- commands --------------------------------------------------------------------------------

    def _arm(self) -> None:
        if not self.world.register.reachable(self.side):
            self.fail(ev.ArmTracking, 0.0, "the controller does not answer")
        elif not self.fails(ev.ArmTracking):
            self.tell(ev.Armed(SWITCHOVER_COST_S))

    def _send_pass(self, index: int) -> None:
        guest = self.world.plan.guest
        self._pass_index = index
        self._pass_pages = guest.ram_pages if index == 0 else self._pages_left
        self._pass_began_s = self.world.schedule.now_s
        self._interrupted_unsent_pages = 0
        if not self.fails(ev.SendPass):
            self.work(self._pass_pages / guest.link_pages_s, self._end_pass, index)

    def _interrupt(self) -> None:
        """What the pass has not sent yet stays unsent; PassEnded follows as usual."""
        if self._pass_index is None:
            return
        now_s = self.world.schedule.now_s
        sent_pages = int((now_s - self._pass_began_s) * self.world.plan.guest.link_pages_s)
        self._interrupted_unsent_pages = max(0, self._pass_pages - sent_pages)
        self.work(0.01, self._end_pass, self._pass_index)

    def _end_pass(self, index: int) -> None:
        if index == self._pass_index:
            self.send(Word.PASS_END, index)

    def _pass_acknowledged(self, index: int | None) -> None:
        """The pass is over when the other end has taken it all; an interrupted one may be over twice."""
        if index is None or index != self._pass_index:
            return
        self._pass_index = None
        sent_pages = self._pass_pages - self._interrupted_unsent_pages
        duration_s = self.world.schedule.now_s - self._pass_began_s
        dirty_pages = self._dirtied_pages(duration_s)
        self._pages_left = dirty_pages + self._interrupted_unsent_pages
        result = ev.PassResult(
            index=index,
            pages=sent_pages,
            zero_pages=0,
            wire_bytes=sent_pages * PAGE_BYTES,
            duration_s=duration_s,
            dirty_pages_after=dirty_pages,
            unsent_pages=self._interrupted_unsent_pages,
        )
        self._last_pages_index = index + 1
        self.tell(ev.PassEnded(result))

    def _dirtied_pages(self, duration_s: float) -> int:
        guest = self.world.plan.guest
        touched = guest.dirty_pages_s * duration_s * self.world.rng.uniform(0.7, 1.3)
        return min(guest.hot_pages, int(touched))

    def _pause_if_the_register_answers(self) -> None:
        """A VM that is suspended now would wait for it."""
        if self.world.register.reachable(self.side):
            self.qemu(self._pause)
        else:
            silent = ev.RegisterSilent("the controller does not answer")
            self.work(REGISTER_SILENT_S, self.tell, silent)

    def _pause(self) -> None:
        if not self.vm.lives:
            self.fail(ev.PauseVm, 0.001, "QEMU does not run")
        elif not self.fails(ev.PauseVm):
            self.vm.change(VmStatus.PAUSED)
            self.work(0.001, self.tell, ev.VmPaused())

    def _last_pages_sent(self) -> None:
        if self.fails(ev.SendLastPages):
            return
        self.send(Word.LAST_PAGES, self.vm.still_content)
        self.work(0.001, self.tell, ev.LastPagesSent(self._last_result()))

    def _last_result(self) -> ev.PassResult:
        pages = self._pages_left if self.host.owed is None else 0
        return ev.PassResult(self._last_pages_index, pages, 0, pages * PAGE_BYTES, 0.001, 0)

    def _state_sent(self) -> None:
        if self.world.plan.options.engine is Engine.QEMU:
            self.send(Word.LAST_PAGES)
        elif not self.vm.lives:
            self.fail(ev.SendState, 0.0, "QEMU does not run")
            return
        elif self.fails(ev.SendState):
            return
        elif self.host.owed is not None:
            self._name_late()
        elif self.world.rng.random() < 0.3:
            # A device wrote guest memory while it saved its state: those pages go before the end mark.
            self.send(Word.LAST_PAGES, self.vm.still_content)
        self.send(Word.STATE, self.vm.still_content)
        self.work(0.001, self.tell, ev.StateSent(STATE_BYTES))

    def _retire(self) -> None:
        if not self._source.ended_owing:
            self._remove_copy()  # otherwise the destination may still read it
        if self.strikes(self.world.plan.command_failure_share):
            self.world.cleaning_failed = True
            self.after(0.05, self.tell, ev.CommandFailed("RetireVm", "vmm", "it was refused"))
        else:
            self.qemu(self._retired)

    def _retired(self) -> None:
        self.vm.change(VmStatus.GONE)
        self.after(0.001, self.tell, ev.VmRetired())

    # --- pages owed after the resume -------------------------------------------------------------

    def _name_owed(self) -> None:
        """Nothing is sent but names; without a page left there are none."""
        if self.fails(ev.SendLastPages):
            return
        owed_pages = min(self._pages_left, self.world.plan.owed_pages)
        pages = tuple(range(owed_pages))
        if pages:
            self.host.owed = frozenset(pages)
            self._owed = list(pages)
            self._owed_at_switchover = set(pages)
        self.send(Word.LAST_PAGES, self.vm.still_content, pages=pages)
        self.work(0.001, self.tell, ev.LastPagesSent(self._last_result(), owed_pages=owed_pages))

    def _name_late(self) -> None:
        """A device wrote guest memory while it saved its state: a page that is owed already, or not yet."""
        if self.world.rng.random() < 0.3:
            page = self.world.rng.randrange(self.world.plan.owed_pages + 2)
            if page not in self._owed:
                self._owed.append(page)
            self._owed_at_switchover.add(page)
            self.host.owed = frozenset(self._owed_at_switchover)
            self.send(Word.LAST_PAGES, self.vm.still_content, pages=(page,))

    def _push(self) -> None:
        """One page after the other, by themselves, from when the order of transfer has that."""
        rest, now_s = self.world.plan.options.rest, self.world.schedule.now_s
        early = rest is not Rest.BACKGROUND and not self._resumed_there
        early |= rest is Rest.ON_DEMAND and now_s < self._source.deadline_s
        if early:
            self.work(0.1, self._push)
        elif self._owed:
            self._answer((self._owed.pop(),))
            self.work(self.world.rng.uniform(0.001, 0.4), self._push)

    def _answer(self, pages: tuple[int, ...]) -> None:
        if self.has_ram:
            self.send(Word.PAGE, pages=pages)

    def _reconnect(self) -> None:
        self._reconnects += 1
        self.drop_link()
        if not self.has_ram:
            self.after(0.001, self.tell, self._memory_is_gone())
            return
        self.after(RECONNECT_LIMIT_S, self._reconnect_failed, self._reconnects)
        self._reconnecting = True
        self._connect(self)

    def _memory_is_gone(self) -> ev.CommandFailed:
        """What the safe copy holds, the destination reads by itself."""
        copy = self.world.safe_copy
        error = HostLost if copy.readable and copy.complete else PagesLost
        return ev.CommandFailed(ev.Reconnect.__name__, error.code, "nobody else has the memory")

    def refused(self) -> None:
        """Nobody listens at the destination, or its host says that it is not there."""
        self._reconnect_failed(self._reconnects)

    def _reconnect_failed(self, reconnect: int) -> None:
        if reconnect == self._reconnects and self._reconnecting:
            self._reconnecting = False
            self.drop_link()
            self.tell(
                ev.CommandFailed(ev.Reconnect.__name__, HostLost.code, "the destination does not answer")
            )

    def _reconnected(self, missing: tuple[int, ...], to_compare: bool) -> None:
        self._reconnecting = False
        if not missing and not to_compare:
            self.host.owed = None
        self._owed = list(missing)
        self._resumed_there = True
        self.tell(ev.Reconnected(len(missing), to_compare))

    def lost(self) -> None:
        self._reconnect_failed(self._reconnects)

    def _compare(self, link: SimLink) -> None:
        """The source's memory is the truth; the machine hears of a difference before the destination does."""
        difference = "page 1 of ram0" if self.world.plan.memory_differs else ""
        if not self.has_ram:
            return
        if difference:
            self.found_difference = difference
            self.tell(ev.MemoryDiffers(difference))
        if self.link is link:
            self.send(Word.COMPARED, text=difference)

    # --- the safe copy ---------------------------------------------------------------------------

    def _begin_copying(self) -> None:
        """Beside everything else, from the page that is pushed last; a predecessor's pages stay."""
        copy, owed = self.world.safe_copy, self._owed_at_switchover
        wanted = self.world.plan.options.safe_dir is not None and bool(owed) and self.has_ram
        if not wanted or self._copying is not None:
            return
        self._copying = []
        if copy.reachable:
            copy.there = True
            self._copying = sorted(owed - copy.pages, reverse=True)
            self._copy_next(copy.files)

    def _copy_next(self, file: int) -> None:
        """A file that somebody took away is written on, and read by nobody."""
        copy = self.world.safe_copy
        if self._copying is None or file != copy.files or not copy.reachable:
            self._copying = []
        elif self._copying:
            copy.pages.add(self._copying.pop(0))
            self.after(self.world.rng.uniform(0.001, 0.4), self._copy_next, file)
        else:
            copy.complete = True

    def _remove_copy(self) -> None:
        self._copying = []
        self.world.safe_copy.remove()

    # --- back, or on -----------------------------------------------------------------------------

    def _resume(self) -> None:
        self._remove_copy()
        super()._resume()

    # --- QEMU's own engine -----------------------------------------------------------------------

    def _run_native(self) -> None:
        """QEMU repeats its passes by itself, until little enough is left, or for ever."""
        guest = self.world.plan.guest
        pages = float(guest.ram_pages)
        duration_s = 0.0
        for _ in range(NATIVE_PASSES_LIMIT):
            pass_s = pages / guest.link_pages_s
            duration_s += pass_s
            pages = min(float(guest.hot_pages), guest.dirty_pages_s * pass_s)
            if pages / guest.link_pages_s < 0.05:
                if not self.fails(ev.RunNative, duration_s / 2):
                    self.work(duration_s, self._native_stops)
                return

    def _native_stops(self) -> None:
        if self.machine.state is not SourceState.PRECOPY:
            return  # its migration was cancelled before the VM was told to go on
        if not self.vm.lives:
            self.fail(ev.RunNative, 0.0, "QEMU does not run")
            return
        self.vm.change(VmStatus.PAUSED)
        self.work(0.01, self._native_sent)
        self.tell(ev.VmPaused())

    def _native_sent(self) -> None:
        """Memory and device state have gone in one stream, ahead of the end mark on our connection."""
        if not self.vm.lives:
            self.fail(ev.RunNative, 0.0, "QEMU does not run")
            return
        self.send(Word.NATIVE_STREAM, self.vm.still_content)
        self.tell(ev.LastPagesSent(self._last_result()))
