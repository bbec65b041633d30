"""The moments of a migration at which a fault can strike, each held as long as the test wants.

What lasts by itself is the pre-copy and the paging of a slow migration. The others are held from outside,
without the movers' knowledge: a wire that carries nothing keeps the source from connecting, a wire that
carries little draws out the last pages, a QEMU that stands still does not load the device state and does not
resume, a controller that stands still does not answer the commit.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from enum import StrEnum
from typing import Any

from tests.e2e.farm import Farm, until

from transhume.demo import namespaces
from transhume.demo.namespaces import Shape
from transhume.migration.destination_table import DestinationState
from transhume.migration.driver.job import MoverFolder, Role
from transhume.migration.source_table import SourceState
from transhume.model.migration import Mode, Phase
from transhume.model.orders import Adjustment

CONTROLLER, SOURCE, DESTINATION = "gamma", "alpha", "beta"

SLOW_BYTES_S = 128 << 10
SLOW_WIRE_BITS_S = 200_000
"""The pages that the guest wrote last take many seconds over this wire."""

REACHED_LIMIT_S = 30.0
SILENCE_LIMIT_S = 4.0
LONGER_SILENCE_LIMIT_S = 6.0
"""Where the source must connect through a wire that carried nothing before, or where the wire is so slow that
others who use it too can hold a segment up for seconds.
"""


class Moment(StrEnum):
    """Where a migration stands when a fault strikes."""

    PREPARED = "prepared"
    PRECOPY = "precopy"
    SUSPENDED = "suspended"
    STATE_SENT = "state-sent"
    COMMIT_ASKED = "commit asked"
    COMMITTED = "committed"
    PAGING = "paging"


def silence_limit_s(moment: Moment) -> float:
    """How long the ends may hear nothing of each other in a migration that is struck at that moment."""
    lasting = (Moment.PRECOPY, Moment.PAGING)
    return SILENCE_LIMIT_S if moment in lasting else LONGER_SILENCE_LIMIT_S


@asynccontextmanager
async def held(farm: Farm, mode: Mode, moment: Moment) -> AsyncIterator[str]:
    """A migration of the VM `vm` that stays at the moment until the block is left; its id."""
    options: dict[str, Any] = {
        "mode": mode,
        "bandwidth_bytes_s": SLOW_BYTES_S,
        "peer_silence_limit_s": silence_limit_s(moment),
    }
    async with AsyncExitStack() as stack:
        if moment is Moment.PREPARED:
            stack.callback(restore_wire, farm)
            cut_wire(farm)
        if moment is Moment.SUSPENDED:
            # What the guest wrote during the pass is left, and the source waits until all has arrived.
            options |= {"iterations": 1, "verify": True}
        if moment in (Moment.PREPARED, Moment.PRECOPY, Moment.SUSPENDED, Moment.PAGING):
            migration = await farm.begin("vm", DESTINATION, **options)
        if moment is Moment.PREPARED:
            await _source_is(farm, migration, SourceState.CONNECTING)
        elif moment is Moment.PRECOPY:
            await farm.in_phase(migration, Phase.PRECOPY)
        elif moment is Moment.SUSPENDED:
            await _source_is(farm, migration, SourceState.PRECOPY)
            await _draw_out_last_pages(farm, stack, migration)
        elif moment is Moment.PAGING:
            if mode is Mode.HYBRID:
                await farm.adjust(migration, Adjustment(switch_to_post_copy=True))
            await farm.in_phase(migration, Phase.PAGING)
        else:
            migration = await _held_at_the_commit(farm, stack, options, moment)
        yield migration


async def _draw_out_last_pages(farm: Farm, stack: AsyncExitStack, migration: str) -> None:
    """Let the pass end quickly, hold the source's QEMU until the wire is slow, then let it stop the VM."""
    qemu = _stand_still(farm, stack, SOURCE)
    await farm.hurry(migration)
    await _source_is(farm, migration, SourceState.SUSPENDING)
    stack.callback(namespaces.shape, farm.lab[SOURCE].namespace, Shape())
    namespaces.shape(farm.lab[SOURCE].namespace, Shape(rate_bits_s=SLOW_WIRE_BITS_S))
    _signal(qemu, signal.SIGCONT)
    await _source_is(farm, migration, SourceState.LAST_PAGES)


