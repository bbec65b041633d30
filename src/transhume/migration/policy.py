"""When does the pre-copy end? One function, pure, with its criteria listed.

The rule joins three ideas: QEMU's comparison of the predicted downtime with a limit; the patent's
threshold or lack of progress (claim 13 and the description's iterative transfer); and the switch at a local
minimum of the dirty set after a stall, taken at iteration boundaries (KubeVirt's VEP 248).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from transhume.migration.events import PassResult
from transhume.model.migration import MigrationOptions, Mode, OnDeadline, Rest
from transhume.model.vm import PAGE_BYTES

STALL_PASSES = 3
"""So many passes in a row without progress make a stall."""

PROGRESS_FACTOR = 0.9
"""A pass makes progress when it leaves at most this share of the smallest set seen before."""

LOCAL_MINIMUM_WINDOW = 5
LOCAL_MINIMUM_FACTOR = 1.1
LOCAL_MINIMUM_PATIENCE_PASSES = 8
"""After a stall: switch when the set is about the smallest of the window, or after so many passes."""

RATE_SAMPLE_BYTES = 8 << 20
"""The link's rate is taken over the latest passes that carried at least this much together."""

HOPELESS_SHARE = 0.8
HOPELESS_SAMPLE_BYTES = 32 << 20
"""A pass of at least so many bytes that leaves this share of them written will not be followed by a small
one.
"""

POLISH_SHARE = 0.1
"""While each pass still halves the rest, go on until the last pages cost this share of the limit."""


class Choice(StrEnum):
    """What to do at the end of a pass."""

    CONTINUE = "continue"
    SWITCH = "switch"
    ABORT = "abort"


@dataclass(frozen=True)
class Decision:
    """A choice with its reason. `converged`: whether the promise about the downtime is expected to hold."""

    choice: Choice
    reason: str
    predicted_downtime_s: float
    rate_bytes_s: float
    dirty_rate_bytes_s: float
    remaining_pages: int
    converged: bool
    stalled: bool
    rest: Rest = Rest.BEFORE_STATE


def rest_of(options: MigrationOptions) -> Rest:
    """When the pages that are left at the suspension travel, unless the pre-copy does not converge."""
    if options.rest is not None:
        return options.rest
    return Rest.BOTH if options.mode in (Mode.POST_COPY, Mode.HYBRID) else Rest.BEFORE_STATE


def pace_bytes_s(options: MigrationOptions, owed_pages: int) -> int | None:
    """How fast memory may travel: the bandwidth that was allowed, or more where the residual limit needs it.

    None: as fast as possible. `owed_pages` is 0 before the switchover.
    """
    allowed, limit_s = options.bandwidth_bytes_s, options.residual_limit_s
    if allowed is None or limit_s is None:
        return allowed
    return max(allowed, round(owed_pages * PAGE_BYTES / limit_s))


def begins_suspended(options: MigrationOptions) -> bool:
    """Whether no pass is made before the switchover."""
    return options.mode is Mode.POST_COPY


def link_rate_bytes_s(passes: Sequence[PassResult]) -> float:
    """Bytes per second over the latest passes, enough of them to even out the cost of very short ones."""
    wire_bytes = 0
    duration_s = 0.0
    for result in reversed(passes):
        wire_bytes += result.wire_bytes
        duration_s += result.duration_s
        if wire_bytes >= RATE_SAMPLE_BYTES:
            break
    return wire_bytes / duration_s if duration_s > 0 else 0.0


def passes_without_progress(passes: Sequence[PassResult]) -> int:
    """How many of the latest passes, in a row, did not shrink the set of pages left.

    An empty set cannot shrink: when not even that meets the limit (because of the switchover's own cost),
    more passes are of no use either.
    """
    count = 0
    smallest: int | None = None
    for result in passes:
        left = result.dirty_pages_after + result.unsent_pages
        if smallest is None or (left < smallest and left <= PROGRESS_FACTOR * smallest):
            count = 0
        else:
            count += 1
        smallest = left if smallest is None else min(smallest, left)
    return count


def at_local_minimum(passes: Sequence[PassResult]) -> bool:
    """Whether the set left by the last pass is about the smallest of the recent ones."""
    window = [result.dirty_pages_after for result in passes[-LOCAL_MINIMUM_WINDOW:]]
    return window[-1] <= LOCAL_MINIMUM_FACTOR * min(window)


