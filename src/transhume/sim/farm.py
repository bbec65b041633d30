"""One seed's farm: two hosts, one VM, one migration, and everything that goes wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine
from transhume.migration.destination_table import DestinationState
from transhume.migration.machine import UnexpectedEvent
from transhume.migration.source import SourceMachine
from transhume.migration.source_table import SourceState
from transhume.model.errors import MemoryDiffers
from transhume.model.migration import Migration, Phase
from transhume.sim.controller import SimController
from transhume.sim.destination_mover import SimDestinationMover
from transhume.sim.host import SimHost
from transhume.sim.invariants import Invariants, Violation
from transhume.sim.link import Message, SimLink, Word
from transhume.sim.mover import MoverWorld, RuleTaken, SimMover
from transhume.sim.person import SimPerson
from transhume.sim.plan import Fault, FaultKind, Plan, Promise, Side, draw, ram_bytes
from transhume.sim.register import SimRegister
from transhume.sim.safe_copy import SimSafeCopy
from transhume.sim.schedule import Schedule
from transhume.sim.source_mover import SimSourceMover
from transhume.sim.vm import SimVm, VmStatus

FIRST_EPOCH = 7
AFTER_THE_FAULTS_LIMIT_S = 180.0
"""So long after the last fault everything must have ended; the machines' own limits add up to less."""

WAITING_S = 90.0
"""Who still waits for a host that is gone for ever so long after the last fault, waits for ever."""

SLOWNESS_S = 5.0


@dataclass(frozen=True)
class Parts:
    """What is played with: the product's machines, or ones that a test has broken on purpose."""

    source: type[SourceMachine] = SourceMachine
    destination: type[DestinationMachine] = DestinationMachine
    source_mover: type[SimSourceMover] = SimSourceMover
    destination_mover: type[SimDestinationMover] = SimDestinationMover
    controller: type[SimController] = SimController


@dataclass(frozen=True)
class SeedResult:
    """What came of one seed. `violation` is empty when all was well."""

    seed: int
    ending: str
    violation: str
    simulated_s: float


