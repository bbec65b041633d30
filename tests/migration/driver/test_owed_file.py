"""What a mover noted about owed pages is what its successor reads, or nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.migration.paging.guest import pages

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs
from transhume.migration.driver.owed_file import Listening, OwedFile
from transhume.model.errors import VmmError

RUNS = st.sets(st.integers(0, 300), max_size=30).map(lambda numbers: pages(*numbers))


def test_nothing_was_ever_owed(tmp_path: Path) -> None:
    assert OwedFile(tmp_path).read() is None
    assert OwedFile(tmp_path).read_listening() is None


@settings(max_examples=25, deadline=None)
@given(owed=st.lists(RUNS, max_size=12), before=st.lists(RUNS, max_size=3))
def test_a_successor_reads_what_was_written_last(
    tmp_path_factory: pytest.TempPathFactory, owed: list[Runs], before: list[Runs]
) -> None:
    folder = tmp_path_factory.mktemp("mover")
    OwedFile(folder).write(before)
    OwedFile(folder).write(owed)
    read = OwedFile(folder).read()
    assert read is not None
    assert [each.tolist() for each in read] == [each.tolist() for each in owed]
    assert all(each.dtype == np.int64 and each.shape[1] == 2 for each in read)


def test_a_large_vm(tmp_path: Path) -> None:
    scattered = page_runs.from_pages(np.arange(0, 400_000, 2, dtype=np.int64))
    OwedFile(tmp_path).write([scattered, page_runs.empty()])
    read = OwedFile(tmp_path).read()
    assert read is not None
    assert (read[0] == scattered).all()
    assert len(read[1]) == 0


def test_who_dies_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    OwedFile(tmp_path).write([pages(1, 2)])
    whole = (tmp_path / "owed.npz").read_bytes()
    (tmp_path / "owed.draft").write_bytes(whole[: len(whole) // 2])
    read = OwedFile(tmp_path).read()
    assert read is not None
    assert read[0].tolist() == [[1, 2]]
    OwedFile(tmp_path).write([pages(3)])
    read = OwedFile(tmp_path).read()
    assert read is not None
    assert read[0].tolist() == [[3, 1]]


def test_where_the_predecessor_listened(tmp_path: Path) -> None:
    OwedFile(tmp_path).write_listening(Listening(49152, b"\x00secret\xff", ("192.0.2.1",)))
    last = Listening(4000, b"\x00key\xff", ("192.0.2.1", "fd00::1"))
    OwedFile(tmp_path).write_listening(last)
    assert OwedFile(tmp_path).read_listening() == last
    noted = tmp_path / "listening.json"
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600  # it holds the key
    noted.write_text('{"port": 4000, "key": "6b6579"}')  # by a release that knew of one address
    assert OwedFile(tmp_path).read_listening() == Listening(4000, b"key", ())
    noted.write_text('{"port": 4')
    assert OwedFile(tmp_path).read_listening() is None


@pytest.mark.parametrize("data", [b"", b"garbage that is no zip", b"PK\x03\x04 short"])
def test_a_damaged_file_is_not_taken_for_nothing_owed(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "owed.npz").write_bytes(data)
    with pytest.raises(VmmError, match="is damaged"):
        OwedFile(tmp_path).read()
