"""The models that the invariants watch, without movers, for tests of the simulator's parts."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from transhume.migration.machine import Event
from transhume.model.migration import Outcome, Phase
from transhume.sim.controller import Update
from transhume.sim.invariants import Invariants
from transhume.sim.plan import Plan, Side, draw
from transhume.sim.register import SimRegister
from transhume.sim.safe_copy import SimSafeCopy
from transhume.sim.schedule import Schedule
from transhume.sim.vm import SimVm, VmStatus

QUIET = replace(
    draw(Random(0)), answer_lost_share=0.0, answer_late_share=0.0, request_doubled_share=0.0, latency_s=0.01
)


class Farm:
    """The models that the invariants watch, without movers."""

    def __init__(self, plan: Plan = QUIET) -> None:
        self.schedule = Schedule()
        self.register = SimRegister(plan, self.schedule, Random(1), epoch=7)
        self.copy = SimSafeCopy(self.schedule)
        self.source = SimVm(Side.SOURCE, VmStatus.RUNNING, self.schedule)
        self.destination = SimVm(Side.DESTINATION, VmStatus.ABSENT, self.schedule)
        self.invariants = Invariants(
            {Side.SOURCE: self.source, Side.DESTINATION: self.destination}, self.register, self.copy
        )
        self.answers: list[Event] = []

    def prepare(self) -> None:
        """All that has to happen before a commit."""
        self.source.change(VmStatus.PAUSED)
        self.destination.change(VmStatus.PAUSED)
        self.destination.ram_content = self.destination.state_content = self.source.content

    def swap(self, wanted: Side, epoch: int = 7) -> None:
        self.register.swap(wanted, Side.SOURCE, epoch, wanted, self.answers.append)

    def take_back(self) -> None:
        self.register.swap(Side.SOURCE, Side.DESTINATION, 8, Side.SOURCE, self.answers.append)
        self.settle()

    def settle(self) -> None:
        while self.schedule.step():
            pass


def lacking(farm: Farm) -> None:
    """The VM belongs to the destination and runs there; pages 1 and 2 are still at the source."""
    farm.prepare()
    farm.destination.owe({1, 2})
    farm.destination.guard(True)
    farm.swap(Side.DESTINATION)
    farm.settle()
    farm.destination.change(VmStatus.RUNNING)


def word(side: Side, runs_at: str, outcome: Outcome = Outcome.FAILED) -> Update:
    """What an end says last, of a migration that was committed."""
    return Update(side, Phase.DONE, outcome, runs_at)
