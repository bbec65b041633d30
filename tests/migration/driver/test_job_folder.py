"""A mover's folder: the job in it is whole or not there, and never do two processes work in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from transhume.migration.driver.job import MoverFolder, MoverJob, Role
from transhume.model.migration import Engine, Migration, MigrationOptions
from transhume.model.orders import Prepared
from transhume.model.vm import Accel, RamBlock, VmSpec

JOB = MoverJob(
    role=Role.SOURCE,
    migration=Migration(
        id="m1",
        vm="web",
        source="alpha",
        destination="beta",
        epoch=3,
        options=MigrationOptions(engine=Engine.QEMU, bandwidth_bytes_s=1 << 20),
    ),
    spec=VmSpec(name="web", memory_bytes=32 << 20, cpus=2, accel=Accel.TCG),
    ram_blocks=(RamBlock(index=0, name="ram0", size_bytes=32 << 20),),
    state_dir=Path("/nowhere"),
    prepared=Prepared(address="192.0.2.2", port=4711, key="00" * 32),
    switchover_cost_s=0.03,
)

HOLD_LOCK = """
import sys
from pathlib import Path
from transhume.migration.driver.job import MoverFolder
assert MoverFolder(Path(sys.argv[1])).try_lock() is not None
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> MoverFolder:
    made = MoverFolder.of(tmp_path, "m1", Role.SOURCE)
    made.write_job(JOB)
    return made


@contextmanager
def holder(folder: MoverFolder) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the folder's lock."""
    command = [sys.executable, "-c", HOLD_LOCK, str(folder.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"locked\n"
            yield process
        finally:
            process.kill()


def test_the_job_comes_back_as_it_was(folder: MoverFolder) -> None:
    assert folder.read_job() == JOB


def test_the_folder_is_named_after_the_migration_and_the_end(folder: MoverFolder) -> None:
    assert folder.path.name == "m1-source"


def test_the_data_paths_key_is_for_root_alone(folder: MoverFolder) -> None:
    assert folder.path.stat().st_mode & 0o077 == 0
    assert folder.job_file.stat().st_mode & 0o077 == 0


def test_a_job_that_was_not_written_whole_is_no_job(tmp_path: Path) -> None:
    """A daemon that dies while it writes leaves a draft, which nobody takes for the job."""
    folder = MoverFolder.of(tmp_path, "m2", Role.DESTINATION)
    folder.path.mkdir()
    (folder.path / "job.draft").write_text(JOB.model_dump_json()[:40])
    assert not folder.job_file.exists()
    folder.write_job(JOB)
    assert folder.read_job() == JOB


def test_a_folder_has_one_mover(folder: MoverFolder) -> None:
    lock = folder.try_lock()
    assert lock is not None
    assert folder.try_lock() is None
    assert folder.mover_lives()
    os.close(lock)
    assert not folder.mover_lives()


def test_looking_does_not_take_the_lock(folder: MoverFolder) -> None:
    assert not folder.mover_lives()
    lock = folder.try_lock()
    assert lock is not None
    os.close(lock)


def test_another_process_is_kept_out_until_it_is_killed(folder: MoverFolder) -> None:
    with holder(folder) as other:
        assert folder.mover_lives()
        assert folder.try_lock() is None
        other.send_signal(signal.SIGKILL)
        other.wait()
        lock = folder.try_lock()
    assert lock is not None
    os.close(lock)


def test_a_program_that_the_mover_starts_does_not_hold_the_lock(folder: MoverFolder) -> None:
    """Or a QEMU would keep the folder locked after the mover's death."""
    lock = folder.try_lock()
    assert lock is not None
    with subprocess.Popen(["sleep", "60"], close_fds=False) as program:
        os.close(lock)
        try:
            assert not folder.mover_lives()
        finally:
            program.kill()
