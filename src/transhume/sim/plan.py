"""What a seed decides before anything happens: the migration, the guest, and the faults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from transhume.migration.destination_table import DestinationState
from transhume.migration.source_table import SourceState
from transhume.model.migration import Engine, MigrationOptions, Mode, OnDeadline, Rest
from transhume.model.vm import PAGE_BYTES


class Side(StrEnum):
    """The ends of a migration; the hosts of the simulated farm are called after them."""

    SOURCE = "source"
    DESTINATION = "destination"


class FaultKind(StrEnum):
    """What can go wrong. A mover is killed with -9, like everything else.

    `KILL_HOST` ends all that runs on a host at once, `ISOLATE` leaves it running and unheard, `STORAGE_DOWN`
    is that of the safe copy, `END_RECORD` a controller that has heard nothing for very long.
    """

    KILL_MOVER = "kill-mover"
    KILL_DAEMON = "kill-daemon"
    KILL_QEMU = "kill-qemu"
    CUT_LINK = "cut-link"
    HALF_OPEN_LINK = "half-open-link"
    SLOW_LINK = "slow-link"
    DEAF_END = "deaf-end"
    REGISTER_DOWN = "register-down"
    REGISTER_FULL = "register-full"
    CANCEL = "cancel"
    ABANDON = "abandon"
    SWITCH = "switch"
    ADJUST = "adjust"
    END_RECORD = "end-record"
    KILL_HOST = "kill-host"
    ISOLATE = "isolate"
    STORAGE_DOWN = "storage-down"


WINDOWS = (
    FaultKind.KILL_DAEMON,
    FaultKind.SLOW_LINK,
    FaultKind.REGISTER_DOWN,
    FaultKind.REGISTER_FULL,
    FaultKind.KILL_HOST,
    FaultKind.ISOLATE,
    FaultKind.STORAGE_DOWN,
)
"""Faults that end by themselves after a while."""


class Promise(StrEnum):
    """What a person promises who takes the VM back from its destination: that this host is dead.

    `LIE`: it is only cut off, and goes on without being heard.
    """

    TRUE = "true"
    LIE = "lie"


@dataclass(frozen=True)
class Fault:
    """One fault: at a time, or when one end's machine enters a state, or after so many of the commands
    that it gives on entering it.

    `side` is whom it strikes, where that matters; `watched` whose state is waited for.
    """

    kind: FaultKind
    side: Side
    at_s: float | None
    watched: Side
    state: str
    delay_s: float
    after_commands: int
    lasts_s: float


@dataclass(frozen=True)
class Guest:
    """How much there is to send, how fast it goes, and how fast the guest undoes it."""

    ram_pages: int
    hot_pages: int
    dirty_pages_s: float
    link_pages_s: float


@dataclass(frozen=True)
class Plan:
    """One seed's whole story. Shares are probabilities, each drawn anew for every case."""

    options: MigrationOptions
    guest: Guest
    faults: tuple[Fault, ...]
    latency_s: float
    command_failure_share: float
    begin_failure_share: float
    answer_lost_share: float
    answer_late_share: float
    request_doubled_share: float
    late_echo_share: float
    owed_pages: int
    memory_differs: bool
    revival: Promise | None
    revival_after_s: float
    load_hangs: bool
    source_never_begins: bool
    record_outlives_the_begin: bool
    controller: Side | None
    heal_s: float


SUCCESSOR = "successor"
"""Stands among the states for the moment at which a mover starts that follows a dead one."""

_STATES: dict[Side, tuple[str, ...]] = {
    Side.SOURCE: (
        *(state.value for state in SourceState),
        *(SourceState.STATE, SourceState.AWAITING_COMMIT, SourceState.AWAITING_COMMIT),
        *(SourceState.RESOLVING, SourceState.RETIRING, SourceState.RETIRING),
        *(SourceState.PAGING, SourceState.PAGING, SourceState.RECONNECTING, SourceState.REVIVING),
    ),
    Side.DESTINATION: (
        *(state.value for state in DestinationState),
        *(DestinationState.LOADING, DestinationState.COMMITTING, DestinationState.COMMITTING),
        *(DestinationState.REVOKING, DestinationState.RESUMING),
        *(DestinationState.PAGING, DestinationState.PAGING, DestinationState.PAGING),
    ),
}
"""Around the commit, and while pages are missing, more is at stake, so faults come more often there."""