async def _held_at_the_commit(
    farm: Farm, stack: AsyncExitStack, options: dict[str, Any], moment: Moment
) -> str:
    """The destination's QEMU, and then the controller, stand still before they are needed."""
    stack.callback(restore_wire, farm)
    cut_wire(farm)  # so that QEMU can be met before a mode without a pass sends it the state
    del options["bandwidth_bytes_s"]
    migration = await farm.begin("vm", DESTINATION, **options)
    await until(lambda: _listens(farm, migration), "the destination listens")
    qemu = _stand_still(farm, stack, DESTINATION)
    restore_wire(farm)
    await _source_is(farm, migration, SourceState.AWAITING_COMMIT)
    if moment is Moment.STATE_SENT:
        return migration
    stack.callback(farm.kill_daemon, CONTROLLER, signal.SIGCONT)
    farm.kill_daemon(CONTROLLER, signal.SIGSTOP)
    _signal(qemu, signal.SIGCONT)
    await _destination_is(farm, migration, DestinationState.COMMITTING)
    if moment is Moment.COMMIT_ASKED:
        return migration
    _signal(qemu, signal.SIGSTOP)
    farm.kill_daemon(CONTROLLER, signal.SIGCONT)
    await _destination_is(farm, migration, DestinationState.RESUMING)
    await _source_is(farm, migration, SourceState.COMMITTED)
    return migration


def _stand_still(farm: Farm, stack: AsyncExitStack, host: str) -> int:
    """Stop a host's QEMU until the stack ends. Returns its process's descriptor."""
    qemu = os.pidfd_open(farm.qemu_pid("vm", host))
    stack.callback(os.close, qemu)
    stack.callback(_signal, qemu, signal.SIGCONT)
    _signal(qemu, signal.SIGSTOP)
    return qemu


def cut_wire(farm: Farm) -> None:
    """Lose all that the two ends send to each other; both still reach the controller."""
    cut_direction(farm, SOURCE, DESTINATION)
    cut_direction(farm, DESTINATION, SOURCE)


def cut_direction(farm: Farm, sender: str, receiver: str) -> None:
    """Lose all that one host sends to the other."""
    namespaces.lose_everything(farm.lab[sender].namespace, farm.lab[receiver].address)


def restore_wire(farm: Farm) -> None:
    """The end of `cut_wire` and `cut_direction`."""
    namespaces.lose_nothing(farm.lab[SOURCE].namespace, farm.lab[DESTINATION].address)
    namespaces.lose_nothing(farm.lab[DESTINATION].namespace, farm.lab[SOURCE].address)


def folder_of(farm: Farm, migration: str, role: Role) -> MoverFolder:
    """The folder of the mover at one end."""
    host = SOURCE if role is Role.SOURCE else DESTINATION
    return MoverFolder.of(farm.lab[host].state_dir / "migrations", migration, role)


async def _source_is(farm: Farm, migration: str, state: SourceState) -> None:
    await _mover_is(farm, migration, Role.SOURCE, state)


async def _destination_is(farm: Farm, migration: str, state: DestinationState) -> None:
    await _mover_is(farm, migration, Role.DESTINATION, state)


async def _mover_is(farm: Farm, migration: str, role: Role, state: str) -> None:
    try:
        await until(lambda: _was(farm, migration, role, state), f"the {role} is {state}", REACHED_LIMIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{farm.traces()}") from None


async def _was(farm: Farm, migration: str, role: Role, state: str) -> bool:
    journal = folder_of(farm, migration, role).journal_file
    if not journal.exists():
        return False
    lines = [line for line in journal.read_text().splitlines() if line.endswith("}")]
    return state in [json.loads(line).get("state") for line in lines]


async def _listens(farm: Farm, migration: str) -> bool:
    """Whether the source was told where, which is the last step of the preparation."""
    return folder_of(farm, migration, Role.SOURCE).job_file.exists()


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)
