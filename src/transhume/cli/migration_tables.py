"""Migrations as tables: all, the report of one, what one would meet. Nothing here asks or decides."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transhume.cli.tables import bytes_in_words, clock, ms_in_words, plain_table
from transhume.model.migration import DowntimeReport, DryRun, Migration, Outcome, PagingReport, Phase
from transhume.model.vm import PAGE_BYTES

_DOWNTIME_PARTS = (
    ("stop", "stop_ms"),
    ("last pages", "last_pages_ms"),
    ("verify", "verify_ms"),
    ("device state out", "state_out_ms"),
    ("load", "load_ms"),
    ("commit", "commit_ms"),
    ("resume", "resume_ms"),
)


def migrations_table(migrations: list[Migration], wide: bool = False) -> Table:
    """`wide`: with more columns."""
    headings = (
        "MIGRATION",
        "VM",
        "FROM",
        "TO",
        "ENGINE",
        "OUTCOME",
        "TOTAL",
        "DOWNTIME",
        "SENT",
        "RUNS AT",
        "WHEN",
    )
    table = plain_table(
        *headings, *(("MODE", "PASSES", "EPOCH", "SWITCHED BECAUSE", "ERROR") if wide else ())
    )
    for record in migrations:
        report = record.report
        under_way = record.outcome is Outcome.RUNNING
        table.add_row(
            record.id,
            record.vm,
            record.source,
            record.destination or "-",
            record.options.engine.value,
            record.phase.value if under_way else Text(record.outcome.value, style=_style(record)),
            ms_in_words(report.total_ms) if report.total_ms else "-",
            ms_in_words(report.downtime.total_ms) if report.downtime.total_ms else "-",
            bytes_in_words(report.wire_bytes) if report.wire_bytes else "-",
            record.runs_at,
            clock(record.created_at_s),
            *(_wide(record) if wide else ()),
        )
    return table


def _wide(record: Migration) -> tuple[str, ...]:
    return (
        record.options.mode.value,
        str(len(record.report.iterations)) if record.report.iterations else "-",
        str(record.epoch),
        record.report.switch_reason or "-",
        record.error or "-",
    )


def migration_report(record: Migration) -> Group:
    """What came of one migration: a headline, the iterations, the downtime in its parts."""
    parts: list[RenderableType] = [Text(headline(record), style=_style(record))]
    if record.error:
        parts.append(Text(record.error))
    report = record.report
    if report.iterations:
        parts += [Text(""), _iterations_table(record)]
    if report.downtime.total_ms:
        parts += [Text(""), _downtime_table(report.downtime)]
    if report.paging is not None:
        parts += [Text(""), _paging_table(report.paging)]
        parts += [Text(words) for words in paging_in_words(report.paging)]
        if record.options.verify and record.outcome is Outcome.COMPLETED:
            parts.append(Text(_verdict_of_verify(report.paging)))
    if report.wire_bytes:
        sent = f"{bytes_in_words(report.wire_bytes)} sent for {bytes_in_words(report.ram_bytes)} of RAM"
        if report.state_bytes:
            sent += f", {bytes_in_words(report.state_bytes)} of it device state"
        parts += [Text(""), Text(sent)]
    if report.order:
        parts.append(Text(f"order of transfer: {report.order}"))
    if report.switch_reason:
        parts.append(Text(f"switched because {report.switch_reason}"))
    parts.append(Text(f"VM {record.vm} runs at: {record.runs_at or 'unknown'}"))
    return Group(*parts)


def headline(record: Migration) -> str:
    """One sentence: who moved, or did not, and for how long nothing ran."""
    destination = record.destination or "another host"
    way = f"VM {record.vm} from {record.source} to {destination} (migration {record.id})"
    if record.outcome is Outcome.RUNNING and record.phase is Phase.QUEUED:
        return f"queued behind {record.behind}: {way}"
    if record.outcome is Outcome.RUNNING:
        return f"moving {way}: {record.phase.value}"
    if record.outcome is not Outcome.COMPLETED:
        return f"{record.outcome.value}: {way}"
    total = ms_in_words(record.report.total_ms)
    downtime = ms_in_words(record.report.downtime.total_ms)
    engine = f"by the {record.options.engine.value} engine"
    return f"moved {way} {engine} in {total}, with {downtime} of downtime"


def queued_in_words(record: Migration, earlier: Migration | None) -> str:
    """What a queued migration waits for. `earlier` is the one it is behind, None when that is not known."""
    words = f"migration {record.id} is queued behind {record.behind}"
    if earlier is None or earlier.outcome is not Outcome.RUNNING:
        return words
    pages = owed_pages(earlier)
    return words if pages is None else f"{words}, which still owes {pages:,} pages"


def owed_pages(record: Migration) -> int | None:
    """How many pages a migration in its phase `paging` has still to send; None when it has not said."""
    if record.progress is not None and record.progress.remaining_bytes is not None:
        return record.progress.remaining_bytes // PAGE_BYTES
    return None if record.report.paging is None else record.report.paging.owed_pages


def dry_run_report(answer: DryRun) -> Group:
    """What a migration would meet."""
    where = answer.destination or "another host"
    parts: list[RenderableType] = []
    if answer.reasons:
        parts.append(Text(f"VM {answer.vm} cannot move from {answer.source} to {where}:", style="red"))
        parts += [Text(f"  - {reason}") for reason in answer.reasons]
    else:
        parts.append(Text(f"VM {answer.vm} can move from {answer.source} to {where}", style="green"))
    if answer.behind:
        parts.append(Text(f"asked for now, it would be queued behind {answer.behind}, and checked then"))
    if answer.wire_bytes is not None and answer.total_ms is not None and answer.downtime_ms is not None:
        parts.append(
            Text(
                f"predicted: {bytes_in_words(answer.wire_bytes)} in {ms_in_words(answer.total_ms)}, "
                f"{ms_in_words(answer.downtime_ms)} of downtime"
            )
        )
    if answer.verdict:
        parts.append(Text(answer.verdict))
    return Group(*parts)


def _iterations_table(record: Migration) -> Table:
    table = plain_table("ITERATION", "PAGES", "ZERO PAGES", "SENT", "TIME", "RATE", "DIRTY AFTER", right=True)
    for iteration in record.report.iterations:
        seconds = iteration.duration_ms / 1000
        rate = f"{bytes_in_words(iteration.wire_bytes / seconds)}/s" if seconds > 0 else "-"
        table.add_row(
            f"{iteration.index}{' (suspended)' if iteration.suspended else ''}",
            f"{iteration.pages}",
            f"{iteration.zero_pages}",
            bytes_in_words(iteration.wire_bytes),
            ms_in_words(iteration.duration_ms),
            rate,
            f"{iteration.dirty_pages_after}",
        )
    return table


def _downtime_table(downtime: DowntimeReport) -> Table:
    parts = [(label, getattr(downtime, field)) for label, field in _DOWNTIME_PARTS]
    shown = [(label, duration_ms) for label, duration_ms in parts if duration_ms or label != "verify"]
    table = plain_table("DOWNTIME", *(label for label, _ in shown), right=True)
    table.add_row(ms_in_words(downtime.total_ms), *(ms_in_words(duration_ms) for _, duration_ms in shown))
    return table


def _paging_table(paging: PagingReport) -> Table:
    table = plain_table(
        "OWED PAGES",
        "ON DEMAND",
        "PUSHED",
        "FAULTS",
        "P50",
        "P99",
        "LONGEST",
        "WAITED",
        "NEEDED SOURCE",
        right=True,
    )
    table.add_row(
        f"{paging.owed_pages}",
        f"{paging.fetched_pages}",
        f"{paging.pushed_pages}",
        f"{paging.faults}",
        ms_in_words(paging.fault_p50_us / 1000),
        ms_in_words(paging.fault_p99_us / 1000),
        ms_in_words(paging.fault_max_us / 1000),
        ms_in_words(paging.waited_ms),
        ms_in_words(paging.residual_ms),
    )
    return table


def paging_in_words(paging: PagingReport) -> list[str]:
    """What was not as usual while pages were owed: lost links, pages that came twice, a safe copy."""
    words = []
    if paging.link_losses:
        lost = "once" if paging.link_losses == 1 else f"{paging.link_losses} times"
        waited = "nobody waited for it"
        if paging.interrupted_faults:
            waited = f"{paging.interrupted_faults} faults waited {ms_in_words(paging.interrupted_ms)} for it"
        path = f"; it came back by {paging.path}" if paging.path else ""
        words.append(f"the link was lost {lost}, for {ms_in_words(paging.link_lost_ms)}; {waited}{path}")
    if paging.sent_twice_bytes:
        words.append(f"{bytes_in_words(paging.sent_twice_bytes)} came twice, on demand and by the push")
    if paging.safe_copy_ms is not None:
        words.append(
            f"the safe copy had all {paging.safe_copy_pages} pages {ms_in_words(paging.safe_copy_ms)} "
            "after the resume"
        )
    if paging.safe_copy_error:
        words.append(f"there was no safe copy: {paging.safe_copy_error}")
    if paging.restored_pages:
        words.append(f"{paging.restored_pages} pages came from the safe copy, not from the source")
    return words


def _verdict_of_verify(paging: PagingReport) -> str:
    if not paging.verified_pages:
        return "NOT VERIFIED: the source was lost before the memory could be compared"
    return (
        f"{paging.verified_pages} pages are equal at both hosts; {paging.written_pages} were written at the "
        "destination before they could be compared"
    )


def _style(record: Migration) -> str:
    if record.outcome is Outcome.COMPLETED and not record.error:
        return "green"
    return {Outcome.RUNNING: "", Outcome.CANCELLED: "yellow"}.get(record.outcome, "red")
