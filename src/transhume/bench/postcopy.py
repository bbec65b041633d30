"""The group `postcopy`: pages owed after the resume, next to QEMU's post-copy and to QEMU's pre-copy.

The wire has 1 Gbit/s for whole migrations, and is as fast as the kernel for the latency of faults. The fast
writer dirties pages faster than that wire carries them: QEMU's pre-copy does not end there by itself.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

from transhume.bench import loopback, qemu_pair
from transhume.bench.figure import Figure, Target
from transhume.bench.lost_work import lost_work
from transhume.bench.moves import BUSY, MEMORY_MIB, REST
from transhume.bench.play import WIRE_BITS_S, Bench, Part, in_turn, median_figure, shaped_wire
from transhume.bench.stage import Move, playing
from transhume.demo.guest.build import Workload
from transhume.model.migration import Engine, PagingReport

QEMU_POST_COPY = "QEMU's post-copy"
POST_COPY = ("--mode", "post-copy")

FAST_WRITER = Workload(memory_mib=128, rate_pages_s=60_000, verify_pages_s=2000)
FAST_WRITER_GAP_LIMIT_MS = 150.0
GAP_SHARE = 0.25
TOTAL_SHARE = 0.8
LATENCY_ROOM_US = 30.0
P99_LIMIT_US = 1000.0
TOTAL_FACTOR = 1.3
SAFE_FACTOR = 1.25
SAFE, UNSAFE = "with a safe copy", "without one"


def pure_post_copy(bench: Bench) -> list[Figure]:
    """Gap and total time without any pass before, ours and QEMU's in turn; then the latency of faults."""
    ours: list[Move] = []
    fast: list[Move] = []
    theirs: dict[str, list[float]] = defaultdict(list)
    rest_ms: list[float] = []
    with playing(bench.lab, bench.guest, "paged", MEMORY_MIB, BUSY) as player:
        with shaped_wire(bench.lab):
            for number in range(bench.rounds):
                bench.say(f"round {number + 1} of {bench.rounds}: post-copy by Transhume")
                ours.append(player.move(Engine.TRANSHUME, *POST_COPY))
                player.verify_all()
                rest_ms.append(player.rest(ours[-1].total_ms / 1000))
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}: post-copy by Transhume, wire not limited")
            fast.append(player.move(Engine.TRANSHUME, *POST_COPY))
            player.verify_all()
        latencies = _fault_latency(bench, fast)
    with shaped_wire(bench.lab):
        for _ in range(bench.rounds):
            move = _by_qemu(bench)
            theirs["gap"].append(move.gap_ms)
            theirs["total"].append(move.total_ms)
    for _ in range(bench.rounds):
        theirs["fast total"].append(_by_qemu(bench).total_ms)
    guest = f"{MEMORY_MIB} MiB, {BUSY.rate_pages_s} pages/s rewritten"
    conditions = f"{guest}, wire of {WIRE_BITS_S // 10**9} Gbit/s"
    return [
        median_figure(
            "longest gap, post-copy",
            "ms",
            [move.gap_ms for move in ours],
            {QEMU_POST_COPY: theirs["gap"], REST: rest_ms},
            lambda beside: Target.at_most_times(GAP_SHARE, QEMU_POST_COPY, beside[QEMU_POST_COPY]),
            conditions,
        ),
        # QEMU's figure begins when both processes are there, so ours does too. Where the wire is the limit no
        # engine can be much faster than another.
        median_figure(
            "total time, post-copy, the movers' part",
            "ms",
            [move.migration.report.total_ms for move in fast],
            {QEMU_POST_COPY: theirs["fast total"]},
            lambda beside: Target.at_most_times(TOTAL_SHARE, QEMU_POST_COPY, beside[QEMU_POST_COPY]),
            f"{guest}, wire not limited",
        ),
        median_figure(
            "total time, post-copy, the movers' part, ordinary wire",
            "ms",
            [move.migration.report.total_ms for move in ours],
            {QEMU_POST_COPY: theirs["total"]},
            None,
            conditions,
        ),
        median_figure(
            "residual dependency, post-copy",
            "ms",
            [_paging(move).residual_ms for move in ours],
            {},
            None,
            conditions,
        ),
        *latencies,
    ]


