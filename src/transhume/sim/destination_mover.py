"""The destination's mover in the simulator."""

from __future__ import annotations

from collections.abc import Callable

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine, DestinationState
from transhume.migration.machine import Command
from transhume.model.migration import Engine
from transhume.sim.host import SimHost
from transhume.sim.link import Message, Word
from transhume.sim.mover import HEARD, MoverWorld, SimMover
from transhume.sim.plan import Side
from transhume.sim.vm import VmStatus


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
        migration_goes_on: Callable[[], bool],
    ) -> None:
        super().__init__(world, host, machine)
        self._prepared = prepared
        self._migration_goes_on = migration_goes_on

    @property
    def accepts(self) -> bool:
        """Whether a source that connects now is let in."""
        return self.alive and self.machine.state is DestinationState.WAITING and self.link is None

    def begin(self, predecessor_state: str | None) -> None:
        if predecessor_state is not None:
            if not self.fails_to_begin(predecessor_state):
                self.tell(ev.Recovered(state_may_be_sent=True))
            return
        if not self.fails_to_begin(predecessor_state):
            self.qemu(self._made)

    def _made(self) -> None:
        if self.vm.status is VmStatus.ABSENT:
            self.vm.change(VmStatus.PAUSED)
        self.after(self.world.rng.uniform(0.01, 0.3), self._listen)

    def _listen(self) -> None:
        if not self.vm.lives or not self.world.register.reachable:
            self.tell(ev.CommandFailed("Begin", "vmm", "QEMU or the controller does not answer"))
            return
        self.tell(ev.Listening())
        if self.alive:
            self._prepared()

    def carry_out(self, command: Command) -> None:
        if isinstance(command, ev.AskController):
            self.after(0.01, self._ask)
        elif isinstance(command, ev.TellPeerCommitted):
            self.send(Word.COMMITTED)
        elif isinstance(command, ev.TellPeerRunning):
            self.send(Word.RUNNING)
        elif isinstance(command, ev.TellPeerFailed):
            self.send(Word.FAILED, text=command.message)
        elif isinstance(command, ev.DestroyVm):
            self._destroy()
        else:
            raise NotImplementedError(f"the simulated destination cannot carry out {command}")

    def hear(self, message: Message) -> None:
        if message.word is Word.HELLO:
            self.send(Word.WELCOME)
            self.tell(ev.SourceConnected())
        elif message.word is Word.PING:
            self.tell(HEARD)
        elif message.word is Word.PASS_END:
            self.send(Word.PASS_ACK, message.number)
            self.tell(ev.PassReceived(message.number or 0))
        elif message.word is Word.LAST_PAGES:
            self._take_last_pages(message.number)
        elif message.word is Word.STATE:
            self._take_state(message.number)
        elif message.word is Word.NATIVE_STREAM:
            self.work(self.world.rng.uniform(0.001, 0.1), self._native_loaded, message.number)
        elif message.word is Word.ABORT:
            self.tell(ev.PeerAborted(message.text))
        elif message.word is Word.FINISHED:
            self.tell(ev.PeerFinished())

    def _ask(self) -> None:
        if self.world.register.reachable:
            self.tell(ev.MigrationKnown(self._migration_goes_on()))

    def _take_last_pages(self, content: int | None) -> None:
        if self.world.plan.options.engine is not Engine.QEMU:
            self.vm.ram_content = content
        self.tell(ev.LastPagesReceived())

    def _take_state(self, content: int | None) -> None:
        """QEMU loads while the state arrives, and may have taken it before its end mark is here."""
        if self.world.plan.options.engine is Engine.QEMU:
            self.tell(ev.StateReceived())
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
