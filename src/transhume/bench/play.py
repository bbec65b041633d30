"""What every part of the benchmark is given, and how it takes its samples: in turn, round by round.

The contenders of one comparison take turns within each round, on the same guest and the same wire, and the
order rotates from round to round, so that neither the machine's moods nor the direction of a move favour
one of them. A figure is the median of its series.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transhume.bench.figure import Figure, Target
from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab

WIRE_BITS_S = 1_000_000_000
"""An ordinary wire. On one as fast as memory QEMU's limits never matter: all that the guest wrote during
the first pass is sent within them."""


@dataclass(frozen=True)
class Bench:
    """Two hosts, the guest's files, and how often to measure. `say` shows a person what is going on."""

    lab: Lab
    guest: Guest
    rounds: int
    say: Callable[[str], None]


Part = Callable[[Bench], list[Figure]]
"""One part of a group. Raises a `TranshumeError` when a migration failed or a page was wrong."""


@contextmanager
def shaped_wire(lab: Lab) -> Iterator[None]:
    """Make the wire an ordinary one for a while."""
    lab.shape(rate_bits_s=WIRE_BITS_S)
    try:
        yield
    finally:
        lab.shape()


def in_turn(contenders: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every contender once a round, each round beginning with the next one."""
    for number in range(rounds):
        for place in range(len(contenders)):
            yield number, contenders[(number + place) % len(contenders)]


def median_figure(
    figure: str,
    unit: str,
    series: Sequence[float],
    beside: Mapping[str, Sequence[float]],
    target: Callable[[Mapping[str, float]], Target] | None = None,
    conditions: str = "",
) -> Figure:
    """The median of a series next to the medians of others; `target` is made from those."""
    medians = {what: statistics.median(values) for what, values in beside.items()}
    return Figure(
        figure=figure,
        value=statistics.median(series),
        unit=unit,
        target=target(medians) if target else None,
        beside=medians,
        series=tuple(series),
        conditions=conditions,
    )
