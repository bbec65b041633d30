"""The yardsticks do what they measure: all bytes arrive, all written pages are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transhume.bench import loopback
from transhume.bench.lost_work import Pace
from transhume.bench.scan import tracked_process
from transhume.bench.stage import peak_resident_kib
from transhume.demo.lab import Lab
from transhume.demo.serial_log import Tick
from transhume.memory.kernel import tracking_obstacles
from transhume.model.errors import TranshumeError


@pytest.mark.parametrize("touched", [False, True])
def test_the_raw_rate_is_of_the_wire_between_the_hosts(touched: bool) -> None:
    with Lab() as lab:
        sender, receiver = lab.hosts
        assert loopback.measure(sender, receiver, 4 << 20, touched) > 0


def test_a_receiver_that_cannot_start_is_told() -> None:
    with Lab() as lab:
        sender, receiver = lab.hosts
        receiver.address = "192.0.2.1"  # not this host's
        with pytest.raises(TranshumeError):
            loopback.measure(sender, receiver, 4096, touched=False)


@pytest.mark.skipif(bool(tracking_obstacles()), reason=" ".join(tracking_obstacles()))
def test_a_scan_finds_every_page_that_was_written() -> None:
    pages = (8 << 20) // 4096
    with tracked_process(8 << 20) as process:
        for every_page in (1, 100, 512):
            took_ms, found = process.scan_ms(every_page)
            assert found == -(-pages // every_page)
            assert took_ms > 0


def test_the_memory_of_a_process_and_of_one_that_is_gone(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    pid_file.write_text(f"{os.getpid()}\n")
    assert peak_resident_kib(pid_file) > 10_000
    assert peak_resident_kib(tmp_path / "none") == 0


def _tick(at_s: float, work: int) -> Tick:
    return Tick(at_s=at_s, seconds=0, writes=work, verified=0, corrupt=0, gap_us=0, memory_mib=0)


def test_work_that_was_not_done_is_lost() -> None:
    pace = Pace(pages_s=1000.0)
    assert pace.lost_ms(_tick(10.0, 0), _tick(12.0, 1500)) == pytest.approx(500.0)
    assert pace.lost_ms(_tick(10.0, 0), _tick(12.0, 2500)) == 0.0
