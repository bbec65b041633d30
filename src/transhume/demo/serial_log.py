"""What the guest's workload says on its serial console, and when.

The console carries single dots (the heart beat) and lines (see `guest/workload.c`). A guest that was
suspended cannot know for how long, since its clocks stood still, so the gap is measured from the times at
which the dots arrived outside.

No I/O and no clock in here: bytes and their times come in.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LINE_BYTES_MAX = 4096
"""A line that is longer is cut: a guest must not fill our memory."""

_DOT = ord(".")
_WORD = re.compile(r"(\w+)=(-?[0-9a-f]+)")


@dataclass(frozen=True)
class Ready:
    """The workload has filled its memory."""

    at_s: float
    pages: int


@dataclass(frozen=True)
class Tick:
    """The workload's own account, once a second by the guest's clock; the counts are from its start."""

    at_s: float
    seconds: int
    writes: int
    verified: int
    corrupt: int
    gap_us: int
    memory_mib: int


@dataclass(frozen=True)
class Corrupt:
    """A page that differed from what had been written to it; page -1 is the table of all pages."""

    at_s: float
    page: int
    expected: str
    found: str


@dataclass(frozen=True)
class Trouble:
    """A line that tells that the workload cannot work: it refused to start, or the kernel gave up."""

    at_s: float
    words: str


Event = Ready | Tick | Corrupt | Trouble


@dataclass
class Timeline:
    """What was seen so far, on whichever host: the times of the dots in order, and the lines."""

    beats_s: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def ready(self) -> Ready | None:
        return next((event for event in self.events if isinstance(event, Ready)), None)

    def trouble(self) -> Trouble | None:
        return next((event for event in self.events if isinstance(event, Trouble)), None)

    def ticks(self) -> list[Tick]:
        return [event for event in self.events if isinstance(event, Tick)]

    def corruptions(self) -> list[Corrupt]:
        return [event for event in self.events if isinstance(event, Corrupt)]

    def corrupt_pages(self) -> int:
        """How many pages were found wrong; the count in the ticks goes on where the lines stop."""
        counted = max((tick.corrupt for tick in self.ticks()), default=0)
        return max(counted, len(self.corruptions()))

    def longest_silence_s(self, start_s: float, end_s: float) -> float:
        """The longest time without a dot between `start_s` and `end_s`.

        A silence that reaches over an edge counts as far as it lies inside, so a guest that never speaks
        again is silent until `end_s`.
        """
        return longest_gap_s(self.beats_s, start_s, end_s)


def longest_gap_s(beats_s: Sequence[float], start_s: float, end_s: float) -> float:
    """The longest stretch of [start_s, end_s] that holds none of the sorted times `beats_s`."""
    if end_s <= start_s:
        return 0.0
    inside = beats_s[bisect_left(beats_s, start_s) : bisect_right(beats_s, end_s)]
    edges = [start_s, *inside, end_s]
    return max(later - earlier for earlier, later in pairwise(edges))


class SerialParser:
    """Turns the bytes of one guest's console into dots and events.

    One for each guest, not for each host: a guest may be moved in the middle of a line, and goes on with
    the rest of it on the other host.
    """

    def __init__(self) -> None:
        self._line = bytearray()

    def feed(self, data: bytes, at_s: float) -> tuple[int, list[Event]]:
        """Take bytes that arrived at `at_s`; gives the number of dots among them and the events."""
        dots = 0
        events: list[Event] = []
        for byte in data:
            if byte in b"\r\n":
                events.extend(_events_of_line(bytes(self._line), at_s))
                self._line.clear()
            elif byte == _DOT and not self._line:
                # A dot inside of a line belongs to the line: "Linux version 6.1".
                dots += 1
            elif len(self._line) < LINE_BYTES_MAX:
                self._line.append(byte)
        return dots, events


def _events_of_line(line: bytes, at_s: float) -> list[Event]:
    text = line.decode("ascii", "replace")
    kind = text.partition(" ")[0]
    if "Kernel panic" in text or kind == "failed":
        return [Trouble(at_s, text)]
    words = dict(_WORD.findall(text))
    try:
        match kind:
            case "ready":
                return [Ready(at_s, int(words["pages"]))]
            case "tick":
                names = ("seconds", "writes", "verified", "corrupt", "gap_us", "memory_mib")
                return [Tick(at_s, *(int(words[name]) for name in names))]
            case "CORRUPT":
                return [Corrupt(at_s, int(words["page"]), words["expected"], words["found"])]
    except (KeyError, ValueError):
        # The next tick repeats what this one said; damage is damage, however badly it is told.
        return [Corrupt(at_s, -1, "a readable line", text)] if kind == "CORRUPT" else []
    return []
