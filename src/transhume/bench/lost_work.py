"""Work that the guest did not do because it was moved: the whole price of a migration in one figure.

The guest rewrites a small set of pages as fast as it can and counts. What it would have done between two of
its own accounts, one before the migration and one after it, less what it did, is lost; as time, so that
guests of different speed can be compared.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transhume.bench import qemu_pair
from transhume.bench.figure import Figure, Target
from transhume.bench.moves import MEMORY_MIB
from transhume.bench.play import Bench, in_turn, median_figure
from transhume.bench.stage import BOOT_LIMIT_S, Player, playing
from transhume.demo.guest.build import Workload
from transhume.demo.observer import Observer
from transhume.demo.serial_log import Tick, Timeline
from transhume.model.migration import Engine

SMALL_SET = Workload(memory_mib=32, rate_pages_s=1_000_000, verify_pages_s=1_000_000)
REST_S = 4.0
SHARE = 0.5

OURS = "Transhume"
OURS_POST_COPY = "Transhume's post-copy"
QEMU_PRE_COPY = "QEMU's pre-copy"
QEMU_POST_COPY = "QEMU's post-copy"


@dataclass(frozen=True)
class Pace:
    """How many pages a second the guest deals with when it is left alone."""

    pages_s: float

    def lost_ms(self, before: Tick, after: Tick) -> float:
        """The work that is missing between two accounts, in ms of the undisturbed guest; not below zero."""
        due_s = after.at_s - before.at_s
        return max(0.0, due_s - (_work(after) - _work(before)) / self.pages_s) * 1000


def lost_work(bench: Bench) -> list[Figure]:
    """Work lost by a move in the default mode and by post-copy, next to QEMU's two modes."""
    lost: dict[str, list[float]] = {OURS: [], OURS_POST_COPY: [], QEMU_PRE_COPY: [], QEMU_POST_COPY: []}
    moves = {
        OURS: (Engine.TRANSHUME, ()),
        OURS_POST_COPY: (Engine.TRANSHUME, ("--mode", "post-copy")),
        QEMU_PRE_COPY: (Engine.QEMU, ("--max-downtime", "300")),
    }
    with playing(bench.lab, bench.guest, "working", MEMORY_MIB, SMALL_SET) as player:
        for number, contender in in_turn(tuple(moves), bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}: work lost by {contender}")
            engine, options = moves[contender]
            lost[contender].append(_lost_by_move(player, engine, options))
            if contender == QEMU_PRE_COPY:
                player.move(
                    Engine.TRANSHUME
                )  # QEMU leaves every zero page allocated, which slows the next one
        player.verify_all()
    for number in range(bench.rounds):
        bench.say(f"round {number + 1} of {bench.rounds}: work lost by {QEMU_POST_COPY}")
        lost[QEMU_POST_COPY].append(_lost_by_pair(bench))
    ours = lost.pop(OURS)
    return [
        median_figure(
            "work lost by a move",
            "ms",
            ours,
            lost,
            lambda beside: Target.at_most_times(
                SHARE,
                "the lesser of QEMU's two modes",
                min(beside[QEMU_PRE_COPY], beside[QEMU_POST_COPY]),
            ),
            f"{MEMORY_MIB} MiB, {SMALL_SET.memory_mib} MiB rewritten as fast as it can, mode auto, "
            "wire not limited",
        )
    ]


def _lost_by_move(player: Player, engine: Engine, options: tuple[str, ...]) -> float:
    pace = pace_of(player.observer)
    before = _last_account(player.observer)
    move = player.move(engine, *options)
    return pace.lost_ms(before, account_after(player.observer, move.ended_s))


def _lost_by_pair(bench: Bench) -> float:
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        pair = qemu_pair.post_copy(bench.lab, bench.guest, MEMORY_MIB, SMALL_SET, Path(folder), _watch_pair)
    assert pair.lost_ms is not None
    return pair.lost_ms


def _watch_pair(observer: Observer) -> qemu_pair.Watch:
    pace = pace_of(observer)
    before = _last_account(observer)
    return lambda ended_s: pace.lost_ms(before, account_after(observer, ended_s))


def pace_of(observer: Observer) -> Pace:
    """Watch the guest undisturbed for a few of its accounts."""
    begin = _last_account(observer)
    observer.wait_for(lambda timeline: timeline.ticks()[-1].at_s >= begin.at_s + REST_S, BOOT_LIMIT_S)
    end = _last_account(observer)
    return Pace((_work(end) - _work(begin)) / (end.at_s - begin.at_s))


def account_after(observer: Observer, at_s: float) -> Tick:
    """The first account that the guest gives after a moment."""

    def later(timeline: Timeline) -> list[Tick]:
        return [tick for tick in timeline.ticks() if tick.at_s > at_s]

    observer.wait_for(lambda timeline: bool(later(timeline)), BOOT_LIMIT_S)
    return observer.ask(later)[0]


def _last_account(observer: Observer) -> Tick:
    observer.wait_for(lambda timeline: bool(timeline.ticks()), BOOT_LIMIT_S)
    return observer.ask(lambda timeline: timeline.ticks()[-1])


def _work(tick: Tick) -> int:
    return tick.writes + tick.verified
