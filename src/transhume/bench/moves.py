"""Figures of whole migrations: the guest's longest gap, total time, bytes on the wire.

The busy guest rewrites 4000 scattered pages a second (16 MB/s, an eighth of the wire), so that what is left
for the pause depends on the limits, and verifies 20000. Both leave half of the emulated CPU free: with a
guest that takes a whole core of two, the gaps would show the scheduler and not the engines. The gaps are
taken on a wire of 1 Gbit/s; total time and bytes on a wire that is as fast as the kernel. Transhume runs
with its own defaults throughout. QEMU runs with the limits of its own defaults (300 ms of downtime), and
once more with 10 ms; its bandwidth is not limited.

A gap is the longest silence between the request and the end of the migration. Under emulation each gap has a
share that belongs to neither engine: the destination's QEMU must translate the guest's code anew before the
guest can speak again (about 4000 blocks).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from transhume.bench.figure import Figure, Target
from transhume.bench.play import WIRE_BITS_S, Bench, in_turn, median_figure, shaped_wire
from transhume.bench.stage import Move, Player, playing
from transhume.demo.guest.build import Workload
from transhume.model.migration import Engine

OURS = "Transhume"
QEMU = "QEMU, its default limits"
QEMU_10 = "QEMU, downtime-limit 10 ms"
REST = "the same guest at rest"

CONTENDERS: dict[str, tuple[Engine, tuple[str, ...]]] = {
    OURS: (Engine.TRANSHUME, ()),
    QEMU: (Engine.QEMU, ("--max-downtime", "300")),
    QEMU_10: (Engine.QEMU, ("--max-downtime", "10")),
}

MEMORY_MIB = 256
MOVER_LIMIT_MB = 120.0
BUSY = Workload(memory_mib=96, rate_pages_s=4000, verify_pages_s=20000)
IDLE = Workload(memory_mib=96, rate_pages_s=0, verify_pages_s=2000)
IDLE_GAP_LIMIT_MS = 25.0

_BUSY_WORDS = f"{MEMORY_MIB} MiB, {BUSY.rate_pages_s} pages/s rewritten"
_SHAPED = f"wire of {WIRE_BITS_S // 10**9} Gbit/s"
_UNSHAPED = "wire not limited"

Moves = Mapping[str, Sequence[Move]]


def busy_guest(bench: Bench) -> list[Figure]:
    """Gaps, total times and bytes of a guest that works."""
    with playing(bench.lab, bench.guest, "busy", MEMORY_MIB, BUSY) as player:
        with shaped_wire(bench.lab):
            shaped, rest = _rounds(bench, player, (OURS, QEMU, QEMU_10))
        unshaped, fast_rest = _rounds(bench, player, (OURS, QEMU))
    return [
        *_busy_gaps(shaped, rest),
        _gap("longest gap, busy guest, fast wire", unshaped, fast_rest, f"{_BUSY_WORDS}, {_UNSHAPED}"),
        *_totals(unshaped),
        mover_memory(f"memory of a mover, VM of {MEMORY_MIB} MiB", [*shaped[OURS], *unshaped[OURS]]),
    ]


def idle_guest(bench: Bench) -> list[Figure]:
    """Gaps of a guest that writes next to nothing: what a switchover costs at least."""
    with playing(bench.lab, bench.guest, "idle", MEMORY_MIB, IDLE) as player:
        with shaped_wire(bench.lab):
            moves, rest = _rounds(bench, player, (OURS, QEMU))
        player.verify_all()
    return [
        _gap(
            "longest gap, idle guest",
            moves,
            rest,
            f"{MEMORY_MIB} MiB, nothing rewritten, {_SHAPED}",
            Target.under(IDLE_GAP_LIMIT_MS, "ms"),
        )
    ]


def mover_memory(figure: str, moves: Sequence[Move]) -> Figure:
    """The larger of both movers' peaks, in each move."""
    return median_figure(
        figure,
        "MB",
        [max(move.mover_kib.values()) * 1024 / 1e6 for move in moves],
        {},
        lambda _: Target.under(MOVER_LIMIT_MB, "MB"),
    )


def _rounds(
    bench: Bench, player: Player, contenders: Sequence[str]
) -> tuple[dict[str, list[Move]], list[float]]:
    """Each contender's moves, and the guest's silences at rest over windows as long as those moves."""
    moves: dict[str, list[Move]] = defaultdict(list)
    rest_ms: list[float] = []
    for number, contender in in_turn(contenders, bench.rounds):
        bench.say(f"round {number + 1} of {bench.rounds}: {player.name} guest moved by {contender}")
        engine, options = CONTENDERS[contender]
        move = player.move(engine, *options)
        moves[contender].append(move)
        if player.workload.rate_pages_s:
            player.verify_all()  # what is never rewritten stays wrong, and is found at the end
        if contender == OURS:
            rest_ms.append(player.rest(move.total_ms / 1000))
    return moves, rest_ms


def _busy_gaps(moves: Moves, rest_ms: Sequence[float]) -> list[Figure]:
    conditions = f"{_BUSY_WORDS}, {_SHAPED}"
    ours = [move.gap_ms for move in moves[OURS]]
    gaps = {QEMU: _gaps(moves[QEMU]), QEMU_10: _gaps(moves[QEMU_10]), REST: list(rest_ms)}
    name = "longest gap, busy guest"
    return [
        median_figure(
            name,
            "ms",
            ours,
            gaps,
            lambda beside: Target.at_most_times(0.5, "QEMU's with its default limits", beside[QEMU]),
            conditions,
        ),
        median_figure(
            f"{name}, next to a hasty QEMU",
            "ms",
            ours,
            gaps,
            lambda beside: Target.at_most_times(1, "QEMU's with downtime-limit 10 ms", beside[QEMU_10]),
            conditions,
        ),
        median_figure(
            "downtime as the engine reports it, busy guest",
            "ms",
            [move.migration.report.downtime.total_ms for move in moves[OURS]],
            {
                name: [move.migration.report.downtime.total_ms for move in moves[name]]
                for name in (QEMU, QEMU_10)
            },
            conditions=conditions,
        ),
    ]


def _gap(
    figure: str, moves: Moves, rest_ms: Sequence[float], conditions: str, target: Target | None = None
) -> Figure:
    return median_figure(
        figure,
        "ms",
        _gaps(moves[OURS]),
        {QEMU: _gaps(moves[QEMU]), REST: list(rest_ms)},
        None if target is None else lambda _: target,
        conditions,
    )


def _gaps(moves: Sequence[Move]) -> list[float]:
    return [move.gap_ms for move in moves]


def _totals(moves: Moves) -> list[Figure]:
    conditions = f"{_BUSY_WORDS}, {_UNSHAPED}"
    return [
        median_figure(
            "total time",
            "ms",
            [move.total_ms for move in moves[OURS]],
            {QEMU: [move.total_ms for move in moves[QEMU]]},
            lambda beside: Target.at_most_times(1.1, "QEMU's", beside[QEMU]),
            conditions,
        ),
        median_figure(
            "total time, the movers' part",
            "ms",
            [move.migration.report.total_ms for move in moves[OURS]],
            {QEMU: [move.migration.report.total_ms for move in moves[QEMU]]},
            conditions=conditions,
        ),
        median_figure(
            "bytes on the wire",
            "MB",
            [move.migration.report.wire_bytes / 1e6 for move in moves[OURS]],
            {QEMU: [move.migration.report.wire_bytes / 1e6 for move in moves[QEMU]]},
            lambda beside: Target.at_most_times(1, "QEMU's", beside[QEMU]),
            conditions,
        ),
    ]