_ORDERS_OF_TRANSFER: tuple[tuple[Mode, Rest | None, int | None], ...] = (
    (Mode.AUTO, None, None),
    (Mode.AUTO, None, None),
    (Mode.PRE_COPY, None, None),
    (Mode.PRE_COPY, Rest.AFTER_STATE, 1),
    (Mode.PRE_COPY, Rest.BACKGROUND, 1),
    (Mode.POST_COPY, None, None),
    (Mode.POST_COPY, Rest.ON_DEMAND, None),
    (Mode.HYBRID, None, None),
    (Mode.HYBRID, Rest.BACKGROUND, 2),
)
"""Mode, rest and iterations. Some that leave no page for after the resume stay among them."""

_OWING_ORDERS = tuple(
    order
    for order in _ORDERS_OF_TRANSFER
    if order[0] in (Mode.POST_COPY, Mode.HYBRID) or (order[1] is not None and order[1].after_resume)
)
_SIDES = tuple(Side)
_KINDS = (*FaultKind, FaultKind.KILL_MOVER, FaultKind.KILL_MOVER)
_SCALES_S = (0.001, 0.05, 0.5, 4.0)
"""How long after a state faults come: on the scales of a frame, a command, a pass, a limit."""


def draw(rng: Random) -> Plan:
    """A plan. Most seeds have few faults, so that each is met in otherwise good order; some have many."""
    fault_count = rng.choice((0, 1, 1, 1, 2, 2, 3, 4, 6))
    troubled = fault_count > 0
    controller = rng.choice((Side.SOURCE, Side.DESTINATION, None))
    revival = rng.choice(tuple(Promise)) if troubled and rng.random() < 0.08 else None
    faults: list[Fault] = []
    for _ in range(fault_count):
        faults.append(_fault(rng, controller))
        if faults[-1].kind is FaultKind.KILL_MOVER and rng.random() < 0.5:
            faults.append(_second_blow(rng, faults[-1].side))
    if revival is not None:
        faults.append(_lost_destination(rng, revival, controller))
    return Plan(
        options=_options(rng, pages_are_owed=revival is not None),
        guest=_guest(rng),
        faults=tuple(faults),
        latency_s=rng.choice((0.0002, 0.002, 0.05)),
        command_failure_share=rng.choice((0.0, 0.0, 0.0, 0.02, 0.1)) if troubled else 0.0,
        begin_failure_share=rng.choice((0.0, 0.6)) if troubled else 0.0,
        answer_lost_share=rng.choice((0.0, 0.0, 0.3)) if troubled else 0.0,
        answer_late_share=rng.choice((0.0, 0.0, 0.3)) if troubled else 0.0,
        request_doubled_share=rng.choice((0.0, 0.3)) if troubled else 0.0,
        late_echo_share=rng.choice((0.0, 0.5)),
        owed_pages=rng.randint(1, 6),
        memory_differs=troubled and rng.random() < 0.2,
        revival=revival,
        revival_after_s=rng.uniform(0.0, rng.choice(_SCALES_S)),
        load_hangs=troubled and rng.random() < 0.03,
        source_never_begins=troubled and rng.random() < 0.03,
        record_outlives_the_begin=rng.random() < 0.5,
        controller=controller,
        heal_s=rng.uniform(2.0, 30.0) if revival is None else rng.uniform(10.0, 40.0),
    )