def decide(
    passes: Sequence[PassResult],
    options: MigrationOptions,
    ram_pages: int,
    switchover_cost_s: float,
    elapsed_s: float,
) -> Decision:
    """What to do after the last of `passes`, `elapsed_s` after the request.

    The pre-copy ends
    1. at the deadline: by a switch or an abort, as `options.on_deadline` says;
    2. when the pages left are at most the absolute or the relative threshold;
    3. when the predicted downtime (pages left over the measured rate, plus `switchover_cost_s`) is within
       the limit; as long as every pass halves the rest it goes on a little, since that costs next to nothing;
    4. when it makes no progress any more: at a local minimum of the dirty set, or after a bounded number of
       further passes, or at `max_iterations`. With `on_deadline` ABORT the limit is a hard promise,
       and a stall waits for the deadline instead;
    5. after `options.iterations` passes, whatever is left (the patent's push once is 1): then a small rest or
       a stall ends it no sooner; in mode HYBRID after one, when neither iterations nor a threshold are given.

    In mode AUTO, where post-copy is allowed, the rest is left for after the resume as soon as the memory is
    written faster than the link carries it, at a stall and at the deadline: the promise about the downtime is
    kept, and the pre-copy is not drawn out in vain.

    With `options.residual_limit_s` none is left for after the resume as long as so much is left that it is
    expected to take longer; where that never ends, the rest goes while the VM is suspended.
    """
    last = passes[-1]
    remaining_pages = last.dirty_pages_after + last.unsent_pages
    rate_bytes_s = link_rate_bytes_s(passes)
    # A rate that is not known yet (nothing but zero pages was sent) promises nothing.
    remaining_s = remaining_pages * PAGE_BYTES / max(rate_bytes_s, 1.0)
    predicted_s = remaining_s + switchover_cost_s
    limit_s = options.max_downtime_ms / 1000
    stalled_passes = passes_without_progress(passes)
    stalled = stalled_passes >= STALL_PASSES or len(passes) >= options.max_iterations
    within_limit = predicted_s <= limit_s
    rest = rest_of(options)
    may_owe = options.residual_limit_s is None or remaining_s <= options.residual_limit_s
    if not may_owe and rest.after_resume:
        rest = Rest.BEFORE_STATE
    may_give_way = options.mode is Mode.AUTO and options.may_page and may_owe
    # A mode that owes pages waits until few enough are left, and ends like any other when that never comes.
    may_end = may_owe or options.mode is not Mode.HYBRID

    def decision(choice: Choice, reason: str, rest: Rest = rest) -> Decision:
        return Decision(
            choice=choice,
            reason=reason,
            predicted_downtime_s=predicted_s,
            rate_bytes_s=rate_bytes_s,
            dirty_rate_bytes_s=last.dirty_pages_after * PAGE_BYTES / max(last.duration_s, 1e-6),
            remaining_pages=remaining_pages,
            converged=within_limit,
            stalled=stalled,
            rest=rest,
        )

    if options.iterations is not None and len(passes) >= options.iterations:
        return decision(Choice.SWITCH, f"{len(passes)} of {options.iterations} passes are made")
    if within_limit and options.iterations is None and not _polishing(passes, remaining_s, limit_s):
        return decision(Choice.SWITCH, "the predicted downtime is within the limit")
    if may_end and _under_threshold(remaining_pages, options, ram_pages):
        return decision(Choice.SWITCH, "the pages left are under the threshold")
    one_is_enough = options.mode is Mode.HYBRID and options.iterations is None
    if may_end and one_is_enough and not _has_threshold(options):
        return decision(Choice.SWITCH, "one pass is made")
    if may_give_way:
        late = elapsed_s >= options.deadline_s and options.on_deadline is OnDeadline.SWITCH
        reason = _why_it_will_not_converge(passes, rate_bytes_s, stalled, late)
        if reason:
            return decision(Choice.SWITCH, reason, options.rest or Rest.BOTH)
    if elapsed_s >= options.deadline_s:
        if options.on_deadline is OnDeadline.ABORT:
            return decision(Choice.ABORT, "the deadline passed before the migration converged")
        return decision(Choice.SWITCH, "the deadline passed")
    if stalled and options.iterations is None and options.on_deadline is OnDeadline.SWITCH:
        if at_local_minimum(passes) and stalled_passes >= STALL_PASSES:
            return decision(Choice.SWITCH, "no progress any more: at a local minimum of the dirty set")
        if stalled_passes >= STALL_PASSES + LOCAL_MINIMUM_PATIENCE_PASSES:
            return decision(
                Choice.SWITCH, "no progress any more, and no local minimum of the dirty set in sight"
            )
        if len(passes) >= options.max_iterations:
            return decision(Choice.SWITCH, f"{len(passes)} iterations were made, the most that were allowed")
    return decision(Choice.CONTINUE, "")


def _has_threshold(options: MigrationOptions) -> bool:
    return options.threshold_pages is not None or options.threshold_fraction is not None


def _why_it_will_not_converge(
    passes: Sequence[PassResult], rate_bytes_s: float, stalled: bool, late: bool
) -> str:
    """The reason to leave the rest for after the resume; empty while the pre-copy gets somewhere."""
    last = passes[-1]
    if late:
        return "the deadline passed: the rest follows after the resume"
    if stalled:
        return "no progress any more: the rest follows after the resume"
    written_bytes_s = last.written_bytes_s
    enough = written_bytes_s is not None
    if written_bytes_s is None:
        written_bytes_s = last.dirty_pages_after * PAGE_BYTES / max(last.duration_s, 1e-6)
        enough = last.wire_bytes >= HOPELESS_SAMPLE_BYTES and last.unsent_pages == 0
    if enough and written_bytes_s >= HOPELESS_SHARE * rate_bytes_s:
        return (
            f"memory is written at {written_bytes_s / 1e6:.0f} MB/s and the link carries "
            f"{rate_bytes_s / 1e6:.0f}: the rest follows after the resume"
        )
    return ""


def _under_threshold(remaining_pages: int, options: MigrationOptions, ram_pages: int) -> bool:
    if options.threshold_pages is not None and remaining_pages <= options.threshold_pages:
        return True
    return (
        options.threshold_fraction is not None and remaining_pages <= options.threshold_fraction * ram_pages
    )


def _polishing(passes: Sequence[PassResult], remaining_s: float, limit_s: float) -> bool:
    """Whether one more pass is worth it although the limit is met already."""
    if remaining_s <= POLISH_SHARE * limit_s:
        return False
    last = passes[-1]
    left = last.dirty_pages_after + last.unsent_pages
    before = last.pages + last.zero_pages if len(passes) == 1 else passes[-2].dirty_pages_after
    return left <= before / 2
