"""What a person sees: the line that is rewritten, the report, and what is read off the command line."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from transhume.cli.farm_commands import split_address
from transhume.cli.migration_tables import (
    dry_run_report,
    migration_report,
    paging_in_words,
    queued_in_words,
)
from transhume.cli.progress_line import bar, progress_line
from transhume.cli.tables import bytes_in_words, ms_in_words
from transhume.cli.vm_commands import parse_disk
from transhume.host.config import DEFAULT_PORT
from transhume.model.errors import Refused
from transhume.model.migration import (
    DowntimeReport,
    DryRun,
    IterationReport,
    Migration,
    MigrationOptions,
    MigrationReport,
    Mode,
    Outcome,
    PagingReport,
    Phase,
    Progress,
)
from transhume.model.vm import Disk

VERDICT = "dirtying 210 MB/s, faster than the link's 118 MB/s: will switch at 14:03:10 with about 900 ms"
PROGRESS = Progress(
    migration="m1",
    vm="web",
    phase=Phase.PRECOPY,
    elapsed_s=3.0,
    fraction=0.62,
    iteration=3,
    wire_bytes=1_234_000_000,
    rate_bytes_s=118e6,
    dirty_rate_bytes_s=210e6,
    remaining_bytes=100,
    eta_s=12.4,
    predicted_downtime_ms=900.0,
    verdict=VERDICT,
)
RECORD = Migration(
    id="m1", vm="web", source="alpha", destination="beta", epoch=1, phase=Phase.PRECOPY, progress=PROGRESS
)


def test_the_line_says_everything_when_there_is_room() -> None:
    assert progress_line(RECORD, 300) == (
        "web ━━━━━━━━━━━━────────  62%  pre-copy 3  1.23 GB  118 MB/s  dirty 210 MB/s  ETA 12 s  "
        f"downtime ~900 ms  {VERDICT}"
    )


@settings(deadline=None)
@given(width=st.integers(1, 400), fraction=st.floats(0, 1), phase=st.sampled_from(list(Phase)))
def test_the_line_is_one_line_that_fits(width: int, fraction: float, phase: Phase) -> None:
    record = RECORD.model_copy(
        update={"phase": phase, "progress": PROGRESS.model_copy(update={"fraction": fraction})}
    )
    line = progress_line(record, width)
    assert len(line) <= width
    assert "\n" not in line


def test_without_progress_the_line_names_the_phase() -> None:
    record = RECORD.model_copy(update={"progress": None, "phase": Phase.REQUESTED})
    assert progress_line(record, 80) == "web ────────   0% requested"


def test_the_bar() -> None:
    assert (bar(0.0, 4), bar(0.5, 4), bar(0.99, 4), bar(1.0, 4), bar(7.0, 4)) == (
        "────",
        "━━──",
        "━━━─",
        "━━━━",
        "━━━━",
    )


def printed(content: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=200, highlight=False).print(content)
    return file.getvalue()


def test_the_report_of_a_move() -> None:
    report = MigrationReport(
        iterations=(
            IterationReport(
                index=0,
                pages=50220,
                zero_pages=3269,
                wire_bytes=206_000_000,
                duration_ms=554.0,
                dirty_pages_after=175,
            ),
            IterationReport(
                index=1,
                pages=180,
                zero_pages=0,
                wire_bytes=739_000,
                duration_ms=3.1,
                dirty_pages_after=0,
                suspended=True,
            ),
        ),
        downtime=DowntimeReport(stop_ms=7.5, last_pages_ms=4.4, total_ms=35.6),
        wire_bytes=207_000_000,
        ram_bytes=268_000_000,
        state_bytes=264_000,
        total_ms=696.0,
        switch_reason="the predicted downtime is within the limit",
    )
    text = printed(
        migration_report(
            RECORD.model_copy(
                update={
                    "outcome": Outcome.COMPLETED,
                    "report": report,
                    "runs_at": "destination host beta",
                }
            )
        )
    )
    for words in (
        "moved VM web from alpha to beta (migration m1) by the transhume engine in 696 ms, with 35.6 ms",
        "1 (suspended)",
        "372 MB/s",
        "7.5 ms",
        "207 MB sent for 268 MB of RAM, 264 kB of it device state",
        "VM web runs at: destination host beta",
    ):
        assert words in text
    assert "verify" not in text


@pytest.mark.parametrize(
    ("verified_pages", "words"),
    [
        (12_000, "12000 pages are equal at both hosts; 288 were written at the destination"),
        (0, "NOT VERIFIED: "),
    ],
)
def test_what_was_verified_after_the_resume_is_told_and_what_was_not(verified_pages: int, words: str) -> None:
    report = MigrationReport(
        paging=PagingReport(owed_pages=9, verified_pages=verified_pages, written_pages=288)
    )
    record = RECORD.model_copy(update={"outcome": Outcome.COMPLETED, "report": report})
    assert "at both hosts" not in printed(migration_report(record))
    assert "VERIFIED" not in printed(migration_report(record))
    options = MigrationOptions(mode=Mode.POST_COPY, verify=True)
    assert words in printed(migration_report(record.model_copy(update={"options": options})))


def test_what_was_not_as_usual_while_pages_were_owed_is_told() -> None:
    assert paging_in_words(PagingReport(owed_pages=9, faults=3)) == []
    assert paging_in_words(
        PagingReport(
            link_losses=2,
            link_lost_ms=3100,
            interrupted_faults=4,
            interrupted_ms=7000,
            path="10.78.0.2",
            sent_twice_bytes=8192,
            safe_copy_error="the folder is full",
            restored_pages=77,
        )
    ) == [
        "the link was lost 2 times, for 3.1 s; 4 faults waited 7.0 s for it; it came back by 10.78.0.2",
        "8.19 kB came twice, on demand and by the push",
        "there was no safe copy: the folder is full",
        "77 pages came from the safe copy, not from the source",
    ]
    assert paging_in_words(PagingReport(safe_copy_ms=420, safe_copy_pages=1200)) == [
        "the safe copy had all 1200 pages 420 ms after the resume"
    ]
    assert paging_in_words(PagingReport(link_losses=1, link_lost_ms=12)) == [
        "the link was lost once, for 12.0 ms; nobody waited for it"
    ]


def test_the_report_of_a_failure_says_why_and_where() -> None:
    text = printed(
        migration_report(
            RECORD.model_copy(
                update={
                    "outcome": Outcome.FAILED,
                    "error": "the link broke. VM web runs on source host alpha, where it was",
                    "runs_at": "source host alpha",
                }
            )
        )
    )
    assert text.splitlines() == [
        "failed: VM web from alpha to beta (migration m1)",
        "the link broke. VM web runs on source host alpha, where it was",
        "VM web runs at: source host alpha",
    ]


def test_a_queued_migration_says_what_it_waits_for() -> None:
    queued = RECORD.model_copy(
        update={"id": "m2", "phase": Phase.QUEUED, "behind": "m1", "destination": "", "progress": None}
    )
    assert printed(migration_report(queued)).startswith(
        "queued behind m1: VM web from alpha to another host (migration m2)"
    )
    owing = RECORD.model_copy(update={"phase": Phase.PAGING, "progress": None})
    report = MigrationReport(paging=PagingReport(owed_pages=4_321))
    words = "migration m2 is queued behind m1"
    assert queued_in_words(queued, None) == words
    assert queued_in_words(queued, owing) == words
    told = owing.model_copy(update={"report": report})
    assert queued_in_words(queued, told) == f"{words}, which still owes 4,321 pages"
    assert queued_in_words(queued, told.model_copy(update={"outcome": Outcome.COMPLETED})) == words


def test_a_dry_run_with_reasons_names_each() -> None:
    text = printed(
        dry_run_report(DryRun(vm="web", source="alpha", destination="beta", reasons=("one", "two")))
    )
    assert text.splitlines() == ["VM web cannot move from alpha to beta:", "  - one", "  - two"]


def test_a_dry_run_of_a_vm_that_lacks_pages_says_what_it_would_wait_for() -> None:
    text = printed(dry_run_report(DryRun(vm="web", source="beta", destination="gamma", behind="m1")))
    assert text.splitlines() == [
        "VM web can move from beta to gamma",
        "asked for now, it would be queued behind m1, and checked then",
    ]


def test_words_for_numbers() -> None:
    assert [bytes_in_words(n) for n in (0, 999, 1500, 118e6, 1.234e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "118 MB",
        "1.23 GB",
        "5 TB",
    ]
    assert [ms_in_words(n) for n in (3.14, 250.0, 61_000.0)] == ["3.1 ms", "250 ms", "61.0 s"]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("10.0.0.1", ("10.0.0.1", DEFAULT_PORT)),
        ("10.0.0.1:99", ("10.0.0.1", 99)),
        ("alpha.example", ("alpha.example", DEFAULT_PORT)),
        ("[fd00::1]:99", ("fd00::1", 99)),
        ("[fd00::1]", ("fd00::1", DEFAULT_PORT)),
        ("fd00::1", ("fd00::1", DEFAULT_PORT)),
    ],
)
def test_addresses(text: str, target: tuple[str, int]) -> None:
    assert split_address(text) == target


@pytest.mark.parametrize("text", ["", "a b", "10.0.0.1:0", "10.0.0.1:70000", "10.0.0.1:x", "[fd00::1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        split_address(text)


def test_disks() -> None:
    assert parse_disk("/a.raw") == Disk(path="/a.raw")
    assert parse_disk("/b.qcow2,format=qcow2,cache=direct,readonly") == Disk(
        path="/b.qcow2", format="qcow2", cache_direct=True, read_only=True
    )
    for text in ("", "/a,format=vmdk", "/a,cache=none", "/a,"):
        with pytest.raises(Refused):
            parse_disk(text)
