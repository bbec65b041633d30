"""How long one look at the dirty pages takes: the engine's own tracker on the memory of another process.

    python -m transhume.bench.scan FD BYTES PERIODS

runs as that process: it maps the memfd FD, makes a userfaultfd, touches every page and says "ready"; then
it writes a word into every Nth page for each number N that it reads, and says "written".
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transhume.bench.figure import Figure, Target
from transhume.bench.play import Bench, in_turn, median_figure
from transhume.memory import runs as page_runs
from transhume.memory.pagemap import Scanner
from transhume.memory.ram import MEMFD_PREFIX, GuestRam
from transhume.memory.tracker import DirtyTracker
from transhume.memory.userfaultfd import create_here, find_existing
from transhume.model.errors import KernelError, VmmError
from transhume.model.vm import PAGE_BYTES

SIZE_BYTES = 1 << 30
LIMIT_MS = 5.0
SCANS_PER_ROUND = 4


def one_gib(bench: Bench) -> list[Figure]:
    """Scans of 1 GiB with few, some and all pages dirty."""
    kinds = {"64 pages dirty": SIZE_BYTES // PAGE_BYTES // 64, "1 % dirty": 100, "all pages dirty": 1}
    scans: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tracked_process(SIZE_BYTES) as process:
        for number, kind in in_turn(tuple(kinds), bench.rounds * SCANS_PER_ROUND):
            bench.say(f"scan {number + 1} of {bench.rounds * SCANS_PER_ROUND} of 1 GiB, {kind}")
            took_ms, _ = process.scan_ms(kinds[kind])
            scans[kind].append(took_ms)
    everything = scans.pop("all pages dirty")
    return [
        *(
            median_figure(f"scan of 1 GiB, {kind}", "ms", took_ms, {}, lambda _: Target.under(LIMIT_MS, "ms"))
            for kind, took_ms in scans.items()
        ),
        median_figure("scan of 1 GiB, all pages dirty", "ms", everything, {}),
    ]


class TrackedProcess:
    """A process whose memory is tracked and that writes to it when told."""

    def __init__(self, process: subprocess.Popen[str], tracker: DirtyTracker) -> None:
        self._process = process
        self._tracker = tracker

    def scan_ms(self, every_page: int) -> tuple[float, int]:
        """Let it write to every Nth page, then scan: the time of the scan, and the pages found."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{every_page}\n")
        self._process.stdin.flush()
        _hear(self._process, "written")
        began_s = time.perf_counter()
        found = self._tracker.collect()
        return (time.perf_counter() - began_s) * 1000, sum(page_runs.page_count(runs) for runs in found)


@contextmanager
def tracked_process(size_bytes: int) -> Iterator[TrackedProcess]:
    """Start one with so much memory, all of it touched and tracked; it ends with the block."""
    with ExitStack() as stack:
        memfd = os.memfd_create(f"{MEMFD_PREFIX}0", os.MFD_CLOEXEC)
        stack.callback(os.close, memfd)
        os.ftruncate(memfd, size_bytes)
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "transhume.bench.scan", str(memfd), str(size_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(memfd,),
            )
        )
        stack.callback(process.kill)
        _hear(process, "ready")
        uffd = find_existing(process.pid)
        if uffd is None:
            raise KernelError(f"process {process.pid} made no userfaultfd")
        stack.callback(uffd.close)
        scanner = Scanner(process.pid)
        stack.callback(scanner.close)
        ram = GuestRam.of_process(process.pid)
        stack.callback(ram.close)
        tracker = DirtyTracker(uffd, scanner, ram)
        tracker.arm()
        tracker.collect()
        yield TrackedProcess(process, tracker)


def _hear(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    if process.stdout.readline().strip() != word:
        raise VmmError(f"the process whose memory was to be scanned ended before it said {word!r}")


def _be_tracked(fd: int, size_bytes: int) -> None:
    memory = mmap.mmap(fd, size_bytes)
    uffd = create_here()
    for start in range(0, size_bytes, PAGE_BYTES):
        memory[start] = 1
    _say("ready")
    for line in sys.stdin:
        for start in range(0, size_bytes, int(line) * PAGE_BYTES):
            memory[start] = memory[start] ^ 1
        _say("written")
    uffd.close()


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _be_tracked(int(sys.argv[1]), int(sys.argv[2]))
