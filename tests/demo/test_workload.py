"""The guest's workload, run as an ordinary program: it takes its parameters as arguments then."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from transhume.demo.guest.build import compile_program
from transhume.demo.serial_log import Event, SerialParser, Tick, Timeline, Trouble


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("workload") / "workload"
    compile_program("workload", program)
    return program


def events_of(program: Path, *words: str) -> Iterator[Event | int]:
    """Run the workload and give its events, with the number of dots so far in between."""
    parser = SerialParser()
    with subprocess.Popen([program, *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            while data := process.stdout.read1(4096):  # type: ignore[attr-defined]
                dots, events = parser.feed(data, 0.0)
                yield from events
                yield dots
        finally:
            process.kill()


def run_for(program: Path, seconds: int, *words: str) -> tuple[Timeline, int]:
    """What the workload says until its tick number `seconds`, and how many dots came."""
    timeline, dots = Timeline(), 0
    for event in events_of(program, *words):
        if isinstance(event, int):
            dots += event
            continue
        timeline.events.append(event)
        if isinstance(event, Tick) and event.seconds >= seconds:
            break
    return timeline, dots


def test_it_fills_beats_rewrites_and_verifies(workload: Path) -> None:
    words = ("workload.memory_mib=8", "workload.rate_pages_s=500", "workload.verify_pages_s=8192")
    timeline, dots = run_for(workload, 2, *words)
    ready = timeline.ready()
    assert ready is not None
    assert ready.pages == 2048
    last = timeline.ticks()[-1]
    assert 0 < last.writes <= 1200
    assert 0 < last.verified <= 20000
    assert last.corrupt == 0
    assert 0 < dots <= 1100


def test_an_idle_one_rewrites_nothing(workload: Path) -> None:
    timeline, _ = run_for(workload, 1, "workload.memory_mib=1")
    assert timeline.ticks()[-1].writes == 0


def test_verification_can_be_switched_off(workload: Path) -> None:
    timeline, _ = run_for(workload, 1, "workload.memory_mib=1", "workload.verify=0")
    assert timeline.ticks()[-1].verified == 0


def test_a_spoilt_page_is_seen_once(workload: Path) -> None:
    timeline, _ = run_for(workload, 2, "workload.memory_mib=1", "workload.spoil_page=200")
    assert [event.page for event in timeline.corruptions()] == [200]
    assert timeline.corrupt_pages() == 1


def test_too_much_memory_is_refused_in_words(workload: Path) -> None:
    events = [event for event in events_of(workload, "workload.memory_mib=8000000") if event]
    assert len(events) == 1
    assert isinstance(events[0], Trouble)
    assert "workload.memory_mib" in events[0].words
