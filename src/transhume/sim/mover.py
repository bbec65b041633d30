"""A mover: takes events, carries out the machine's commands with the delays and failures of its seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from random import Random
from typing import Any

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine
from transhume.migration.machine import Command, Event
from transhume.migration.source import SourceMachine
from transhume.sim.controller import SimController, Update
from transhume.sim.host import SimHost
from transhume.sim.link import Message, SimLink, Word
from transhume.sim.plan import SUCCESSOR, Plan, Side
from transhume.sim.register import SimRegister
from transhume.sim.safe_copy import SimSafeCopy
from transhume.sim.schedule import Schedule
from transhume.sim.vm import SimVm, VmStatus

TICK_S = 0.1
SLOWEST_TICK_S = 1.0
TICK_GROWTH = 1.5
"""The real movers tick ten times a second. Here an end that only waits ticks less often: nothing in the
machines counts ticks, and most of a seed's events would be ticks."""

COMMAND_LIMIT_S = 0.2
MAX_RESUME_FAILURES = 3
"""Fewer than the machines try: a QEMU that never resumes is a dead one, which is a fault of its own."""

RuleTaken = tuple[StrEnum, type[Event]]
AnyMachine = SourceMachine | DestinationMachine

TICK = ev.Tick()
HEARD = ev.PeerHeard()


class Begin(Command):
    """A mover's own first step: find or make the VM."""


class MoverWorld:
    """What all movers of one farm share."""

    def __init__(
        self,
        plan: Plan,
        rng: Random,
        schedule: Schedule,
        register: SimRegister,
        controller: SimController,
        safe_copy: SimSafeCopy,
        state_entered: Callable[[Side, str], int | None],
        say: Callable[[str], None] | None,
        rules: set[RuleTaken] | None,
    ) -> None:
        self.plan = plan
        self.rng = rng
        self.schedule = schedule
        self.register = register
        self.controller = controller
        self.safe_copy = safe_copy
        self.state_entered = state_entered
        self.say = say
        self.rules = rules
        self.link: SimLink | None = None
        self.link_slowness_s = 0.0
        self.deaf: dict[Side, bool] = {Side.SOURCE: False, Side.DESTINATION: False}
        self.healed = False
        self.cleaning_failed = False
        self.epoch = register.epoch


