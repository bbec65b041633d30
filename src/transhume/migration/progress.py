"""How far a migration is, in numbers and in one sentence. Pure: time comes in as an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from transhume.migration.events import PassResult
from transhume.migration.policy import STALL_PASSES, Decision
from transhume.model.migration import MigrationOptions, OnDeadline, Phase, Progress
from transhume.model.vm import PAGE_BYTES

RATE_WINDOW_S = 2.0
"""The rate shown is the one of the latest seconds, so that it is steady and still follows the link."""

SHARE_BEFORE_THE_END = 0.99
"""The bar is full only when the migration has ended."""

SHARE_OF_FIRST_PASS = 0.9
"""How far the bar goes in the first pass: how much it leaves is known only at its end."""

STEEPEST_SERIES = 0.95
"""The ETA sums the passes to come as a geometric series; a guest that is faster than this never ends it."""


class ProgressTracker:
    """Collects what the driver sees and answers with snapshots whose fraction never falls."""

    def __init__(self, migration: str, vm: str, options: MigrationOptions, now_s: float) -> None:
        self._migration = migration
        self._vm = vm
        self.options = options
        self._started_s = now_s
        self._fraction = 0.0
        self._iteration = 0
        self._wire_bytes = 0
        self._remaining_bytes: int | None = None
        self._samples: deque[tuple[float, int]] = deque([(now_s, 0)])
        self._decision: Decision | None = None
        self._paging_verdict = ""
        self._native_dirty_rate_bytes_s: float | None = None
        self._native_downtime_ms: float | None = None

    def pass_started(self, index: int, pages: int) -> None:
        """Pass `index` is going to send `pages`."""
        self._iteration = index
        self._remaining_bytes = pages * PAGE_BYTES

    def sent(self, pages: int, wire_bytes: int, now_s: float) -> None:
        """`pages` more have gone, in `wire_bytes`."""
        self._wire_bytes += wire_bytes
        if self._remaining_bytes is not None:
            self._remaining_bytes = max(0, self._remaining_bytes - pages * PAGE_BYTES)
        self._add_sample(now_s)

    def pass_ended(self, result: PassResult, decision: Decision | None) -> None:
        """A pass is over; `decision` is what the policy made of it."""
        self._remaining_bytes = (result.dirty_pages_after + result.unsent_pages) * PAGE_BYTES
        self._decision = decision

    def paging(self, left_pages: int, source_lost: bool) -> None:
        """The VM runs at the destination, and so many pages have not gone there yet."""
        self._remaining_bytes = left_pages * PAGE_BYTES
        self._paging_verdict = (
            "the destination is out of reach: it is looked for; the VM waits where it needs a missing page"
            if source_lost
            else f"runs at the destination; {left_pages * PAGE_BYTES / 1e6:,.0f} MB are still here"
        )

    def native(
        self,
        wire_bytes: int,
        remaining_bytes: int,
        dirty_rate_bytes_s: float,
        iteration: int,
        expected_downtime_ms: float | None,
        now_s: float,
    ) -> None:
        """QEMU's own numbers, for its own engine."""
        self._wire_bytes = max(self._wire_bytes, wire_bytes)
        self._remaining_bytes = remaining_bytes
        self._iteration = iteration
        self._native_dirty_rate_bytes_s = dirty_rate_bytes_s
        self._native_downtime_ms = expected_downtime_ms
        self._add_sample(now_s)

    def snapshot(self, phase: Phase, now_s: float, clock_of: Callable[[float], str]) -> Progress:
        """The state of things. `clock_of` turns a monotonic time into a time of day for the verdict."""
        rate_bytes_s = self._rate_bytes_s()
        self._advance(phase)
        decision = self._decision
        dirty_rate = decision.dirty_rate_bytes_s if decision else self._native_dirty_rate_bytes_s
        predicted_ms = decision.predicted_downtime_s * 1000 if decision else self._native_downtime_ms
        return Progress(
            migration=self._migration,
            vm=self._vm,
            phase=phase,
            elapsed_s=now_s - self._started_s,
            fraction=self._fraction,
            iteration=self._iteration,
            wire_bytes=self._wire_bytes,
            rate_bytes_s=rate_bytes_s,
            dirty_rate_bytes_s=dirty_rate,
            remaining_bytes=self._remaining_bytes,
            eta_s=self._eta_s(rate_bytes_s),
            predicted_downtime_ms=predicted_ms,
            verdict=self._verdict(phase, now_s, clock_of),
        )

    def _add_sample(self, now_s: float) -> None:
        self._samples.append((now_s, self._wire_bytes))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def _rate_bytes_s(self) -> float | None:
        (first_s, first_bytes), (last_s, last_bytes) = self._samples[0], self._samples[-1]
        if last_s <= first_s:
            return None
        return (last_bytes - first_bytes) / (last_s - first_s)

    def _advance(self, phase: Phase) -> None:
        if phase in (Phase.DONE, Phase.RUNNING_AT_DESTINATION):
            self._fraction = 1.0
            return
        if self._remaining_bytes is None or self._wire_bytes == 0:
            return
        share = self._wire_bytes / (self._wire_bytes + self._remaining_bytes)
        most = SHARE_BEFORE_THE_END
        if phase is Phase.PRECOPY and self._decision is None and self._native_dirty_rate_bytes_s is None:
            most = SHARE_OF_FIRST_PASS
            share *= most
        self._fraction = max(self._fraction, min(share, most))

    def _eta_s(self, rate_bytes_s: float | None) -> float | None:
        """The rest of this pass and all passes after it, each of which sends what the last one let dirty."""
        if not rate_bytes_s or self._remaining_bytes is None:
            return None
        pass_s = self._remaining_bytes / rate_bytes_s
        if self._decision is None:
            return pass_s
        shrink = min(STEEPEST_SERIES, self._decision.dirty_rate_bytes_s / rate_bytes_s)
        return pass_s / (1 - shrink)

    def _verdict(self, phase: Phase, now_s: float, clock_of: Callable[[float], str]) -> str:
        if phase is Phase.PAGING:
            return self._paging_verdict
        if phase is not Phase.PRECOPY:
            return VERDICTS.get(phase, "")
        decision = self._decision
        if decision is None:
            return "first pass over the memory" if self._iteration == 0 else ""
        downtime = f"about {decision.predicted_downtime_s * 1000:,.0f} ms of downtime"
        if decision.converged:
            return f"converging: {downtime} expected"
        if decision.dirty_rate_bytes_s < decision.rate_bytes_s and not decision.stalled:
            return f"converging: {downtime} if it switched now"
        rates = (
            f"dirtying {decision.dirty_rate_bytes_s / 1e6:,.0f} MB/s, "
            f"faster than the link's {decision.rate_bytes_s / 1e6:,.0f} MB/s"
            if decision.dirty_rate_bytes_s > decision.rate_bytes_s
            else "no progress: each pass leaves about as many dirty pages as the one before"
        )
        deadline_s = self._started_s + self.options.deadline_s
        if self.options.on_deadline is OnDeadline.ABORT:
            return f"{rates}: will give up at {clock_of(deadline_s)} unless it calms down"
        rest_s = decision.remaining_pages * PAGE_BYTES / max(decision.rate_bytes_s, 1.0)
        switch_s = min(deadline_s, now_s + STALL_PASSES * rest_s)
        return f"{rates}: will switch at {clock_of(switch_s)} with {downtime}"


VERDICTS: dict[Phase, str] = {
    Phase.REQUESTED: "waiting for the destination",
    Phase.PREPARED: "the destination is ready",
    Phase.SUSPENDED: "suspended: sending the last pages",
    Phase.STATE_SENT: "suspended: waiting for the destination to take over",
    Phase.COMMITTED: "the destination owns the VM",
    Phase.RUNNING_AT_DESTINATION: "runs at the destination",
}
