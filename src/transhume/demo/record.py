"""What one migration of the demo came to: a line of its table and of its JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from transhume.model.migration import Migration, Mode, Outcome


@dataclass(frozen=True)
class DemoRecord:
    """`mode` is the order of transfer; behind a slash when the last pages travelled, if that was asked for.

    `downtime_ms` is what the engine measured, `guest_gap_ms` what an observer outside the VM saw.

    `corrupt_pages` were found wrong by the guest, which verified all its pages after the migration;
    `vm_runs_on` is the owner in the farm's register.
    """

    engine: str
    mode: str
    outcome: str
    total_ms: float
    downtime_ms: float
    guest_gap_ms: float
    wire_bytes: int
    ram_bytes: int
    iterations: int
    corrupt_pages: int
    vm_runs_on: str

    @property
    def went_well(self) -> bool:
        return self.outcome == Outcome.COMPLETED and self.corrupt_pages == 0


def record_of(migration: Migration, guest_gap_ms: float, corrupt_pages: int, vm_runs_on: str) -> DemoRecord:
    report = migration.report
    return DemoRecord(
        engine=migration.options.engine.value,
        mode=_mode(migration),
        outcome=migration.outcome.value,
        total_ms=round(report.total_ms, 1),
        downtime_ms=round(report.downtime.total_ms, 1),
        guest_gap_ms=round(guest_gap_ms, 1),
        wire_bytes=report.wire_bytes,
        ram_bytes=report.ram_bytes,
        iterations=len(report.iterations),
        corrupt_pages=corrupt_pages,
        vm_runs_on=vm_runs_on,
    )


def _mode(migration: Migration) -> str:
    """Which order it was; what the engine chose by itself is told by what came of it."""
    options = migration.options
    if options.mode is Mode.AUTO:
        return Mode.PRE_COPY.value if migration.report.paging is None else Mode.HYBRID.value
    return options.mode.value if options.rest is None else f"{options.mode.value}/{options.rest.value}"


def write_json(path: Path, records: Sequence[DemoRecord]) -> None:
    path.write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n")


def table_of(records: Sequence[DemoRecord]) -> Table:
    """The records for a person, narrow enough for a terminal of 80 columns."""
    title = "One running VM, moved there and back by each engine and in each order"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("engine", "mode", "now on"):
        table.add_column(name, no_wrap=True)
    for measure in ("total\ns", "downtime\nms", "gap\nms", "sent\nMB", "passes\n", "wrong\npages"):
        table.add_column(measure, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record.engine,
            record.mode.rpartition("/")[2] if record.outcome == Outcome.COMPLETED else record.outcome,
            record.vm_runs_on,
            f"{record.total_ms / 1000:.2f}",
            f"{record.downtime_ms:.1f}",
            f"{record.guest_gap_ms:.1f}",
            f"{record.wire_bytes / 1e6:.0f}",
            str(record.iterations),
            str(record.corrupt_pages),
            style=None if record.went_well else "bold red",
        )
    return table
