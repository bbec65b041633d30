"""How much slower a guest gets while its memory is tracked.

The guest rewrites and verifies as fast as it can; its work is counted by itself. It works free, then
tracked by our tracker and scanned ten times a second, then under QEMU's own migration, throttled to next
to nothing so that only its dirty logging costs. That favours QEMU a little: such a migration never comes to
the end of its first pass, so it never reads and clears its bitmap.
"""

from __future__ import annotations

import asyncio
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from transhume.bench.figure import Figure
from transhume.bench.play import Bench, in_turn, median_figure
from transhume.bench.stage import BOOT_LIMIT_S, Player, playing
from transhume.demo.guest.build import Workload
from transhume.demo.serial_log import Tick, Timeline
from transhume.migration.driver.attach import TrackedRam
from transhume.model.errors import TimedOut, VmmError
from transhume.model.migration import Engine, Phase
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import find_running

MEMORY_MIB = 256
AS_FAST_AS_IT_CAN = Workload(memory_mib=96, rate_pages_s=1_000_000, verify_pages_s=1_000_000)
SCAN_INTERVAL_S = 0.1
TRICKLE = "100K"

FREE = "free"
TRACKED = "tracked by Transhume"
QEMU_TRACKED = "under QEMU's migration at a trickle"

_WORK_S = 2.0
_TRACKING = "tracking"
_PRECOPY_LIMIT_S = 30.0


def tracked_guest(bench: Bench) -> list[Figure]:
    """Work lost, in percent of the work of the free guest in the same round."""
    work: dict[str, list[float]] = {FREE: [], TRACKED: [], QEMU_TRACKED: []}
    with playing(bench.lab, bench.guest, "tracked", MEMORY_MIB, AS_FAST_AS_IT_CAN) as player:
        states: dict[str, Callable[[], AbstractContextManager[None]]] = {
            FREE: nullcontext,
            TRACKED: lambda: _tracked(player),
            QEMU_TRACKED: lambda: _migrating_at_a_trickle(player),
        }
        for number, state in in_turn(tuple(states), bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}: the guest works {state}")
            with states[state]():
                work[state].append(work_pages_s(player))
        player.verify_all()
    return [
        median_figure(
            "slowdown of the guest while tracked",
            "%",
            _lost_percent(work[TRACKED], work[FREE]),
            {QEMU_TRACKED: _lost_percent(work[QEMU_TRACKED], work[FREE])},
            conditions=f"{MEMORY_MIB} MiB, rewriting as fast as it can, scanned every {SCAN_INTERVAL_S:g} s",
        ),
        median_figure("work of the free guest", "pages/s", work[FREE], {}),
    ]


def work_pages_s(player: Player) -> float:
    """Pages that the guest rewrote and verified in a second, between two of its own accounts."""
    asked_s = time.monotonic()

    def accounts(timeline: Timeline) -> list[Tick]:
        return [tick for tick in timeline.ticks() if tick.at_s > asked_s]

    def enough(timeline: Timeline) -> bool:
        seen = accounts(timeline)
        return len(seen) > 1 and seen[-1].at_s - seen[0].at_s >= 0.9 * _WORK_S

    player.observer.wait_for(enough, BOOT_LIMIT_S)
    seen = player.observer.ask(accounts)
    pages = (seen[-1].writes + seen[-1].verified) - (seen[0].writes + seen[0].verified)
    return pages / (seen[-1].at_s - seen[0].at_s)


@contextmanager
def _tracked(player: Player) -> Iterator[None]:
    """Track the guest from a process of its own, as a mover does."""
    command = [sys.executable, "-m", "transhume.bench.slowdown", str(player.host.vm_dir(player.name))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracker:
        assert tracker.stdin is not None
        assert tracker.stdout is not None
        try:
            if tracker.stdout.readline().strip() != _TRACKING:
                raise VmmError(f"the tracker of {player.name} ended before it tracked")
            yield
        finally:
            tracker.stdin.close()
    if tracker.returncode != 0:
        raise VmmError(f"the tracker of {player.name} failed")


@contextmanager
def _migrating_at_a_trickle(player: Player) -> Iterator[None]:
    identity = player.begin_move(Engine.QEMU, "--bandwidth", TRICKLE)
    try:
        deadline_s = time.monotonic() + _PRECOPY_LIMIT_S
        while player.record(identity).phase is not Phase.PRECOPY:
            if time.monotonic() > deadline_s:
                raise TimedOut(f"migration {identity} did not begin within {_PRECOPY_LIMIT_S:g} s")
            time.sleep(0.1)
        yield
    finally:
        player.cancel(identity)


def _lost_percent(work: list[float], free: list[float]) -> list[float]:
    return [100 * (1 - tracked / most) for tracked, most in zip(work, free, strict=True)]


async def _track(vm_dir: Path) -> None:
    """Track the VM of that folder and scan it until standard input ends."""
    paths = VmPaths(vm_dir)
    process = find_running(paths)
    if process is None:
        raise VmmError(f"no VM runs in {vm_dir}")
    monitor = await Monitor.connect(paths.mover_qmp_socket)
    tracked = await TrackedRam.attach(monitor, process.pid)
    try:
        tracked.tracker.arm()
        sys.stdout.write(f"{_TRACKING}\n")
        sys.stdout.flush()
        while not select.select([sys.stdin], [], [], SCAN_INTERVAL_S)[0]:
            tracked.tracker.collect()
        tracked.tracker.disarm()
    finally:
        tracked.close()
        await monitor.close()
        process.close()


if __name__ == "__main__":
    asyncio.run(_track(Path(sys.argv[1])))
