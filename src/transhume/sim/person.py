"""Who takes the VM back from a destination that is lost; what was promised for it need not be true."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transhume.migration import events as ev
from transhume.migration.source_table import SourceState
from transhume.model.migration import Phase
from transhume.sim.host import SimHost
from transhume.sim.mover import MoverWorld, SimMover
from transhume.sim.plan import Plan, Promise, Side

LOOK_S = 0.5
GRACE_S = 15.0
"""So long after a destination reaches the register again it must have ended what was taken from it: its mover
asks every two seconds; when that had ended, the daemon is told at the next heartbeat."""


class SimPerson:
    """Looks again and again whether the farm offers a revival, and takes it up once, after some thought."""

    def __init__(
        self,
        plan: Plan,
        world: MoverWorld,
        hosts: Mapping[Side, SimHost],
        movers: Mapping[Side, SimMover],
    ) -> None:
        self.caught: Callable[[], None] | None = None
        self._plan = plan
        self._world = world
        self._hosts = hosts
        self._movers = movers
        self._has_lied = False
        self._heard_again_s: float | None = None

    def start(self) -> None:
        """Look after the VM from now on, if this seed has somebody who does."""
        if self._plan.revival is not None:
            self._world.schedule.after(LOOK_S, self._look)

    def may_run_twice(self) -> bool:
        """Whether a lie still excuses a VM that runs at both ends."""
        since_s = self._heard_again_s
        return self._has_lied and (since_s is None or self._world.schedule.now_s - since_s <= GRACE_S)

    def _look(self) -> None:
        self._world.schedule.after(LOOK_S, self._look)
        if self._has_lied:
            self._look_who_is_back()
        if self._is_offered():
            self._world.schedule.after(self._plan.revival_after_s, self._ask)

    def _is_offered(self) -> bool:
        """What the farm demands, and what the person promises."""
        controller, there = self._world.controller, self._hosts[Side.DESTINATION]
        promised = there.down if self._plan.revival is Promise.TRUE else there.isolated and not there.down
        return (
            promised
            and self._hosts[Side.SOURCE].reaches_controller
            and controller.record.phase is Phase.PAGING
            and not (controller.record.ended or controller.record.paged)
            and controller.committed
            and controller.silent(Side.DESTINATION)
        )

    def _ask(self) -> None:
        """The source's mover takes it only while it looks for its destination."""
        mover = self._movers.get(Side.SOURCE)
        if not self._is_offered() or mover is None or not mover.alive:
            return
        if mover.machine.state is SourceState.RECONNECTING:
            self._has_lied |= self._plan.revival is Promise.LIE
            mover.tell(ev.ReviveRequested())

    def _look_who_is_back(self) -> None:
        """Time runs from when the VM was taken back and its destination's host can ask for it."""
        register = self._world.register
        reached = register.epoch > self._world.epoch + 1 and self._hosts[Side.DESTINATION].reaches_controller
        now_s = self._world.schedule.now_s
        if not reached:
            self._heard_again_s = None
        elif self._heard_again_s is None:
            self._heard_again_s = now_s
        elif now_s - self._heard_again_s > GRACE_S and self.caught is not None:
            self.caught()
