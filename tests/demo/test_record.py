"""What the demo makes of a migration's record."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from transhume.demo.record import record_of, table_of, write_json
from transhume.model.migration import (
    DowntimeReport,
    Engine,
    IterationReport,
    Migration,
    MigrationOptions,
    MigrationReport,
    Outcome,
)


def pass_of(index: int) -> IterationReport:
    return IterationReport(
        index=index, pages=9, zero_pages=0, wire_bytes=9, duration_ms=1.0, dirty_pages_after=0
    )


MIGRATION = Migration(
    id="m1",
    vm="shepherd",
    source="alpha",
    destination="beta",
    epoch=1,
    options=MigrationOptions(engine=Engine.QEMU),
    outcome=Outcome.COMPLETED,
    report=MigrationReport(
        iterations=(pass_of(0), pass_of(1)),
        downtime=DowntimeReport(total_ms=12.34),
        wire_bytes=300_000_000,
        ram_bytes=512 << 20,
        total_ms=2345.67,
    ),
)
RECORD = record_of(MIGRATION, guest_gap_ms=15.55, corrupt_pages=0, vm_runs_on="beta")


def test_a_record_has_exactly_the_promised_fields(tmp_path: Path) -> None:
    write_json(tmp_path / "records.json", [RECORD])
    assert json.loads((tmp_path / "records.json").read_text()) == [
        {
            "engine": "qemu",
            "mode": "pre-copy",
            "outcome": "completed",
            "total_ms": 2345.7,
            "downtime_ms": 12.3,
            "guest_gap_ms": 15.6,
            "wire_bytes": 300_000_000,
            "ram_bytes": 512 << 20,
            "iterations": 2,
            "corrupt_pages": 0,
            "vm_runs_on": "beta",
        }
    ]


def test_only_a_completed_move_without_wrong_pages_went_well() -> None:
    assert RECORD.went_well
    assert not replace(RECORD, corrupt_pages=1).went_well
    assert not replace(RECORD, outcome="failed").went_well
    assert not replace(RECORD, outcome="cancelled").went_well


def test_the_table_shows_every_record_within_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    longest = replace(RECORD, engine="transhume", mode="pre-copy/after-state", corrupt_pages=7)
    console.print(table_of([RECORD, longest]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for word in ("qemu", "transhume", "beta", "pre-copy", "2.35", "12.3", "15.6", "300", " 7"):
        assert word in text
    assert "…" not in text