class SimMover(ABC):
    """One process. It begins once, and lives until its machine has finished or it is killed."""

    side: Side
    lasting_resume_failures = 0

    def __init__(self, world: MoverWorld, host: SimHost, machine: AnyMachine) -> None:
        self.world = world
        self.host = host
        self.vm: SimVm = host.vm
        self.machine = machine
        self.alive = True
        self.link: SimLink | None = None
        self._work = 0
        self._tick_s = TICK_S
        self._beat_s = min(SLOWEST_TICK_S, world.plan.options.peer_silence_limit_s / 4)
        self._beaten_s = 0.0
        self._said: Update | None = None

    # --- what the two ends do differently --------------------------------------------------------

    @abstractmethod
    def begin(self, predecessor_state: str | None) -> None:
        """Find or make the VM, then set the machine in motion."""

    @abstractmethod
    def carry_out(self, command: Command) -> None:
        """Begin to carry out one command."""

    @abstractmethod
    def hear(self, message: Message) -> None:
        """Take one message of the other end."""

    @abstractmethod
    def taken(self, event: Event) -> None:
        """Called after the machine has taken an event, before its commands are carried out."""

    @abstractmethod
    def update(self) -> Update:
        """Where the migration stands, for the controller."""

    @abstractmethod
    def lost(self) -> None:
        """Called after the machine has heard that the connection is gone."""

    @abstractmethod
    def farewell(self) -> None:
        """Do what was begun and is not stopped by the end of the machine: it is waited for."""

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """The process begins: it may be a successor, which its host's journal tells."""
        predecessor_state = self.host.last_state
        self.journal_the_start(predecessor_state)
        self._schedule_tick()
        if self.host.cancel_pending:
            self.host.cancel_pending = False
            self.after(self.world.rng.uniform(0.0, 0.2), self.tell, ev.CancelRequested())
        if predecessor_state is not None:
            self.world.state_entered(self.side, SUCCESSOR)
        self.after(self.world.rng.uniform(0.01, 0.1), self.begin, predecessor_state)

    def journal_the_start(self, predecessor_state: str | None) -> None:
        """The first mover's entry: something was begun. A successor leaves its predecessor's in place."""
        if predecessor_state is None:
            self.host.journal.append(self.machine.state)

    def kill(self) -> None:
        """The process is gone, with everything that it had not yet done."""
        if not self.alive:
            return
        self._log("killed")
        self._leave()

    def _leave(self) -> None:
        self.alive = False
        if self.link is not None:
            self.link.close(self.side)
        self.host.mover_gone()

    def tell(self, event: Event) -> None:
        """Hand one event to the machine: journal first, then the commands, in order.

        Only a final state is noted after them: without the last word nobody would hear how it ended.
        """
        if not self.alive:
            return
        world, machine = self.world, self.machine
        before = machine.state
        commands = machine.handle(event, world.schedule.now_s)
        if world.rules is not None:
            world.rules.add((before, type(event)))
        if event is not TICK and event is not HEARD:
            self._tick_s = TICK_S
            if isinstance(event, ev.QemuDied):
                self.vm.death_was_noticed = True
        elif not commands and machine.state is before:
            return
        if world.say is not None:
            self._log(f"{before} <- {event} -> {machine.state} {list(commands)}")
        changed = machine.state is not before
        kill_after = world.state_entered(self.side, machine.state) if changed else None
        if changed and not machine.finished:
            self.host.journal.append(machine.state)
        self.taken(event)
        for index, command in enumerate(commands):
            if index == kill_after:
                break
            self._do(command)
        if kill_after is not None:
            self.kill()
        elif machine.finished:
            self.host.journal.append(machine.state)
            self.farewell()
            self._leave()

    def _do(self, command: Command) -> None:
        if isinstance(command, ev.StopWork):
            self._work += 1
        elif isinstance(command, ev.Publish):
            self._publish(command.ended)
        elif isinstance(command, ev.ResumeVm):
            self._resume()
        elif isinstance(command, ev.SwapToSource):
            self._swap(Side.SOURCE, self.world.epoch, Side.SOURCE)
        elif isinstance(command, ev.SwapToDestination):
            self._swap(Side.SOURCE, self.world.epoch, Side.DESTINATION)
        elif isinstance(command, ev.SwapBack):
            self._swap(Side.DESTINATION, self.world.epoch + 1, Side.SOURCE)
        elif isinstance(command, ev.AskController):
            self.after(0.01, self._ask)
        else:
            self.carry_out(command)

    def _publish(self, ended: bool = False) -> None:
        self._said = self.update()
        self.host.hear(self._said, ended)

    def _ask(self) -> None:
        """No answer is no answer: whoever asks has a limit of its own."""
        if self.world.register.reachable(self.side):
            self.tell(self.world.controller.known)

    def _schedule_tick(self) -> None:
        self.after(self._tick_s, self._tick)

    def _tick(self) -> None:
        now_s = self.world.schedule.now_s
        if self.link is not None and now_s - self._beaten_s >= self._beat_s:
            self._beaten_s = now_s
            self.send(Word.PING)
        self._tick_s = min(self._tick_s * TICK_GROWTH, self._beat_s)
        self.tell(TICK)
        if self.alive and self.update() != self._said:
            self._publish()
        if self.alive:
            self._schedule_tick()

    # --- ways to do things -----------------------------------------------------------------------

    def after(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Do something later, if this process still lives then."""
        self.world.schedule.after(delay_s, self._if_alive, call, arguments)

    def _if_alive(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.alive:
            call(*arguments)

    def work(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """A step of work under way. After StopWork it is not done, or, if it was too late to stop, it is."""
        self.after(delay_s, self._if_wanted, self._work, call, arguments)

    def _if_wanted(self, work: int, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if work == self._work or self.world.rng.random() < self.world.plan.late_echo_share:
            call(*arguments)

    def strikes(self, share: float) -> bool:
        """Whether something with this probability happens now. Nothing does after the faults stopped."""
        return share > 0.0 and not self.world.healed and self.world.rng.random() < share

    def fails_to_begin(self, predecessor_state: str | None) -> bool:
        """Whether the first step fails; then the machine is told. A first mover's failure is little news."""
        share = self.world.plan.begin_failure_share
        if not self.strikes(share / 20 if predecessor_state is None else share):
            return False
        self.fail(Begin, 0.0)
        return True

    def fails(self, command: type[Command], delay_s: float = 0.05) -> bool:
        """Whether a command fails by chance; then the machine is told."""
        if not self.strikes(self.world.plan.command_failure_share):
            return False
        self.fail(command, delay_s)
        return True

    def fail(self, command: type[Command], delay_s: float, reason: str = "it was refused") -> None:
        """Report a command as failed."""
        self.work(delay_s, self.tell, ev.CommandFailed(command.__name__, "vmm", reason))

    def qemu(self, effect: Callable[[], None]) -> None:
        """Send QEMU a command. One that was on its way when this process died may still take effect."""
        self.vm.command(self.world.rng.uniform(0.001, COMMAND_LIMIT_S), lambda: self._if_sent(effect))

    def _if_sent(self, effect: Callable[[], None]) -> None:
        if self.alive or (not self.host.down and self.world.rng.random() < 0.5):
            effect()

    def send(
        self, word: Word, number: int | None = None, text: str = "", pages: tuple[int, ...] = ()
    ) -> None:
        """Say something to the other end, if there is a connection."""
        if self.link is not None:
            other = Side.DESTINATION if self.side is Side.SOURCE else Side.SOURCE
            self.link.send(other, Message(word, number, text, pages))

    def drop_link(self) -> None:
        """Close the connection, and hear no more of what was still on its way."""
        if self.link is not None:
            self.link.close(self.side)
            self.link.lose_all_to(self.side)
            self.link = None

    def arrive(self, message: Message) -> None:
        """A message has come; a dead process hears nothing."""
        if not self.alive:
            return
        if message.word is Word.CLOSED:
            self.tell(ev.LinkLost("host-lost", message.text))
            self.lost()
        else:
            self.hear(message)

    def _resume(self) -> None:
        if self.lasting_resume_failures < MAX_RESUME_FAILURES and self.strikes(
            self.world.plan.command_failure_share
        ):
            self.lasting_resume_failures += 1
            self.after(0.05, self.tell, ev.CommandFailed("ResumeVm", "vmm", "it was refused"))
            return
        self.qemu(self._resumed)

    def _resumed(self) -> None:
        if self.vm.lives:
            self.vm.change(VmStatus.RUNNING)
            answer: Event = ev.VmResumed()
        else:
            answer = ev.CommandFailed("ResumeVm", "vmm", "QEMU does not run")
        self.after(0.001, self.tell, answer)

    def _swap(self, expected: Side, epoch: int, wanted: Side) -> None:
        self.world.register.swap(self.side, expected, epoch, wanted, self.tell)

    def _log(self, text: str) -> None:
        if self.world.say is not None:
            self.world.say(f"{self.side.value}: {text}")
