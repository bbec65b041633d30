"""The guest, made and booted."""

from __future__ import annotations

import contextlib
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from transhume.demo.guest.build import Guest, Workload, ensure_guest, shell_arguments
from transhume.demo.observer import Observer
from transhume.demo.serial_log import Timeline
from transhume.model.errors import Refused

BOOT_LIMIT_S = 60


@contextlib.contextmanager
def booted(
    guest: Guest, append: str, log: Path, options: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A guest with its console on our pipe and in `log`."""
    machine = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128"]
    boot = ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", append]
    console = ["-chardev", f"stdio,id=console,logfile={log},signal=off", "-serial", "chardev:console"]
    quiet = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    log.touch()
    process = subprocess.Popen(
        [*machine, *quiet, *boot, *console, *options], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def test_the_second_time_nothing_is_made(guest: Guest) -> None:
    before = guest.initrd.stat()
    assert ensure_guest() == guest
    assert guest.initrd.stat().st_mtime_ns == before.st_mtime_ns


def test_everyone_may_read_it(guest: Guest) -> None:
    for path in (guest.kernel, guest.initrd):
        assert path.stat().st_mode & stat.S_IROTH
        assert all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)


def test_a_cache_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(Refused, match="cannot be used"):
        ensure_guest(occupied)


def test_workload_words() -> None:
    arguments = Workload(memory_mib=32, rate_pages_s=100, spoil_page=3).arguments().split()
    assert {"workload.memory_mib=32", "workload.rate_pages_s=100", "workload.spoil_page=3"} <= set(arguments)
    assert not any("spoil" in word for word in Workload().arguments().split())


def test_the_workload_runs_on_every_cpu_and_beats(guest: Guest, tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    workload = Workload(memory_mib=16, rate_pages_s=1000, spoil_page=4000)
    with booted(guest, workload.arguments(), log, ["-smp", "2"]), Observer([log]) as observer:
        assert observer.wait_until_ready(BOOT_LIMIT_S) == 4096
        observer.wait_for_full_verification(BOOT_LIMIT_S)
        assert [event.page for event in observer.ask(Timeline.corruptions)] == [4000]
        last = observer.ask(Timeline.ticks)[-1]
        assert last.writes > 0
        assert observer.ask(lambda timeline: len(timeline.beats_s)) > 0


def test_a_disk_is_found(guest: Guest, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    log = tmp_path / "serial.log"
    drive = ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
    with booted(guest, shell_arguments(), log, drive) as qemu:
        assert qemu.stdin is not None
        wait_for_prompt(qemu, log)
        qemu.stdin.write(b"cat /sys/block/vda/size; poweroff -f\n")
        qemu.stdin.flush()
        qemu.wait(BOOT_LIMIT_S)
    assert "\n2048" in log.read_text()


@pytest.mark.parametrize("append", [shell_arguments(), Workload(memory_mib=1).arguments()])
def test_the_power_button_turns_it_off(guest: Guest, tmp_path: Path, append: str) -> None:
    monitor = tmp_path / "monitor"
    options = ["-monitor", f"unix:{monitor},server=on,wait=off"]
    with booted(guest, append, tmp_path / "serial.log", options) as qemu:
        deadline_s = time.monotonic() + BOOT_LIMIT_S
        # While the guest boots nobody listens to the button yet.
        while qemu.poll() is None and time.monotonic() < deadline_s:
            press_power_button(monitor)
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(0.5)
        assert qemu.returncode == 0


def wait_for_prompt(qemu: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + BOOT_LIMIT_S
    while b"/ # " not in log.read_bytes():
        assert time.monotonic() < deadline_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            qemu.wait(0.1)
            pytest.fail("the guest ended before it gave a prompt")


def press_power_button(monitor: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(str(monitor))
        connection.sendall(b"system_powerdown\n")
        connection.recv(4096)
