"""The register, seen from the movers: one compare-and-swap, over a network and a store that fail."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from transhume.migration import events as ev
from transhume.migration.machine import Event
from transhume.sim.plan import Plan, Side
from transhume.sim.schedule import Schedule

ANSWER_LIMIT_S = 2.0
"""How long a mover waits for an answer before it takes the outcome for unknown."""


class Swap:
    """One request: `(expected, epoch) -> (wanted, epoch + 1)`, asked by one end.

    It is answered once: what comes after the mover stopped waiting is thrown away.
    """

    def __init__(
        self, by: Side, expected: Side, epoch: int, wanted: Side, answer: Callable[[Event], None]
    ) -> None:
        self.by = by
        self.expected = expected
        self.wanted = wanted
        self.epoch = epoch
        self.refused = False
        self.made = False
        self._answer = answer
        self._answered = False

    def answer(self, event: Event) -> None:
        if not self._answered:
            self._answered = True
            self._answer(event)


class SimRegister:
    """Holds `(owner, epoch)`. A request may be late, doubled or lost, and so may its answer."""

    def __init__(self, plan: Plan, schedule: Schedule, rng: Random, epoch: int) -> None:
        self.owner = Side.SOURCE
        self.epoch = epoch
        self.healed = False
        self.on_change: Callable[[], None] | None = None
        self.on_swap: Callable[[Side, Side], None] | None = None
        self.log: Callable[[str], None] | None = None
        self.controller_lives: Callable[[], bool] = lambda: True
        self.cut_off: Callable[[Side], bool] = lambda _: False
        self._plan = plan
        self._schedule = schedule
        self._rng = rng
        self._down_until_s = 0.0
        self._full_until_s = 0.0

    def reachable(self, by: Side) -> bool:
        """Whether a request of one end is taken now."""
        return self.works and not self.cut_off(by)

    @property
    def works(self) -> bool:
        """Whether it takes any request now."""
        return self._schedule.now_s >= self._down_until_s and self.controller_lives()

    @property
    def full(self) -> bool:
        """Whether there is no space for a write now."""
        return self._schedule.now_s < self._full_until_s

    def go_down(self, duration_s: float) -> None:
        """No answers for a while."""
        self._down_until_s = self._schedule.now_s + duration_s

    def be_full(self, duration_s: float) -> None:
        """No space for a while: writes are refused."""
        self._full_until_s = self._schedule.now_s + duration_s

    def heal(self) -> None:
        """From now on it works."""
        self.healed = True
        self._down_until_s = self._full_until_s = 0.0

    def swap(
        self, by: Side, expected: Side, epoch: int, wanted: Side, answer: Callable[[Event], None]
    ) -> None:
        """Ask for `(expected, epoch) -> (wanted, epoch + 1)`."""
        swap = Swap(by, expected, epoch, wanted, answer)
        self._schedule.after(self._travel_s(), self._arrive, swap, False)
        if self.strikes(self._plan.request_doubled_share):
            self._schedule.after(self._travel_s() + self._rng.uniform(0.0, 1.0), self._arrive, swap, True)
        self._schedule.after(ANSWER_LIMIT_S, swap.answer, ev.SwapUnknown("no answer in time"))

    def raise_epoch(self, epoch: int) -> None:
        """The end of a migration that did not commit: from now on no swap of this epoch can be made."""
        if (self.owner, self.epoch) == (Side.SOURCE, epoch):
            self._put(Side.SOURCE)

    def strikes(self, share: float) -> bool:
        """Whether something with this probability happens now. Nothing does after the faults stopped."""
        return share > 0.0 and not self.healed and self._rng.random() < share

    def _travel_s(self) -> float:
        latency_s = self._plan.latency_s * self._rng.uniform(0.5, 2.0)
        if self.strikes(self._plan.answer_late_share):
            latency_s += self._rng.uniform(0.0, 2.5 * ANSWER_LIMIT_S)
        return latency_s

    def _arrive(self, swap: Swap, second: bool) -> None:
        """The request, or a copy of it, is at the store. A refusal holds for all copies."""
        if not self.reachable(swap.by):
            if not second:
                swap.answer(ev.SwapUnknown("the controller does not answer"))
            return
        if swap.refused:
            return
        if self.on_swap is not None:
            self.on_swap(swap.expected, swap.wanted)
        if self.full and not swap.made:
            swap.refused = True
            reply: Event = ev.SwapRefused("no space left")
        else:
            reply = self._compare_and_swap(swap)
        if not self.strikes(self._plan.answer_lost_share):
            self._schedule.after(self._travel_s(), self._answer, swap, reply)

    def _answer(self, swap: Swap, reply: Event) -> None:
        if not self.cut_off(swap.by):
            swap.answer(reply)

    def _compare_and_swap(self, swap: Swap) -> Event:
        if (self.owner, self.epoch) != (swap.expected, swap.epoch):
            return ev.SwapLost(self.owner, self.epoch)
        swap.made = True
        self._put(swap.wanted)
        return ev.SwapWon()

    def _put(self, owner: Side) -> None:
        self.owner = owner
        self.epoch += 1
        if self.log is not None:
            self.log(f"register: {self.owner}, epoch {self.epoch}")
        if self.on_change is not None:
            self.on_change()