class SimFarm:
    """Plays one seed. With `transcript` it notes, line by line, what happened."""

    def __init__(
        self,
        seed: int,
        parts: Parts | None = None,
        transcript: list[str] | None = None,
        rules: set[RuleTaken] | None = None,
    ) -> None:
        self.seed = seed
        self._rng = rng = Random(seed)
        self._plan: Plan = draw(rng)
        self._parts = parts or Parts()
        self._transcript = transcript
        self._schedule = schedule = Schedule()
        say = None if transcript is None else self._say
        self._register = register = SimRegister(self._plan, schedule, rng, FIRST_EPOCH)
        self._register.log = say
        self._register.controller_lives = self._controller_lives
        self._register.cut_off = self._cut_off
        self._controller = controller = self._parts.controller(self._plan, schedule, register, FIRST_EPOCH)
        self._controller.log = say
        self._controller.lives = self._controller_lives
        self._controller.dismiss = self._dismiss
        self._register.on_swap = controller.swap_asked
        self._safe_copy = SimSafeCopy(schedule)
        self._vms = {
            Side.SOURCE: SimVm(Side.SOURCE, VmStatus.RUNNING, schedule),
            Side.DESTINATION: SimVm(Side.DESTINATION, VmStatus.ABSENT, schedule),
        }
        self._invariants = Invariants(self._vms, self._register, self._safe_copy)
        self._invariants.gave_up = self._gave_up
        self._invariants.source_has_ram = self._source_has_ram
        self._hosts = {
            side: SimHost(vm, schedule, rng, register, controller) for side, vm in self._vms.items()
        }
        for side, host in self._hosts.items():
            host.start_mover = self._start_source if side is Side.SOURCE else self._start_destination
            host.kill_mover = self._killer_of(side)
            host.answer_lost_share = self._plan.answer_lost_share
        if self._plan.controller is not None:
            self._hosts[self._plan.controller].daemon_started = controller.restart
        self._movers: dict[Side, SimMover] = {}
        self._faults = list(self._plan.faults)
        self._begin_due = False
        self._source_has_begun = False
        self._world = MoverWorld(
            self._plan, rng, schedule, register, controller, self._safe_copy, self._state_entered, say, rules
        )
        self._person = SimPerson(self._plan, self._world, self._hosts, self._movers)
        self._invariants.lied = self._person.may_run_twice
        self._person.caught = self._invariants.demand_one_runner_again
        self._migration = Migration(
            id="m1",
            vm="vm",
            source=Side.SOURCE.value,
            destination=Side.DESTINATION.value,
            epoch=FIRST_EPOCH,
            options=self._plan.options,
        )

    def run(self) -> SeedResult:
        """Play to the end, or to the first thing that must not happen."""
        if self._transcript is not None:
            self._say(f"{self._plan}")
        violation = ""
        try:
            self._start()
            self._play()
            self._judge()
        except (Violation, UnexpectedEvent, AssertionError) as error:
            violation = f"{type(error).__name__}: {error}"
            if self._transcript is not None:
                self._say(violation)
        return SeedResult(self.seed, self._ending(), violation, self._schedule.now_s)

    # --- the course of things --------------------------------------------------------------------

    def _start(self) -> None:
        for fault in self._faults:
            if fault.at_s is not None:
                self._schedule.after(fault.at_s, self._strike, fault)
        self._faults = [fault for fault in self._faults if fault.at_s is None]
        self._schedule.after(self._plan.heal_s, self._heal)
        self._controller.start()
        for host in self._hosts.values():
            host.beat()
        self._person.start()
        self._start_destination()

    def _play(self) -> None:
        limit_s = self._plan.heal_s + AFTER_THE_FAULTS_LIMIT_S
        waiting_s = self._plan.heal_s + WAITING_S
        schedule, source, destination = self._schedule, *self._hosts.values()
        while schedule.now_s < limit_s and schedule.step():
            movers_live = source.mover_lives or destination.mover_lives
            if not movers_live and self._over() and not self._has_to_be_told():
                return
            if schedule.now_s > waiting_s and self._waits_for_ever():
                return

    def _start_destination(self) -> None:
        host = self._hosts[Side.DESTINATION]
        machine = self._parts.destination(self._migration, self._schedule.now_s, len(host.owed or ()))
        self._start_mover(self._parts.destination_mover(self._world, host, machine, self._prepared))

    def _start_source(self) -> None:
        host = self._hosts[Side.SOURCE]
        machine = self._parts.source(
            self._migration, ram_bytes(self._plan.guest), self._schedule.now_s, host.owed is not None
        )
        self._start_mover(self._parts.source_mover(self._world, host, machine, self._connect))

    def _start_mover(self, mover: SimMover) -> None:
        mover.host.mover_lives = True
        self._movers[mover.side] = mover
        mover.start()

    def _prepared(self) -> None:
        """The destination listens: the controller lets the source begin, if both still live."""
        self._begin_due = True
        self._schedule.after(self._rng.uniform(0.01, 0.3), self._begin_source)

    def _begin_source(self) -> None:
        self._begin_due = False
        if self._plan.source_never_begins or not self._hosts[Side.SOURCE].reaches_controller:
            if not self._plan.record_outlives_the_begin and self._controller_lives():
                self._controller.give_up()
            return
        self._source_has_begun = True
        self._start_source()

    def _connect(self, source: SimSourceMover) -> None:
        """A connection is tried: it is made, refused, or never answered."""
        destination, again = self._movers[Side.DESTINATION], source.machine.state is SourceState.RECONNECTING
        assert isinstance(destination, SimDestinationMover)
        if any(self._world.deaf.values()) or any(host.out_of_reach for host in self._hosts.values()):
            return  # TCP's own greeting needs both ways
        if not destination.accepts:
            if again:
                source.refused()
            else:
                source.fail(ev.ConnectPeer, 0.01, "the destination does not listen")
            return
        link = SimLink(
            self._schedule,
            self._rng,
            self._plan.latency_s,
            {Side.SOURCE: source.arrive, Side.DESTINATION: destination.arrive},
        )
        if destination.link is not None:
            destination.link.forget()
        link.slow_down(self._world.link_slowness_s)
        source.link = destination.link = self._world.link = link
        link.send(Side.DESTINATION, Message(Word.HELLO))

    def _cut_off(self, side: Side) -> bool:
        """Whether an end and the controller cannot hear each other."""
        host, there = self._hosts[side], self._plan.controller
        if host.down or there is side:
            return host.down
        return host.isolated or (there is not None and self._hosts[there].isolated)

    def _controller_lives(self) -> bool:
        return self._plan.controller is None or self._hosts[self._plan.controller].daemon_lives

    def _over(self) -> bool:
        here, there = self._hosts[Side.SOURCE], self._hosts[Side.DESTINATION]
        if not (there.ended_and_told or there.gone_for_ever):
            return False
        if self._source_has_begun and not (here.ended_and_told or here.gone_for_ever):
            return False
        return self._controller.record.ended and not self._begin_due

    def _has_to_be_told(self) -> bool:
        """Whether the VM was taken back from a host that has yet to hear of it, or just has."""
        there = self._hosts[Side.DESTINATION]
        return self._invariants.revived and there.vm.lives and self._person.may_run_twice()

    def _waits_for_ever(self) -> bool:
        """Whether one end waits for the other one's host, which is gone for ever, and says so."""
        here, there = self._hosts[Side.SOURCE], self._hosts[Side.DESTINATION]
        if here.gone_for_ever and there.last_state == DestinationState.PAGING and there.mover_lives:
            words = self._movers[Side.DESTINATION].machine.runs_at
            found_elsewhere = self._safe_copy.readable and there.vm.missing <= self._safe_copy.pages
            may_wait = self._plan.options.give_up_after_s is None and bool(there.vm.missing)
            return may_wait and not found_elsewhere and "lacks pages" in words and "waits for them" in words
        if there.gone_for_ever and here.last_state == SourceState.RECONNECTING and here.mover_lives:
            nobody_wants_it = self._plan.revival is not Promise.TRUE or self._controller.record.ended
            return nobody_wants_it or not here.vm.lives
        return False

    # --- faults ----------------------------------------------------------------------------------

    def _state_entered(self, side: Side, state: str) -> int | None:
        """Strike what waits for this; the answer is after how many commands the mover itself is killed."""
        kill_after: int | None = None
        if not self._faults or self._world.healed:
            return None
        for fault in list(self._faults):
            if fault.watched is not side or fault.state != state:
                continue
            self._faults.remove(fault)
            if fault.kind is FaultKind.KILL_MOVER and fault.side is side and fault.delay_s == 0.0:
                kill_after = fault.after_commands
            else:
                self._schedule.after(fault.delay_s, self._strike, fault)
        return kill_after

    def _strike(self, fault: Fault) -> None:
        if self._world.healed:
            return
        if self._transcript is not None:
            self._say(f"fault: {fault.kind} {fault.side}")
        host = self._hosts[fault.side]
        if fault.kind is FaultKind.KILL_MOVER:
            if host.mover_lives:
                self._movers[fault.side].kill()
        elif fault.kind is FaultKind.KILL_DAEMON:
            host.kill_daemon(fault.lasts_s)
        elif fault.kind is FaultKind.KILL_QEMU:
            self._kill_qemu(fault.side)
        elif fault.kind is FaultKind.REGISTER_DOWN:
            self._register.go_down(fault.lasts_s)
        elif fault.kind is FaultKind.REGISTER_FULL:
            self._register.be_full(fault.lasts_s)
        elif fault.kind is FaultKind.CANCEL:
            self._cancel(Side.SOURCE)
        elif fault.kind is FaultKind.ABANDON:
            self._cancel(Side.DESTINATION)
        elif fault.kind is FaultKind.SWITCH:
            self._switch()
        elif fault.kind is FaultKind.ADJUST:
            self._adjust()
        elif fault.kind is FaultKind.END_RECORD:
            if self._controller_lives():
                self._controller.give_up()
        elif fault.kind is FaultKind.STORAGE_DOWN:
            self._safe_copy.go_down(fault.lasts_s)
        elif fault.kind in (FaultKind.KILL_HOST, FaultKind.ISOLATE):
            self._lose_host(host, fault)
        else:
            self._trouble_link(fault)

    def _lose_host(self, host: SimHost, fault: Fault) -> None:
        """A host dies or is cut off: nobody is told, and its connections never come back to life."""
        if host.down:
            return
        if self._world.link is not None:
            for side in Side:
                self._world.link.lose_all_to(side)
        if fault.kind is FaultKind.KILL_HOST:
            host.die(fault.lasts_s)
        else:
            host.isolate(fault.lasts_s)

    def _killer_of(self, side: Side) -> Callable[[], None]:
        return lambda: self._movers[side].kill()

    def _trouble_link(self, fault: Fault) -> None:
        link = self._world.link
        if fault.kind is FaultKind.SLOW_LINK:
            self._world.link_slowness_s = SLOWNESS_S
            self._schedule.after(fault.lasts_s, self._quicken_link)
            if link is not None:
                link.slow_down(SLOWNESS_S)
        elif fault.kind is FaultKind.CUT_LINK:
            if link is not None:
                link.cut()
        else:
            deaf = (fault.side,) if fault.kind is FaultKind.DEAF_END else tuple(Side)
            for side in deaf:
                self._world.deaf[side] = True
                if link is not None:
                    link.lose_all_to(side)

    def _quicken_link(self) -> None:
        self._world.link_slowness_s = 0.0
        if self._world.link is not None:
            self._world.link.slow_down(0.0)

    def _kill_qemu(self, side: Side) -> None:
        if self._vms[side].kill() and self._hosts[side].mover_lives:
            self._movers[side].after(
                self._rng.uniform(0.0, 0.2), self._movers[side].tell, ev.QemuDied("signal 9")
            )

    def _cancel(self, side: Side) -> None:
        """A person's wish reaches the mover through its daemon; a dead mover's successor hears it."""
        host = self._hosts[side]
        if not host.daemon_lives or not host.journal:
            return
        if host.mover_lives:
            self._movers[side].tell(ev.CancelRequested())
        elif not host.ended:
            host.cancel_pending = True

    def _switch(self) -> None:
        """A person asks for post-copy; the driver lets that through before a switchover that can be so."""
        mover = self._movers.get(Side.SOURCE)
        may_page = self._plan.options.may_page
        if mover is not None and may_page and mover.machine.phase in (Phase.PREPARED, Phase.PRECOPY):
            mover.tell(ev.SwitchRequested())

    def _adjust(self) -> None:
        """A person sets other limits; where the machine has no use for them, the driver throws them away."""
        mover = self._movers.get(Side.SOURCE)
        if mover is not None and ev.OptionsChanged in mover.machine.table.get(mover.machine.state, {}):
            options = self._plan.options.model_copy(update={"deadline_s": 2.0, "max_downtime_ms": 500.0})
            mover.tell(ev.OptionsChanged(options))

    def _dismiss(self) -> None:
        """The controller tells both ends that it is over, once, if they can be reached."""
        for side, host in self._hosts.items():
            if host.reaches_controller:
                self._schedule.after(self._rng.uniform(0.01, 0.2), self._cancel, side)

    def _gave_up(self) -> bool:
        """Whether the destination has ended without a page, and says so."""
        word = self._hosts[Side.DESTINATION].last_word
        return word is not None and "lacks pages" in word.error

    def _source_has_ram(self) -> bool:
        """Whether anybody holds the pages that are owed: the source's QEMU, or a mover that saw it alive."""
        mover = self._movers.get(Side.SOURCE)
        if not self._vms[Side.SOURCE].was_killed:
            return True
        return isinstance(mover, SimSourceMover) and mover.alive and mover.has_ram

    def _heal(self) -> None:
        """From now on nothing goes wrong any more. What is broken stays broken, what is dead is replaced."""
        if self._transcript is not None:
            self._say("no more faults")
        self._world.healed = True
        self._faults.clear()
        self._register.heal()
        self._safe_copy.heal()
        self._world.deaf = dict.fromkeys(Side, False)
        self._quicken_link()
        for host in self._hosts.values():
            host.isolate(0.0)
            host.come_back()
            host.start_daemon()

    # --- the verdict -----------------------------------------------------------------------------

    def _judge(self) -> None:
        if not self._over():
            if self._waits_for_ever():
                return
            states = ", ".join(f"{side}: {host.last_state}" for side, host in self._hosts.items())
            raise Violation(f"it does not end: {states} after {self._schedule.now_s:.0f} s")
        excused = {side for side, host in self._hosts.items() if host.gone_for_ever}
        self._invariants.at_the_end(frozenset(Side) if self._world.cleaning_failed else frozenset(excused))
        for side, host in self._hosts.items():
            if host.last_word is not None:
                self._invariants.last_word(side, host.last_word)
        words = {side: host.last_word for side, host in self._hosts.items()}
        self._invariants.record(self._controller.record, words)
        self._demand_that_differences_are_told()

    def _demand_that_differences_are_told(self) -> None:
        """Each end whose last mover heard of one says so in its last word, if its VM is not lost besides."""
        source, destination = self._movers.get(Side.SOURCE), self._movers[Side.DESTINATION]
        for mover, heard in (
            (source, isinstance(source, SimSourceMover) and source.found_difference),
            (destination, isinstance(destination, SimDestinationMover) and destination.heard_difference),
        ):
            if not heard or mover is None or mover.machine.state.value != "done":
                continue
            if mover.machine.error_code not in (MemoryDiffers.code, "vmm"):
                raise Violation(f"the {mover.side} knows that the memory differs, and does not say so")

    def _ending(self) -> str:
        """The outcome in a word, for the summary."""
        owner = self._vms[self._register.owner]
        if self._waits_for_ever():
            return "waits for a host"
        if owner.status is not VmStatus.RUNNING:
            return "lost with its QEMU"
        if self._invariants.revived:
            return "taken back"
        if owner.side is Side.DESTINATION:
            return "lacks pages" if owner.missing else "moved"
        return "stayed" if self._source_has_begun else "never begun"

    def _say(self, text: str) -> None:
        assert self._transcript is not None
        self._transcript.append(f"{self._schedule.now_s:10.4f}  {text}")
