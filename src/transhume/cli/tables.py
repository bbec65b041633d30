"""The farm as tables: hosts, VMs, migrations and the report of one. Nothing here asks or decides."""

from __future__ import annotations

import shutil
import time

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from transhume.cli.session import on_terminal
from transhume.farm.members import HostStatus
from transhume.model.host import HostState
from transhume.model.migration import DowntimeReport, DryRun, Migration, Outcome, PagingReport, Phase
from transhume.model.vm import PAGE_BYTES, Vm

_MIB = 1 << 20

_CERTIFICATE_SHORT_S = 9 * 86400
"""A host renews when ten days are left: with less it could not."""

_DOWNTIME_PARTS = (
    ("stop", "stop_ms"),
    ("last pages", "last_pages_ms"),
    ("verify", "verify_ms"),
    ("device state out", "state_out_ms"),
    ("load", "load_ms"),
    ("commit", "commit_ms"),
    ("resume", "resume_ms"),
)


def show(content: RenderableType) -> None:
    """Print on stdout; wide enough for a whole row where the output is not a terminal."""
    width = None if on_terminal() else max(200, shutil.get_terminal_size().columns)
    Console(width=width, highlight=False, soft_wrap=False).print(content)


def bytes_in_words(count: float) -> str:
    """Traffic and memory as people read them: decimal, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def ms_in_words(duration_ms: float) -> str:
    if duration_ms < 1000:
        return f"{duration_ms:.1f} ms" if duration_ms < 100 else f"{duration_ms:.0f} ms"
    return f"{duration_ms / 1000:.1f} s"


def hosts_table(hosts: list[HostStatus], now_s: float) -> Table:
    """`now_s`: a certificate that should have been renewed by then is told."""
    table = plain_table(
        "HOST", "STATE", "ADDRESS", "CPUS", "MEMORY FREE", "QEMU", "KERNEL", "KVM", "MOVES", "VMS"
    )
    for host in hosts:
        inventory = host.inventory
        up = "up" if host.state is HostState.ACTIVE else host.state.value
        seen = f"silent for {host.seen_ago_s:.0f} s" if host.silent else up
        short = _certificate_short(host, now_s)
        colour = "red" if host.silent or short else "green" if seen == "up" else "yellow"
        free = f"{inventory.memory_available_bytes // _MIB} of {inventory.memory_bytes // _MIB} MiB"
        table.add_row(
            host.name + ("*" if host.controller else ""),
            Text(seen + short, style=colour),
            f"{host.address}:{host.port}",
            str(inventory.cpus),
            free,
            inventory.qemu_version,
            inventory.kernel,
            "no" if inventory.kvm_obstacle else "yes",
            "by QEMU only" if inventory.tracking_obstacles else "yes",
            ", ".join(host.vms) or "-",
        )
    if hosts:
        table.caption = "* carries the controller"
        table.caption_justify = "left"
    return table


def _certificate_short(host: HostStatus, now_s: float) -> str:
    left_s = host.certificate_expires_at_s - now_s
    if host.certificate_expires_at_s == 0 or left_s > _CERTIFICATE_SHORT_S:
        return ""
    return f"; certificate ends in {left_s / 86400:.1f} days" if left_s > 0 else "; certificate has ended"


def vms_table(vms: list[Vm]) -> Table:
    table = plain_table("VM", "STATE", "HOST", "MEMORY", "CPUS", "ACCEL", "MIGRATION")
    for vm in vms:
        table.add_row(
            vm.spec.name,
            vm.state.value,
            vm.ownership.owner,
            f"{vm.spec.memory_bytes // _MIB} MiB",
            str(vm.spec.cpus),
            vm.spec.accel.value,
            " then ".join(filter(None, (vm.migration, vm.queued))) or "-",
        )
    return table


def vm_details(vm: Vm) -> Table:
    spec = vm.spec
    rows = {
        "VM": spec.name,
        "state": vm.state.value,
        "host": f"{vm.ownership.owner} (epoch {vm.ownership.epoch})",
        "memory": f"{spec.memory_bytes // _MIB} MiB in {spec.numa_nodes} block(s)",
        "cpus": str(spec.cpus),
        "machine": f"{spec.machine_type}, {spec.accel.value}, cpu {spec.cpu_model}",
        "kernel": spec.kernel,
        "initrd": spec.initrd,
        "append": spec.append,
        "disks": "\n".join(
            f"{disk.path} ({disk.format}{', cache.direct' if disk.cache_direct else ''}"
            f"{', read-only' if disk.read_only else ''})"
            for disk in spec.disks
        ),
        "display": spec.display.value,
        "migration": vm.migration,
        "queued": vm.queued,
        "labels": ", ".join(vm.labels),
        "reserve": "its share is kept for it while it is stopped" if vm.reserve else "",
        "created": clock(vm.created_at_s),
    }
    return _pairs({name: value for name, value in rows.items() if value})


def migrations_table(migrations: list[Migration]) -> Table:
    table = plain_table(
        "MIGRATION", "VM", "FROM", "TO", "ENGINE", "OUTCOME", "TOTAL", "DOWNTIME", "SENT", "RUNS AT", "WHEN"
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
        )
    return table


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


def clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s)) if at_s else "-"


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


def plain_table(*headings: str, right: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if right and number else "left")
    return table


def _pairs(rows: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
