"""Watch a guest from outside: its serial log on every host where it may run.

    with Observer([alpha.vm_dir("vm") / "serial.log", beta.vm_dir("vm") / "serial.log"]) as observer:
        observer.wait_for(lambda timeline: timeline.ready() is not None, timeout_s=30)
        ... migrate between start_s and end_s ...
        observer.longest_silence_ms(start_s, end_s)

All times are of time.monotonic() of this machine, which all hosts of a lab share.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from transhume.demo.serial_log import SerialParser, Timeline
from transhume.demo.serial_tail import RECORD
from transhume.model.errors import TimedOut, VmmError

CPUS_MAX = 64
"""What the workload's threads may differ by in their shares of the pages, at most a page for each."""

_Answer = TypeVar("_Answer")


class Observer:
    """Follows serial logs, which need not exist yet, while the `with` block lasts."""

    def __init__(self, serial_logs: Sequence[Path]) -> None:
        self._paths = [str(path) for path in serial_logs]
        self._parser = SerialParser()
        self._timeline = Timeline()
        self._changed = threading.Condition()
        self._tail: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "transhume.demo.serial_tail", *self._paths]
        # Not in our process group: Ctrl-C is for the demo, which ends the follower itself.
        tail = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert tail.stdout is not None
        self._tail = tail
        self._reader = threading.Thread(target=self._read, args=(tail.stdout,), name="observer", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._tail is not None
        assert self._reader is not None
        self._tail.kill()
        self._tail.wait()
        self._reader.join()
        assert self._tail.stdout is not None
        self._tail.stdout.close()

    def ask(self, question: Callable[[Timeline], _Answer]) -> _Answer:
        """The answer to a question about the timeline, which does not change meanwhile."""
        with self._changed:
            return question(self._timeline)

    def wait_for(self, condition: Callable[[Timeline], bool], timeout_s: float) -> None:
        """Wait until the timeline fulfils a condition.

        Raises `VmmError` when the guest says that it cannot go on, `TimedOut` after `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not condition(self._timeline):
                trouble = self._timeline.trouble()
                if trouble is not None:
                    raise VmmError(f"the guest's workload cannot go on: {trouble.words}")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    raise TimedOut(f"the guest did not do what was awaited within {timeout_s} s")

    def wait_until_ready(self, timeout_s: float) -> int:
        """Wait until the workload has filled its memory; gives its number of pages."""
        self.wait_for(lambda timeline: timeline.ready() is not None, timeout_s)
        ready = self.ask(Timeline.ready)
        assert ready is not None
        return ready.pages

    def wait_for_full_verification(self, timeout_s: float) -> None:
        """Wait until every page was verified once more from now on."""
        pages = self.wait_until_ready(timeout_s)
        asked_s = time.monotonic()

        def swept(timeline: Timeline) -> bool:
            counts = [tick.verified for tick in timeline.ticks() if tick.at_s > asked_s]
            return len(counts) > 1 and counts[-1] - counts[0] >= pages + CPUS_MAX

        self.wait_for(swept, timeout_s)

    def longest_silence_ms(self, start_s: float, end_s: float) -> float:
        """How long the guest stood still between two times, at most: the gap that a user would see."""
        return self.ask(lambda timeline: timeline.longest_silence_s(start_s, end_s)) * 1000

    def _read(self, records: IO[bytes]) -> None:
        while len(header := records.read(RECORD.size)) == RECORD.size:
            at_s, _, length = RECORD.unpack(header)
            dots, events = self._parser.feed(records.read(length), at_s)
            with self._changed:
                self._timeline.beats_s.extend([at_s] * dots)
                self._timeline.events.extend(events)
                self._changed.notify_all()
