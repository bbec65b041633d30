"""How what two hosts report about one migration becomes one record that never runs backwards.

Pure. Reports come from both ends, late, twice or in the wrong order, and each end knows only its own part
(the source its pages, the destination the time of its load). So values are joined, never replaced: the
later phase, the larger figure, the longer list. Joining in any order, any number of times, gives the same.
"""

from __future__ import annotations

from transhume.model.migration import (
    DowntimeReport,
    Migration,
    MigrationReport,
    PagingReport,
    Phase,
    Progress,
)
from transhume.model.orders import MigrationUpdate

_PHASES = list(Phase)


def merged(record: Migration, update: MigrationUpdate) -> Migration:
    """The record with the update's phase, progress and report, its outcome left alone."""
    changes: dict[str, object] = {"phase": _later(record.phase, update.phase)}
    if update.progress is not None:
        changes["progress"] = join_progress(record.progress, update.progress)
    if update.report is not None:
        changes["report"] = join_reports(record.report, update.report)
    return record.model_copy(update=changes)


def join_progress(held: Progress | None, new: Progress) -> Progress:
    """The newer snapshot, with a fraction, an iteration and a count of bytes that do not fall."""
    if held is None:
        return new
    newer, older = (new, held) if new.elapsed_s >= held.elapsed_s else (held, new)
    return newer.model_copy(
        update={
            "phase": _later(held.phase, new.phase),
            "fraction": max(newer.fraction, older.fraction),
            "iteration": max(newer.iteration, older.iteration),
            "wire_bytes": max(newer.wire_bytes, older.wire_bytes),
        }
    )


def join_reports(held: MigrationReport, new: MigrationReport) -> MigrationReport:
    """Both ends' parts in one."""
    downtime = DowntimeReport(
        **{
            part: max(getattr(held.downtime, part), getattr(new.downtime, part))
            for part in DowntimeReport.model_fields
        }
    )
    known = held.predicted_downtime_ms if new.predicted_downtime_ms is None else new.predicted_downtime_ms
    return MigrationReport(
        iterations=new.iterations if len(new.iterations) >= len(held.iterations) else held.iterations,
        downtime=downtime,
        predicted_downtime_ms=known,
        wire_bytes=max(held.wire_bytes, new.wire_bytes),
        ram_bytes=max(held.ram_bytes, new.ram_bytes),
        state_bytes=max(held.state_bytes, new.state_bytes),
        suspended_at_s=held.suspended_at_s if new.suspended_at_s is None else new.suspended_at_s,
        total_ms=max(held.total_ms, new.total_ms),
        converged=held.converged if new.converged is None else new.converged,
        switch_reason=new.switch_reason or held.switch_reason,
        order=new.order if new.total_ms >= held.total_ms else held.order,
        paging=_join_paging(held.paging, new.paging, new.total_ms >= held.total_ms),
    )


def _join_paging(
    held: PagingReport | None, new: PagingReport | None, new_is_later: bool
) -> PagingReport | None:
    """The one that knows more: the destination's own word. How long it was needed, what became of the
    safe copy and which way the pages took, the source knows.
    """
    if held is None or new is None:
        return new or held
    fuller = max(
        held,
        new,
        key=lambda each: (
            each.complete,
            not each.to_compare,
            each.faults + each.pushed_pages,
            each.owed_pages,
            each.verified_pages,
        ),
    )
    return fuller.model_copy(
        update={
            "residual_ms": max(held.residual_ms, new.residual_ms),
            "safe_copy_pages": max(held.safe_copy_pages, new.safe_copy_pages),
            "safe_copy_ms": held.safe_copy_ms if new.safe_copy_ms is None else new.safe_copy_ms,
            "safe_copy_error": new.safe_copy_error or held.safe_copy_error,
            "path": (new.path or held.path) if new_is_later else (held.path or new.path),
        }
    )


def _later(held: Phase, new: Phase) -> Phase:
    """The later of two phases. DONE and ABORTED come with the end, which is decided elsewhere."""
    if Phase.ABORTED in (held, new):
        return held
    if new is Phase.DONE:
        new = Phase.RUNNING_AT_DESTINATION
    return max(held, new, key=_PHASES.index)
