"""The thread that writes a safe copy: it begins once, goes on behind a predecessor, never after the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.migration.driver.safe_copying import SafeCopying
from transhume.model.migration import PagingReport
from transhume.model.vm import PAGE_BYTES

PAGES = 64
OWED = [page_runs.single(8, 16)]


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    fd = os.memfd_create("safe-copying-test")
    os.ftruncate(fd, PAGES * PAGE_BYTES)
    os.pwrite(fd, os.urandom(PAGES * PAGE_BYTES), 0)
    ram = GuestRam.of_fds([fd])
    yield ram
    ram.close()


def _copied(copying: SafeCopying, deadline_s: float = 10.0) -> int:
    """How many pages the copy holds, once it is complete."""
    until_s = time.monotonic() + deadline_s
    while copying.report(PagingReport()).safe_copy_ms is None:
        assert time.monotonic() < until_s, "the safe copy does not come to its end"
        time.sleep(0.001)
    return copying.report(PagingReport()).safe_copy_pages


def test_what_is_owed_is_copied_and_taken_away(tmp_path: Path, ram: GuestRam) -> None:
    path = tmp_path / "vm-m1.pages"
    copying = SafeCopying(path, "m1", print)
    copying.begin(ram, OWED)
    copying.begin(ram, [page_runs.single(0, PAGES)])
    assert _copied(copying) == 16
    assert copying.holds_all([PAGES])
    copying.remove()
    copying.close()
    assert not path.exists()


def test_a_successor_adds_what_its_predecessor_has_not_copied(tmp_path: Path, ram: GuestRam) -> None:
    path = tmp_path / "vm-m1.pages"
    first, second = SafeCopying(path, "m1", print), SafeCopying(path, "m1", print)
    first.begin(ram, OWED)
    _copied(first)
    first.close()
    second.begin(ram, [page_runs.single(8, 20)])
    assert _copied(second) == 20
    second.close()


def test_a_copy_that_was_taken_away_is_not_begun(tmp_path: Path, ram: GuestRam) -> None:
    """Late word that the VM runs comes while its memory is let go already."""
    copying = SafeCopying(tmp_path / "vm-m1.pages", "m1", print)
    copying.remove()
    copying.begin(ram, OWED)
    copying.close()
    assert list(tmp_path.iterdir()) == []
