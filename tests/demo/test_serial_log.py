"""What the observer makes of a console's bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transhume.demo.serial_log import (
    LINE_BYTES_MAX,
    Corrupt,
    Event,
    Ready,
    SerialParser,
    Tick,
    Timeline,
    Trouble,
    longest_gap_s,
)

CONSOLE = (
    b"[    2.1] Run /init as init process...\r\n\r\nready pages=2048\r\n....\r\n"
    b"tick seconds=1 writes=200 verified=16400 corrupt=0 gap_us=731 memory_mib=200\r\n..\r\n"
    b"CORRUPT page=17 expected=00ff found=00fe\r\n."
)


def parse(*pieces: bytes) -> tuple[int, list[Event]]:
    parser = SerialParser()
    dots = 0
    events: list[Event] = []
    for number, piece in enumerate(pieces):
        more_dots, more_events = parser.feed(piece, float(number))
        dots += more_dots
        events += more_events
    return dots, events


def test_dots_and_lines_are_told_apart() -> None:
    dots, events = parse(CONSOLE)
    assert dots == 7
    assert events == [
        Ready(0.0, 2048),
        Tick(0.0, 1, 200, 16400, 0, 731, 200),
        Corrupt(0.0, 17, "00ff", "00fe"),
    ]


@given(st.lists(st.integers(0, len(CONSOLE))))
def test_it_does_not_matter_in_which_pieces_the_bytes_come(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CONSOLE)]
    pieces = [CONSOLE[start:end] for start, end in pairwise(edges)]
    dots, events = parse(*pieces)
    assert dots == 7
    assert [type(event) for event in events] == [Ready, Tick, Corrupt]


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_no_bytes_make_it_fail(pieces: list[bytes]) -> None:
    parse(*pieces)


def test_the_event_has_the_time_of_its_last_byte() -> None:
    _, events = parse(b"ready pa", b"ges=1", b"\n")
    assert events == [Ready(2.0, 1)]


def test_damage_that_is_badly_told_is_still_damage() -> None:
    _, events = parse(b"CORRUPT page=1\n")
    assert isinstance(events[0], Corrupt)


def test_a_torn_tick_is_left_out() -> None:
    assert parse(b"tick seconds=1 wri\n") == (0, [])


@pytest.mark.parametrize(
    "line", [b"failed reason=cannot map 5 bytes\n", b"[ 9.1] Kernel panic - not syncing\n"]
)
def test_a_guest_that_gives_up_is_noticed(line: bytes) -> None:
    _, events = parse(line)
    assert events == [Trouble(0.0, line.decode().strip())]


def test_a_line_without_end_takes_no_more_memory() -> None:
    parser = SerialParser()
    for _ in range(100):
        parser.feed(b"x" * 1000, 0.0)
    _, events = parser.feed(b"\nready pages=1\n", 0.0)
    assert events == [Ready(0.0, 1)]
    assert LINE_BYTES_MAX < 100 * 1000


def test_the_longest_gap_lies_between_dots_or_at_an_edge() -> None:
    beats = [1.0, 1.5, 4.0, 4.1]
    assert longest_gap_s(beats, 1.0, 4.1) == 2.5
    assert longest_gap_s(beats, 1.0, 9.1) == pytest.approx(5.0)
    assert longest_gap_s(beats, -3.0, 4.1) == 4.0
    assert longest_gap_s(beats, 2.0, 3.0) == 1.0
    assert longest_gap_s(beats, 3.0, 3.0) == 0.0
    assert longest_gap_s([], 0.0, 2.0) == 2.0


@given(st.lists(st.floats(0, 100)), st.floats(0, 100), st.floats(0, 100))
def test_a_gap_is_never_longer_than_its_window(beats: list[float], start: float, length: float) -> None:
    gap = longest_gap_s(sorted(beats), start, start + length)
    assert 0.0 <= gap <= (start + length) - start


def test_pages_are_counted_beyond_the_lines_that_were_printed() -> None:
    timeline = Timeline(events=[Corrupt(1.0, 5, "a", "b"), Tick(2.0, 1, 0, 0, 900, 0, 200)])
    assert timeline.corrupt_pages() == 900
    assert Timeline(events=[Corrupt(1.0, 5, "a", "b")]).corrupt_pages() == 1
    assert Timeline().corrupt_pages() == 0
