"""Holding a process: never the wrong one, never a zombie."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.vmm.machines import until

from transhume.model.errors import TimedOut, VmmError
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import (
    QemuProcess,
    RunRecord,
    boot_id,
    find_running,
    forget,
    read_record,
    save_record,
    start_time_ticks,
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lasts until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def paths(root: Path) -> VmPaths:
    made = VmPaths(root / "vm")
    made.directory.mkdir()
    return made


def record_of(pid: int) -> RunRecord:
    started = start_time_ticks(pid)
    assert started is not None
    return RunRecord(pid=pid, start_time_ticks=started, boot_id=boot_id())


def test_a_process_is_found_again(paths: VmPaths, child: subprocess.Popen[bytes]) -> None:
    assert find_running(paths) is None
    save_record(paths, record_of(child.pid))
    found = find_running(paths)
    assert found is not None
    assert found.pid == child.pid
    assert found.alive
    found.close()
    assert [path.name for path in paths.directory.iterdir()] == ["run.json"]


@pytest.mark.parametrize("other", [{"boot_id": "another boot"}, {"start_time_ticks": 1}])
def test_a_number_used_again_is_not_our_process(
    paths: VmPaths, child: subprocess.Popen[bytes], other: dict[str, object]
) -> None:
    save_record(paths, record_of(child.pid).model_copy(update=other))
    assert find_running(paths) is None


async def test_a_zombie_is_dead(paths: VmPaths, child: subprocess.Popen[bytes]) -> None:
    record = record_of(child.pid)
    save_record(paths, record)
    child.kill()
    await until(lambda: start_time_ticks(child.pid) is None, "the child is a zombie")
    assert Path(f"/proc/{child.pid}").exists(), "nobody has reaped it yet"
    assert find_running(paths) is None
    assert not Path(f"/proc/{child.pid}").exists(), "and now it is reaped"


async def test_a_kill_waits_for_the_end_and_reaps(child: subprocess.Popen[bytes]) -> None:
    process = QemuProcess.open(record_of(child.pid))
    assert process is not None
    await asyncio.gather(process.kill(), process.wait(), process.wait())
    assert not process.alive
    assert not Path(f"/proc/{child.pid}").exists()
    await process.kill()
    process.close()
    process.close()


async def test_a_child_is_reaped_whoever_ends_it(child: subprocess.Popen[bytes]) -> None:
    process = QemuProcess.open(record_of(child.pid))
    assert process is not None
    process.reap_when_it_ends()
    process.close()
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: not Path(f"/proc/{child.pid}").exists(), "the child is reaped")


async def test_a_wait_has_a_limit(child: subprocess.Popen[bytes]) -> None:
    process = QemuProcess.open(record_of(child.pid))
    assert process is not None
    with pytest.raises(TimedOut, match="has not ended within"):
        await process.wait(timeout_s=0.01)
    assert process.alive
    process.close()


def test_a_record_that_qemu_could_have_made_is_not_trusted(
    paths: VmPaths, child: subprocess.Popen[bytes]
) -> None:
    save_record(paths, record_of(child.pid))
    os.chown(paths.run_file, 12345, 12345)
    with pytest.raises(VmmError, match="not written by this daemon"):
        read_record(paths)
    elsewhere = paths.directory / "elsewhere"
    paths.run_file.rename(elsewhere)
    paths.run_file.symlink_to(elsewhere)
    with pytest.raises(VmmError, match="cannot be read"):
        read_record(paths)


def test_a_damaged_record_is_told(paths: VmPaths) -> None:
    paths.run_file.write_text('{"pid": 1')
    with pytest.raises(VmmError, match="damaged"):
        find_running(paths)


def test_forgetting_leaves_the_logs(paths: VmPaths) -> None:
    for path in (paths.run_file, paths.qmp_socket, paths.serial_socket, paths.qemu_log, paths.serial_log):
        path.touch()
    forget(paths)
    forget(paths)
    assert sorted(path.name for path in paths.directory.iterdir()) == ["qemu.log", "serial.log"]
