"""The safe copy: what was written is read, what was torn is not, and a successor goes on."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration.transfer.safe_copy import Kind, SafeCopyReader, SafeCopyWriter
from transhume.model.errors import VmmError
from transhume.model.vm import PAGE_BYTES

PAGES = (700, 40)
NEVER = threading.Event()


@pytest.fixture
def ram() -> GuestRam:
    """Two blocks with pages that differ, every third of them zero."""
    rng = np.random.default_rng(7)
    fds = []
    for pages in PAGES:
        fd = os.memfd_create("safe-copy-test")
        os.ftruncate(fd, pages * PAGE_BYTES)
        content = rng.integers(1, 255, (pages, PAGE_BYTES), dtype=np.uint8)
        content[::3] = 0
        os.pwrite(fd, content.tobytes(), 0)
        fds.append(fd)
    return GuestRam.of_fds(fds)


@pytest.fixture(autouse=True)
def _closed(ram: GuestRam) -> object:
    yield
    ram.close()


def _page(ram: GuestRam, block: int, page: int) -> bytes:
    return os.pread(ram.blocks[block].fd, PAGE_BYTES, page * PAGE_BYTES)


def _read_all(path: Path) -> tuple[dict[tuple[int, int], bytes], bool]:
    reader = SafeCopyReader(path, "m1", PAGES)
    pages: dict[tuple[int, int], bytes] = {}
    try:
        for record in reader.records():
            for place, page in enumerate(page_runs.pages_of(record.runs).tolist()):
                start = place * PAGE_BYTES
                whole = bytes(reader.content[start : start + PAGE_BYTES])
                pages[record.block_index, page] = whole if record.kind is Kind.PAGES else bytes(PAGE_BYTES)
        return pages, reader.complete
    finally:
        reader.close()


def _write(path: Path, ram: GuestRam, what: list[tuple[int, Runs]], end: bool = False) -> None:
    writer = SafeCopyWriter(path, "m1", PAGES)
    try:
        for block, runs in what:
            assert writer.write(ram.blocks[block], runs, NEVER)
        if end:
            writer.end()
    finally:
        writer.close()


SOME = page_runs.from_bounds(np.array([3, 300, 690]), np.array([290, 310, 700]))
OTHERS = page_runs.from_bounds(np.array([0]), np.array([40]))


def test_what_was_written_is_read(tmp_path: Path, ram: GuestRam) -> None:
    path = tmp_path / "copy"
    _write(path, ram, [(0, SOME), (1, OTHERS)], end=True)
    pages, complete = _read_all(path)
    assert complete
    wanted = {(0, page) for page in page_runs.pages_of(SOME).tolist()} | {(1, page) for page in range(40)}
    assert set(pages) == wanted
    assert all(content == _page(ram, *where) for where, content in pages.items())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_successor_knows_what_was_copied_and_goes_on(tmp_path: Path, ram: GuestRam) -> None:
    path = tmp_path / "copy"
    _write(path, ram, [(0, SOME)])
    os.truncate(path, path.stat().st_size - 100)  # its writer died in the middle of a record
    writer = SafeCopyWriter(path, "m1", PAGES)
    copied = page_runs.page_count(writer.copied[0])
    assert 0 < copied < page_runs.page_count(SOME)
    assert writer.write(ram.blocks[0], page_runs.subtract(SOME, writer.copied[0]), NEVER)
    assert writer.write(ram.blocks[1], OTHERS, NEVER)
    writer.end()
    writer.close()
    pages, complete = _read_all(path)
    assert complete
    assert len(pages) == page_runs.page_count(SOME) + 40
    assert all(content == _page(ram, *where) for where, content in pages.items())
    again = SafeCopyWriter(path, "m1", PAGES)
    assert again.complete
    again.close()


def test_a_reader_sees_what_comes_later(tmp_path: Path, ram: GuestRam) -> None:
    path = tmp_path / "copy"
    writer = SafeCopyWriter(path, "m1", PAGES)
    reader = SafeCopyReader(path, "m1", PAGES)
    seen: list[tuple[object, bool]] = [([], False)]
    assert list(reader.records()) == []
    writer.write(ram.blocks[1], OTHERS, NEVER)
    came = list(reader.records())
    seen.append((came, reader.complete))
    assert sum(page_runs.page_count(record.runs) for record in came) == 40
    writer.end()
    assert [record.kind for record in reader.records()] == [Kind.END]
    assert [complete for _, complete in seen] == [False, False]
    assert reader.complete
    reader.close()
    writer.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_never_makes_a_wrong_page(
    tmp_path_factory: pytest.TempPathFactory, ram: GuestRam, where: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "copy"
    _write(path, ram, [(1, OTHERS), (0, SOME)], end=True)
    size = path.stat().st_size
    at = min(size - 1, int(where * size))
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))
    try:
        pages, complete = _read_all(path)
    except VmmError:
        return
    assert not complete
    assert all(content == _page(ram, *place) for place, content in pages.items())


def test_another_migrations_copy_is_refused(tmp_path: Path, ram: GuestRam) -> None:
    path = tmp_path / "copy"
    _write(path, ram, [(1, OTHERS)])
    with pytest.raises(VmmError, match="not the safe copy of migration m2"):
        SafeCopyReader(path, "m2", PAGES)
    with pytest.raises(VmmError, match="not the safe copy of migration m2"):
        SafeCopyWriter(path, "m2", PAGES)
    with pytest.raises(VmmError, match="cannot be read: No such file"):
        SafeCopyReader(tmp_path / "none", "m1", PAGES)
    with pytest.raises(VmmError, match="cannot be written: No such file"):
        SafeCopyWriter(tmp_path / "no" / "folder", "m1", PAGES)


def test_a_full_disk_is_told(ram: GuestRam) -> None:
    with pytest.raises(VmmError, match="cannot be written: No space left"):
        SafeCopyWriter(Path("/dev/full"), "m1", PAGES)


def test_it_stops_when_told(tmp_path: Path, ram: GuestRam) -> None:
    stop = threading.Event()
    stop.set()
    writer = SafeCopyWriter(tmp_path / "copy", "m1", PAGES)
    assert not writer.write(ram.blocks[0], SOME, stop)
    writer.close()
