"""Simulated time: a heap of things to do, each at its moment. No wall clock, no chance."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Schedule:
    """What happens when. Things due at the same moment happen in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Do something `delay_s` from now."""
        self.at(self.now_s + delay_s, call, *arguments)

    def at(self, due_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Do something at a moment: exactly then, which a sum of delays is not."""
        self._count += 1
        heapq.heappush(self._heap, (due_s, self._count, call, arguments))

    def step(self) -> bool:
        """Do the next thing; False when there is nothing left to do."""
        if not self._heap:
            return False
        self.now_s, _, call, arguments = heapq.heappop(self._heap)
        call(*arguments)
        return True