def fast_writer(bench: Bench) -> list[Figure]:
    """A guest that no pre-copy can follow, in the default mode."""
    with playing(bench.lab, bench.guest, "fast", MEMORY_MIB, FAST_WRITER) as player, shaped_wire(bench.lab):
        moves = []
        for number in range(bench.rounds):
            bench.say(
                f"round {number + 1} of {bench.rounds}: a guest that writes faster than the wire carries"
            )
            moves.append(player.move(Engine.TRANSHUME))
            player.verify_all()
    ram_over_link_ms = MEMORY_MIB * (1 << 20) * 8 / WIRE_BITS_S * 1000
    conditions = (
        f"{MEMORY_MIB} MiB, up to {FAST_WRITER.rate_pages_s} pages/s rewritten, wire of "
        f"{WIRE_BITS_S // 10**9} Gbit/s, mode auto"
    )
    return [
        median_figure(
            "longest gap, guest faster than the wire",
            "ms",
            [move.gap_ms for move in moves],
            {},
            lambda _: Target.under(FAST_WRITER_GAP_LIMIT_MS, "ms"),
            conditions,
        ),
        median_figure(
            "total time, guest faster than the wire",
            "ms",
            [move.total_ms for move in moves],
            {"RAM over the wire's rate": [ram_over_link_ms]},
            lambda _: Target.at_most_times(TOTAL_FACTOR, "RAM over the wire's rate", ram_over_link_ms),
            conditions,
        ),
    ]


def safe_copy(bench: Bench) -> list[Figure]:
    """What a safe copy costs: post-copy with and without one, in turn."""
    totals: dict[str, list[float]] = {SAFE: [], UNSAFE: []}
    with (
        tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder,
        playing(bench.lab, bench.guest, "safe", MEMORY_MIB, BUSY) as player,
    ):
        for number, contender in in_turn(tuple(totals), bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}: post-copy {contender}")
            options = (*POST_COPY, "--safe", folder) if contender == SAFE else POST_COPY
            totals[contender].append(player.move(Engine.TRANSHUME, *options).total_ms)
            player.verify_all()
    return [
        median_figure(
            "total time, post-copy with a safe copy",
            "ms",
            totals[SAFE],
            {UNSAFE: totals[UNSAFE]},
            lambda beside: Target.at_most_times(SAFE_FACTOR, UNSAFE, beside[UNSAFE]),
            f"{MEMORY_MIB} MiB, {BUSY.rate_pages_s} pages/s rewritten, wire not limited",
        )
    ]


def _by_qemu(bench: Bench) -> qemu_pair.QemuMove:
    bench.say("post-copy by QEMU")
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        return qemu_pair.post_copy(bench.lab, bench.guest, MEMORY_MIB, BUSY, Path(folder))


def _fault_latency(bench: Bench, moves: list[Move]) -> list[Figure]:
    bench.say("the round trip of a page")
    there, back = bench.lab.hosts
    round_trips_us = [loopback.round_trip_us(there, back) for _ in range(bench.rounds)]
    reports = [_paging(move) for move in moves]
    # The same sockets, the same moment: what a fault costs beyond it is what it costs to serve faults.
    name = "round trip of a page over the same sockets"
    idle = "round trip of a page, hosts at rest"
    conditions = "the background push running, wire not limited"
    return [
        median_figure(
            "latency of a fault, median",
            "us",
            [report.fault_p50_us for report in reports],
            {name: [report.round_trip_p50_us for report in reports], idle: round_trips_us},
            lambda beside: Target(
                f"at most that round trip and {LATENCY_ROOM_US:g} us", beside[name] + LATENCY_ROOM_US
            ),
            conditions,
        ),
        median_figure(
            "latency of a fault, 99th percentile",
            "us",
            [report.fault_p99_us for report in reports],
            {idle: round_trips_us},
            lambda _: Target.under(P99_LIMIT_US, "us"),
            conditions,
        ),
    ]


def _paging(move: Move) -> PagingReport:
    paging = move.migration.report.paging
    assert paging is not None
    return paging


POSTCOPY: tuple[Part, ...] = (pure_post_copy, fast_writer, lost_work, safe_copy)
