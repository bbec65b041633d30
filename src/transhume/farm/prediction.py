"""What a migration would take, from a short look at how fast the guest changes its memory.

Pure. A pass sends what was changed during the pass before it, so the passes form a geometric series whose
ratio is the dirty rate over the link's rate; under 1 it shrinks towards nothing, over 1 it never does. The
guest cannot change more than all of its memory, which caps the series.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from transhume.model.migration import Migration, MigrationOptions, OnDeadline, Outcome
from transhume.model.orders import DirtySample
from transhume.model.vm import PAGE_BYTES

ASSUMED_LINK_BYTES_S = 118_000_000.0
"""What TCP carries over an Ethernet of 1 Gbit/s: the guess before anything was measured."""

ASSUMED_FIXED_MS = 30.0
"""Stopping, device state out and in, the commit and the resume: the guess before anything was measured."""

NO_PROGRESS_RATIO = 0.95
"""A pass that leaves more than this share of what the one before left makes no progress worth its traffic."""


@dataclass(frozen=True)
class Experience:
    """What earlier migrations between the same hosts measured. `measured` is false for a mere assumption."""

    link_bytes_s: float = ASSUMED_LINK_BYTES_S
    fixed_ms: float = ASSUMED_FIXED_MS
    measured: bool = False


@dataclass(frozen=True)
class Prediction:
    """The traffic, the whole time and the downtime to expect, and one sentence about them."""

    wire_bytes: int
    total_ms: float
    downtime_ms: float
    converges: bool
    verdict: str


def experience(past: Iterable[Migration], source: str, destination: str) -> Experience:
    """Learn the link's rate and the fixed cost from completed migrations, in either direction.

    The rate is that of the latest first pass, which sends everything in long runs; the fixed cost is the
    median of the downtimes without their last pages.
    """
    pair = {source, destination}
    completed = sorted(
        (
            migration
            for migration in past
            if migration.outcome is Outcome.COMPLETED and {migration.source, migration.destination} == pair
        ),
        key=lambda migration: migration.created_at_s,
    )
    rates = [
        first.wire_bytes / first.duration_ms * 1000
        for migration in completed
        if migration.options.bandwidth_bytes_s is None
        for first in migration.report.iterations[:1]
        if first.duration_ms > 0 and first.wire_bytes >= (1 << 20)
    ]
    fixed = [
        migration.report.downtime.total_ms - migration.report.downtime.last_pages_ms
        for migration in completed
        if migration.report.downtime.total_ms > 0
    ]
    return Experience(
        link_bytes_s=rates[-1] if rates else ASSUMED_LINK_BYTES_S,
        fixed_ms=max(0.0, median(fixed)) if fixed else ASSUMED_FIXED_MS,
        measured=bool(rates),
    )


def predict(sample: DirtySample, known: Experience, options: MigrationOptions, ram_bytes: int) -> Prediction:
    """Play the passes through until they may end, as the pre-copy would."""
    rate_bytes_s = effective_rate_bytes_s(known, options)
    dirty_bytes_s = dirty_rate_bytes_s(sample)
    left_bytes = float(max(0, sample.populated_bytes - sample.zero_bytes))
    most_bytes = float(max(sample.populated_bytes, sample.dirty_bytes))
    wire_bytes, elapsed_s, converges = 0.0, 0.0, False
    for _ in range(options.max_iterations):
        pass_s = left_bytes / rate_bytes_s
        wire_bytes += left_bytes
        elapsed_s += pass_s
        dirtied_bytes = min(most_bytes, dirty_bytes_s * pass_s)
        progress = dirtied_bytes < NO_PROGRESS_RATIO * left_bytes
        left_bytes = dirtied_bytes
        if _may_switch(left_bytes, rate_bytes_s, known.fixed_ms, options, ram_bytes):
            converges = True
            break
        if not progress or elapsed_s >= options.deadline_s:
            break
    downtime_ms = left_bytes / rate_bytes_s * 1000 + known.fixed_ms
    wire_bytes += left_bytes
    total_ms = elapsed_s * 1000 + downtime_ms
    return Prediction(
        wire_bytes=round(wire_bytes),
        total_ms=total_ms,
        downtime_ms=downtime_ms,
        converges=converges,
        verdict=_verdict(converges, dirty_bytes_s, rate_bytes_s, downtime_ms, elapsed_s, options, known),
    )


def dirty_rate_bytes_s(sample: DirtySample) -> float:
    """How fast the guest changed memory during the sample."""
    return sample.dirty_bytes / sample.sample_ms * 1000 if sample.sample_ms > 0 else 0.0


def effective_rate_bytes_s(known: Experience, options: MigrationOptions) -> float:
    """The link's rate, or the operator's limit where that is lower."""
    limit = options.bandwidth_bytes_s
    return known.link_bytes_s if limit is None else min(known.link_bytes_s, float(limit))


def _may_switch(
    left_bytes: float, rate_bytes_s: float, fixed_ms: float, options: MigrationOptions, ram_bytes: int
) -> bool:
    left_pages = left_bytes / PAGE_BYTES
    if options.threshold_pages is not None and left_pages <= options.threshold_pages:
        return True
    if options.threshold_fraction is not None and left_bytes <= options.threshold_fraction * ram_bytes:
        return True
    return left_bytes / rate_bytes_s * 1000 + fixed_ms <= options.max_downtime_ms


def _verdict(
    converges: bool,
    dirty_bytes_s: float,
    rate_bytes_s: float,
    downtime_ms: float,
    elapsed_s: float,
    options: MigrationOptions,
    known: Experience,
) -> str:
    dirty, rate = f"{dirty_bytes_s / 1e6:.0f} MB/s", f"{rate_bytes_s / 1e6:.0f} MB/s"
    if known.measured:
        link = f"the link's {rate}"
    elif options.bandwidth_bytes_s is not None and rate_bytes_s < known.link_bytes_s:
        link = f"the limit of {rate}"
    else:
        link = f"the {rate} assumed for a link not measured yet"
    if converges:
        return f"dirtying {dirty}, slower than {link}: converges, will switch with about {downtime_ms:.0f} ms"
    relation = "faster than" if dirty_bytes_s > rate_bytes_s else "too fast for"
    if elapsed_s >= options.deadline_s and options.on_deadline is OnDeadline.ABORT:
        return f"dirtying {dirty}, {relation} {link}: will be given up at its deadline"
    return (
        f"dirtying {dirty}, {relation} {link}: does not reach {options.max_downtime_ms:.0f} ms, "
        f"will switch with about {downtime_ms:.0f} ms"
    )
