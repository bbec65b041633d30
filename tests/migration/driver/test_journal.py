"""The journal tells a successor how far a mover came, whatever became of its last line."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from transhume.migration.driver.journal import ROOM_BYTES, Journal
from transhume.model.migration import Outcome, Phase
from transhume.model.orders import MigrationUpdate

DISK_BYTES = 1 << 20
LAST_WORD = MigrationUpdate(
    migration="m1",
    host="alpha",
    phase=Phase.ABORTED,
    outcome=Outcome.FAILED,
    runs_at="source host alpha",
    error="the link was lost",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
def small_disk(short_dir: Path) -> Iterator[Path]:
    """A disk that is easily filled."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(short_dir)], check=True)
    yield short_dir
    subprocess.run(["umount", str(short_dir)], check=True)


def noted(path: Path, *states: str) -> None:
    """What a mover leaves that dies after these states."""
    journal = Journal(path)
    for state in states:
        journal.state(state)
    journal.close()


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def test_a_folder_without_a_journal_tells_nothing(path: Path) -> None:
    journal = Journal(path)
    assert journal.last_state() is None
    assert journal.last_update() is None
    assert not path.exists()


def test_the_latest_state_counts(path: Path) -> None:
    noted(path, "starting", "connecting", "precopy")
    assert Journal(path).last_state() == "precopy"


def test_a_successor_adds_to_what_it_found(path: Path) -> None:
    noted(path, "starting", "state")
    noted(path, "resolving")
    assert Journal(path).last_state() == "resolving"
    assert len(path.read_text().splitlines()) == 3


def test_the_last_word_comes_back_as_it_was(path: Path) -> None:
    journal = Journal(path)
    journal.state("aborted")
    assert journal.last_update() is None
    journal.update(LAST_WORD)
    journal.close()
    assert Journal(path).last_update() == LAST_WORD
    assert Journal(path).last_state() == "aborted"


@pytest.mark.parametrize("kept_bytes", range(1, len(b'{"state": "precopy"}\n')))
def test_a_line_that_its_writer_did_not_end_is_no_state(path: Path, kept_bytes: int) -> None:
    """But a line that lacks only its end is whole: then the state was entered."""
    noted(path, "starting")
    line = b'{"state": "precopy"}\n'
    with path.open("ab") as file:
        file.write(line[:kept_bytes])
    whole = kept_bytes == len(line) - 1
    assert Journal(path).last_state() == ("precopy" if whole else "starting")


def test_a_half_line_does_not_swallow_the_successors_first_one(path: Path) -> None:
    noted(path, "starting", "state")
    os.truncate(path, path.stat().st_size - 5)
    noted(path, "resolving")
    assert Journal(path).last_state() == "resolving"


def test_a_closed_journal_opens_again(path: Path) -> None:
    journal = Journal(path)
    journal.state("starting")
    journal.close()
    journal.close()
    journal.state("connecting")
    journal.close()
    assert journal.last_state() == "connecting"


def test_only_root_may_read_it(path: Path) -> None:
    noted(path, "starting")
    assert path.stat().st_mode & 0o077 == 0


def test_a_full_disk_stops_no_mover_that_has_begun(small_disk: Path) -> None:
    """Nor its successor: both write into the room that was set aside."""
    path = small_disk / "journal.jsonl"
    first = Journal(path)
    first.state("starting")
    assert path.stat().st_blocks * 512 >= ROOM_BYTES
    fill(small_disk)
    for index in range(100):
        first.state(f"state-{index}")
    first.close()
    second = Journal(path)
    second.state("aborted")
    second.update(LAST_WORD)
    second.close()
    assert Journal(path).last_state() == "aborted"
    assert Journal(path).last_update() == LAST_WORD


def test_no_mover_begins_on_a_full_disk(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        Journal(small_disk / "journal.jsonl").state("starting")
