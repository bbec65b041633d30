"""One seed's farm: two hosts, one VM, one migration, and everything that goes wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine, DestinationState
from transhume.migration.machine import UnexpectedEvent
from transhume.migration.source import SourceMachine, SourceState
from transhume.model.errors import MemoryDiffers, PagesLost
from transhume.model.migration import Migration, Outcome
from transhume.sim.destination_mover import SimDestinationMover
from transhume.sim.host import SimHost
from transhume.sim.invariants import Invariants, Violation
from transhume.sim.link import Message, SimLink, Word
from transhume.sim.mover import MoverWorld, RuleTaken, SimMover
from transhume.sim.plan import Fault, FaultKind, Plan, Side, draw, ram_bytes
from transhume.sim.register import SimRegister
from transhume.sim.schedule import Schedule
from transhume.sim.source_mover import SimSourceMover
from transhume.sim.vm import SimVm, VmStatus

FIRST_EPOCH = 7
AFTER_THE_FAULTS_LIMIT_S = 180.0
"""So long after the last fault everything must have ended; the machines' own limits add up to less."""

SLOWNESS_S = 5.0


@dataclass(frozen=True)
class Parts:
    """What is played with: the product's machines, or ones that a test has broken on purpose."""

    source: type[SourceMachine] = SourceMachine
    destination: type[DestinationMachine] = DestinationMachine
    source_mover: type[SimSourceMover] = SimSourceMover
    destination_mover: type[SimDestinationMover] = SimDestinationMover


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
        self._register = SimRegister(self._plan, schedule, rng, FIRST_EPOCH)
        self._register.log = say
        self._register.controller_lives = self._controller_lives
        self._vms = {
            Side.SOURCE: SimVm(Side.SOURCE, VmStatus.RUNNING, schedule),
            Side.DESTINATION: SimVm(Side.DESTINATION, VmStatus.ABSENT, schedule),
        }
        self._invariants = Invariants(self._vms, self._register)
        self._invariants.gave_up = self._gave_up
        self._invariants.source_has_ram = self._source_has_ram
        self._hosts = {side: SimHost(side, vm, schedule, rng) for side, vm in self._vms.items()}
        self._hosts[Side.SOURCE].start_mover = self._start_source
        self._hosts[Side.DESTINATION].start_mover = self._start_destination
        self._movers: dict[Side, SimMover] = {}
        self._faults = list(self._plan.faults)
        self._begin_due = False
        self._source_has_begun = False
        self._record_ended = False
        self._record_completed = False
        self._world = MoverWorld(self._plan, rng, schedule, self._register, self._state_entered, say, rules)
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
        self._start_destination()

    def _play(self) -> None:
        limit_s = self._plan.heal_s + AFTER_THE_FAULTS_LIMIT_S
        schedule, source, destination = self._schedule, *self._hosts.values()
        while schedule.now_s < limit_s and schedule.step():
            if not (source.mover_lives or destination.mover_lives) and self._over():
                return
            if schedule.now_s > limit_s - AFTER_THE_FAULTS_LIMIT_S * 2 / 3 and self._is_let_through():
                return

    def _start_destination(self) -> None:
        host = self._hosts[Side.DESTINATION]
        machine = self._parts.destination(self._migration, self._schedule.now_s, len(host.owed or ()))
        mover = self._parts.destination_mover(self._world, host, machine, self._prepared, self._record)
        self._start_mover(mover)

    def _start_source(self) -> None:
        host = self._hosts[Side.SOURCE]
        machine = self._parts.source(
            self._migration, ram_bytes(self._plan.guest), self._schedule.now_s, host.owed is not None
        )
        self._start_mover(self._parts.source_mover(self._world, host, machine, self._connect, self._record))

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
        if self._plan.source_never_begins or not self._hosts[Side.SOURCE].daemon_lives:
            self._record_ended = not self._plan.record_outlives_the_begin
            return
        self._source_has_begun = True
        self._start_source()

    def _connect(self, source: SimSourceMover) -> None:
        """A connection is tried: it is made, refused, or never answered."""
        destination, again = self._movers[Side.DESTINATION], source.machine.state is SourceState.RECONNECTING
        assert isinstance(destination, SimDestinationMover)
        if any(self._world.deaf.values()):
            return  # TCP's own greeting needs both ways
        if not destination.accepts:
            if again:
                return
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

    def _record(self) -> ev.MigrationKnown:
        """What the controller's record says; each end's last word went to its daemon."""
        failed = [host for host in self._hosts.values() if self._reports_failure(host)]
        if self._record_completed:
            failed = []  # the outcome of a record that has ended stays
        return ev.MigrationKnown(
            going_on=self._migration_goes_on(),
            paged=self._hosts[Side.DESTINATION].paged,
            pages_lost=any(host.last_error_code == PagesLost.code for host in failed),
            failed=bool(failed),
        )

    def _reports_failure(self, host: SimHost) -> bool:
        """A destination that has removed its VM leaves it to the source to say how that went on."""
        if host.side is Side.DESTINATION and host.last_state != DestinationState.DONE:
            return False
        return host.last_outcome is Outcome.FAILED

    def _migration_goes_on(self) -> bool:
        if self._hosts[Side.DESTINATION].last_state == DestinationState.DONE:
            return False  # its last word went to its daemon
        return not (self._record_ended or (self._source_has_begun and self._hosts[Side.SOURCE].ended))

    def _controller_lives(self) -> bool:
        return self._plan.controller is None or self._hosts[self._plan.controller].daemon_lives

    def _over(self) -> bool:
        if not self._hosts[Side.DESTINATION].ended:
            return False
        if self._source_has_begun:
            return self._hosts[Side.SOURCE].ended
        return not self._begin_due

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
            self._end_record()
        else:
            self._trouble_link(fault)

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
        """A person asks for post-copy; the driver lets that through only amid a pre-copy that may."""
        mover = self._movers.get(Side.SOURCE)
        if mover is not None and mover.machine.state is SourceState.PRECOPY and self._plan.options.may_page:
            mover.tell(ev.SwitchRequested())

    def _adjust(self) -> None:
        """A person sets other limits; where the machine has no use for them, the driver throws them away."""
        mover = self._movers.get(Side.SOURCE)
        if mover is not None and ev.OptionsChanged in mover.machine.table.get(mover.machine.state, {}):
            options = self._plan.options.model_copy(update={"deadline_s": 2.0, "max_downtime_ms": 500.0})
            mover.tell(ev.OptionsChanged(options))

    def _end_record(self) -> None:
        """Nobody has reported for long: the controller ends what the register says was committed."""
        if self._register.owner is Side.DESTINATION and not self._record().failed:
            self._record_ended = self._record_completed = True

    def _gave_up(self) -> bool:
        """Whether the destination has ended without a page, and says so."""
        host = self._hosts[Side.DESTINATION]
        return host.last_state == DestinationState.DONE and "lacks pages" in host.last_error

    def _source_has_ram(self) -> bool:
        """Whether anybody holds the pages that are owed: the source's QEMU, or a mover that saw it alive."""
        mover = self._movers.get(Side.SOURCE)
        return not self._vms[Side.SOURCE].was_killed or (isinstance(mover, SimSourceMover) and mover.has_ram)

    def _heal(self) -> None:
        """From now on nothing goes wrong any more. What is broken stays broken, what is dead is replaced."""
        if self._transcript is not None:
            self._say("no more faults")
        self._world.healed = True
        self._faults.clear()
        self._register.heal()
        self._world.deaf = dict.fromkeys(Side, False)
        self._quicken_link()
        for host in self._hosts.values():
            host.start_daemon()

    # --- the verdict -----------------------------------------------------------------------------

    def _judge(self) -> None:
        if self._is_let_through():
            return
        if not self._over():
            states = ", ".join(f"{side}: {host.last_state}" for side, host in self._hosts.items())
            raise Violation(f"it does not end: {states} after {self._schedule.now_s:.0f} s")
        self._invariants.at_the_end(self._world.cleaning_failed)
        self._demand_that_differences_are_told()
        for side, host in self._hosts.items():
            if host.last_word:
                self._invariants.last_word(side, host.last_word)

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

    def _is_let_through(self) -> bool:
        """What the machines and movers do not stand yet. A test sees to it that each is still needed."""
        source = self._movers.get(Side.SOURCE)
        if isinstance(source, SimSourceMover) and source.waits_for_ram_that_nobody_opened:
            return True
        return self._was_paged_without_a_word() or self._failed_after_the_record_ended()

    def _was_paged_without_a_word(self) -> bool:
        """An exemption: the destination lacked nothing, and ended before it said so to anybody.

        A connection that breaks in the state RUNNING makes `Publish(ended=True)` overtake `TellPeerPaged`,
        and after the last word nothing is published: the source looks for the destination for ever.
        """
        there = self._hosts[Side.DESTINATION]
        unsaid = there.last_outcome is Outcome.COMPLETED and not (there.paged or there.vm.missing)
        return unsaid and self._looks_for_an_end_that_is_over()

    def _failed_after_the_record_ended(self) -> bool:
        """An exemption: the controller had ended the record as completed, and takes no other outcome.

        So the source does not hear that the destination has ended without its pages, and looks for it for
        ever; nor the destination that the pages are lost, and asks for ever.
        """
        if not self._record_completed:
            return False
        here, there = self._hosts[Side.SOURCE], self._hosts[Side.DESTINATION]
        if here.last_state == SourceState.DONE and here.last_error_code == PagesLost.code:
            return there.last_state == DestinationState.PAGING
        return there.last_outcome is Outcome.FAILED and self._looks_for_an_end_that_is_over()

    def _looks_for_an_end_that_is_over(self) -> bool:
        source, there = self._movers.get(Side.SOURCE), self._hosts[Side.DESTINATION]
        looks = source is not None and source.alive and source.machine.state is SourceState.RECONNECTING
        return looks and there.last_state == DestinationState.DONE

    def _ending(self) -> str:
        """The outcome in a word, for the summary."""
        owner = self._vms[self._register.owner]
        if owner.status is not VmStatus.RUNNING:
            return "lost with its QEMU"
        if owner.side is Side.DESTINATION:
            return "lacks pages" if owner.missing else "moved"
        return "stayed" if self._source_has_begun else "never begun"

    def _say(self, text: str) -> None:
        assert self._transcript is not None
        self._transcript.append(f"{self._schedule.now_s:10.4f}  {text}")