def _options(rng: Random, pages_are_owed: bool) -> MigrationOptions:
    engine = Engine.QEMU if rng.random() < 0.2 and not pages_are_owed else Engine.TRANSHUME
    orders = _OWING_ORDERS if pages_are_owed else _ORDERS_OF_TRANSFER
    mode, rest, iterations = (Mode.AUTO, None, None) if engine is Engine.QEMU else rng.choice(orders)
    known = MigrationOptions(engine=engine, mode=mode, rest=rest, iterations=iterations)
    return MigrationOptions(
        engine=engine,
        safe_dir="/shared" if known.may_page and rng.random() < 0.4 else None,
        verify=known.may_page and rng.random() < 0.3,
        mode=mode,
        rest=rest,
        iterations=iterations,
        give_up_after_s=rng.choice((None, None, None, 1.5, 6.0)),
        deadline_s=rng.choice((1.0, 5.0, 20.0)),
        on_deadline=rng.choice((OnDeadline.SWITCH, OnDeadline.SWITCH, OnDeadline.ABORT)),
        max_iterations=rng.choice((1, 4, 30)),
        peer_silence_limit_s=rng.choice((1.0, 3.0, 10.0)),
        wait_limit_s=rng.choice((3.0, 15.0, 60.0)),
    )


def _guest(rng: Random) -> Guest:
    """From idle to one that writes faster than the link can send, and so never converges."""
    ram_pages = rng.choice((2_000, 20_000))
    return Guest(
        ram_pages=ram_pages,
        hot_pages=rng.choice((10, ram_pages // 10, ram_pages)),
        dirty_pages_s=rng.choice((10.0, 10_000.0, 100_000.0)),
        link_pages_s=rng.choice((20_000.0, 200_000.0)),
    )


def _fault(rng: Random, controller: Side | None) -> Fault:
    kind = rng.choice(_KINDS)
    side = rng.choice(_SIDES)
    by_state = rng.random() < 0.75
    # Mostly the struck end's own state: a process is killed by what happens on its own host.
    watched = side if rng.random() < 0.6 else rng.choice(_SIDES)
    at_once = rng.random() < 0.3
    return Fault(
        kind=kind,
        side=side,
        at_s=None if by_state else rng.uniform(0.0, 6.0),
        watched=watched,
        state=rng.choice(_STATES[watched]),
        delay_s=0.0 if at_once else rng.uniform(0.0, rng.choice(_SCALES_S)),
        after_commands=rng.randrange(4),
        lasts_s=_lasts_s(rng, kind, side, controller),
    )


def _lasts_s(rng: Random, kind: FaultKind, side: Side, controller: Side | None) -> float:
    """A host that dies may be gone for ever; not with the controller on it, without which nothing ends."""
    if kind is FaultKind.KILL_HOST and side is not controller and rng.random() < 0.4:
        return math.inf
    return rng.uniform(0.1, 12.0) if kind in WINDOWS else 0.0


def _lost_destination(rng: Random, revival: Promise, controller: Side | None) -> Fault:
    """Why somebody wants a VM back: the host that runs it, and lacks pages, is not heard any more."""
    kind = FaultKind.KILL_HOST if revival is Promise.TRUE else FaultKind.ISOLATE
    watched = rng.choice(_SIDES)
    there = (DestinationState.RESUMING, DestinationState.PAGING, DestinationState.PAGING)
    here = (SourceState.COMMITTED, SourceState.PAGING, SourceState.RECONNECTING)
    return Fault(
        kind=kind,
        side=Side.DESTINATION,
        at_s=None,
        watched=watched,
        state=rng.choice(here if watched is Side.SOURCE else there),
        delay_s=rng.uniform(0.0, rng.choice(_SCALES_S)),
        after_commands=0,
        lasts_s=_lasts_s(rng, kind, Side.DESTINATION, controller) if rng.random() < 0.5 else 60.0,
    )


def _second_blow(rng: Random, side: Side) -> Fault:
    """What strikes a mover that has only just followed a dead one."""
    cancel = FaultKind.CANCEL if side is Side.SOURCE else FaultKind.ABANDON
    return Fault(
        kind=rng.choice((FaultKind.KILL_MOVER, FaultKind.KILL_QEMU, cancel)),
        side=side,
        at_s=None,
        watched=side,
        state=SUCCESSOR,
        delay_s=rng.uniform(0.0, rng.choice(_SCALES_S)),
        after_commands=0,
        lasts_s=0.0,
    )


def ram_bytes(guest: Guest) -> int:
    """The size of the guest's RAM."""
    return guest.ram_pages * PAGE_BYTES
