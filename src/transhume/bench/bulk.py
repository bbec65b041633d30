"""Figures of a large VM: how fast its memory goes over, next to what the kernel can do, and what movers need.

The rate is that of the first pass, which sends everything. The yardstick is `loopback`: the same bytes
between the same hosts by the plainest program, in the same run, while the same guest runs.
"""

from __future__ import annotations

from transhume.bench import loopback
from transhume.bench.figure import Figure, Target
from transhume.bench.moves import CONTENDERS, OURS, QEMU, mover_memory
from transhume.bench.play import Bench, in_turn, median_figure
from transhume.bench.stage import Move, playing
from transhume.demo.guest.build import Workload

MEMORY_MIB = 2048
FILLED = Workload(memory_mib=704, verify_pages_s=8000)
FRESH = "raw, into fresh memory"
TOUCHED = "raw, into touched memory"
LEAST_SHARE = 0.7

_RAW_BYTES = 512 << 20


def large_guest(bench: Bench) -> list[Figure]:
    """The bulk rate, and the memory of movers that moved a large VM."""
    rates: dict[str, list[float]] = {OURS: [], QEMU: [], FRESH: [], TOUCHED: []}
    moves: list[Move] = []
    with playing(bench.lab, bench.guest, "large", MEMORY_MIB, FILLED) as player:
        for number, contender in in_turn(tuple(rates), bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}: {FILLED.memory_mib} MiB moved by {contender}")
            if contender in CONTENDERS:
                engine, options = CONTENDERS[contender]
                move = player.move(engine, *options)
                rates[contender].append(_first_pass_mb_s(move))
                if contender == OURS:
                    moves.append(move)
                else:
                    # QEMU reads the zero pages that it is told of, and a page of a shared memfd that is read
                    # has memory behind it from then on: the next pass would find three times as much to look
                    # at. A move by the other engine leaves the memory as it was.
                    player.move(*CONTENDERS[OURS][:1], *CONTENDERS[OURS][1])
            else:
                touched = contender == TOUCHED
                rate = loopback.measure(player.host, player.elsewhere, _RAW_BYTES, touched)
                rates[contender].append(rate / 1e6)
        player.verify_all()
    ours = rates.pop(OURS)
    return [
        median_figure(
            "bulk rate",
            "MB/s",
            ours,
            rates,
            lambda beside: Target.at_least_times(LEAST_SHARE, "the raw rate", beside[FRESH]),
            f"{MEMORY_MIB} MiB, {FILLED.memory_mib} MiB of them filled, wire not limited",
        ),
        mover_memory(f"memory of a mover, VM of {MEMORY_MIB >> 10} GiB", moves),
    ]


def _first_pass_mb_s(move: Move) -> float:
    """Of QEMU's engine the record knows one pass only, the whole."""
    first = move.migration.report.iterations[0]
    return first.wire_bytes / 1e6 / (first.duration_ms / 1000)
