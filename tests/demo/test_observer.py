"""The observer on files that grow, appear and are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transhume.demo.observer import Observer
from transhume.demo.serial_log import Timeline
from transhume.model.errors import TimedOut, VmmError


def beats(count: int) -> Callable[[Timeline], bool]:
    return lambda timeline: len(timeline.beats_s) >= count


def append(path: Path, data: bytes) -> float:
    """Append and give the time just before."""
    before_s = time.monotonic()
    with path.open("ab") as log:
        log.write(data)
    return before_s


def test_what_is_written_is_seen_with_its_time(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"")
    with Observer([log]) as observer:
        written_s = append(log, b"ready pages=16\n.")
        observer.wait_for(beats(1), timeout_s=20)
        seen_s = observer.ask(lambda timeline: timeline.beats_s[0])
        assert written_s <= seen_s <= time.monotonic()
        assert observer.wait_until_ready(timeout_s=1) == 16


def test_a_guest_that_moves_in_the_middle_of_a_line_is_understood(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with Observer([here, there]) as observer:
        append(here, b".\ntick seconds=1 writes=5 ver")
        observer.wait_for(beats(1), timeout_s=20)
        append(there, b"ified=9 corrupt=0 gap_us=3 memory_mib=200\n.")
        observer.wait_for(beats(2), timeout_s=20)
        assert [tick.verified for tick in observer.ask(Timeline.ticks)] == [9]


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"..")
    with Observer([log]) as observer:
        observer.wait_for(beats(2), timeout_s=20)
        (tmp_path / "new").write_bytes(b"...")
        (tmp_path / "new").rename(log)
        observer.wait_for(beats(5), timeout_s=20)
        append(log, b".")
        observer.wait_for(beats(6), timeout_s=20)


def test_silence_is_measured_between_files(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with Observer([here, there]) as observer:
        append(here, b".")
        observer.wait_for(beats(1), timeout_s=20)
        append(there, b".")
        observer.wait_for(beats(2), timeout_s=20)
        first_s, second_s = observer.ask(lambda timeline: tuple(timeline.beats_s))
        assert observer.longest_silence_ms(first_s, second_s) == pytest.approx((second_s - first_s) * 1000)


def test_a_guest_in_trouble_ends_the_wait(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(b"failed reason=cannot map 5 bytes\n")
    with Observer([log]) as observer, pytest.raises(VmmError, match="cannot map"):
        observer.wait_until_ready(timeout_s=20)


def test_a_wait_has_its_limit(tmp_path: Path) -> None:
    with Observer([tmp_path / "never"]) as observer, pytest.raises(TimedOut):
        observer.wait_until_ready(timeout_s=0.05)


def test_full_verification_needs_more_than_what_was_counted_before(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    log.write_bytes(
        b"ready pages=10\ntick seconds=1 writes=0 verified=500 corrupt=0 gap_us=1 memory_mib=200\n."
    )
    with Observer([log]) as observer:
        observer.wait_for(beats(1), timeout_s=20)
        with pytest.raises(TimedOut):
            observer.wait_for_full_verification(timeout_s=0.05)
