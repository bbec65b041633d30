"""Each fault in each phase that lasts, for each order of transfer: what must happen, and what did.

`make test` takes a sample of the cells, `make faults` all of them; either writes what it saw to
build/faults.json, from which docs/faults.py fills in the table of docs/FAULTS.md. The phases around the
commit last milliseconds: those are the simulator's, and single tests with a held register.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.farm import Farm

from transhume.migration.driver.job import Role
from transhume.model.migration import Migration, Mode, Outcome, Phase
from transhume.model.orders import Adjustment

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 128 << 10
SILENCE_LIMIT_S = 2.0
SHORT_S = 1.0
LONG_S = 4.0
"""Shorter and longer than the silence limit of these migrations."""

RECORDS = Path("build/faults.json")

SOURCE, DESTINATION, LOST = "source", "destination", "nowhere"
EITHER = "source or destination"

Strike = Callable[[Farm, str], Awaitable[None]]


async def _kill_mover(farm: Farm, migration: str, host: str, role: Role) -> None:
    os.kill(farm.mover_pid(migration, host, role), signal.SIGKILL)


async def _source_mover(farm: Farm, migration: str) -> None:
    await _kill_mover(farm, migration, "alpha", Role.SOURCE)


async def _destination_mover(farm: Farm, migration: str) -> None:
    await _kill_mover(farm, migration, "beta", Role.DESTINATION)


async def _daemon(farm: Farm, host: str) -> None:
    farm.kill_daemon(host)
    await farm.daemon_gone(host)
    await farm.start_daemon(host)


async def _source_daemon(farm: Farm, migration: str) -> None:
    await _daemon(farm, "alpha")


async def _destination_daemon(farm: Farm, migration: str) -> None:
    await _daemon(farm, "beta")


async def _source_qemu(farm: Farm, migration: str) -> None:
    os.kill(farm.qemu_pid("vm", "alpha"), signal.SIGKILL)


async def _destination_qemu(farm: Farm, migration: str) -> None:
    os.kill(farm.qemu_pid("vm", "beta"), signal.SIGKILL)


async def _silent_register(farm: Farm, migration: str) -> None:
    farm.kill_daemon("alpha", signal.SIGSTOP)
    await asyncio.sleep(LONG_S)
    farm.kill_daemon("alpha", signal.SIGCONT)


async def _short_cut(farm: Farm, migration: str) -> None:
    farm.lab.cut()
    await asyncio.sleep(SHORT_S)
    farm.lab.restore()


async def _long_cut(farm: Farm, migration: str) -> None:
    farm.lab.cut()
    await asyncio.sleep(LONG_S)
    farm.lab.restore()


async def _half_open(farm: Farm, migration: str) -> None:
    """The connection stands and nobody is behind it."""
    mover = farm.mover_pid(migration, "beta", Role.DESTINATION)
    os.kill(mover, signal.SIGSTOP)
    await asyncio.sleep(LONG_S)
    os.kill(mover, signal.SIGCONT)


async def _slow_link(farm: Farm, migration: str) -> None:
    farm.lab.shape(rate_bits_s=1_000_000)
    await asyncio.sleep(LONG_S)
    farm.lab.shape()


FAULTS: dict[str, tuple[Strike, str, str]] = {
    "source's mover killed": (_source_mover, SOURCE, DESTINATION),
    "destination's mover killed": (_destination_mover, SOURCE, DESTINATION),
    "source's daemon, with the controller, killed": (_source_daemon, DESTINATION, DESTINATION),
    "destination's daemon killed": (_destination_daemon, DESTINATION, DESTINATION),
    "register silent": (_silent_register, DESTINATION, DESTINATION),
    "source's QEMU killed": (_source_qemu, LOST, DESTINATION),
    "destination's QEMU killed": (_destination_qemu, SOURCE, LOST),
    "link cut, shortly": (_short_cut, EITHER, DESTINATION),
    "link cut, longer than the silence limit": (_long_cut, SOURCE, DESTINATION),
    "half-open link": (_half_open, SOURCE, DESTINATION),
    "link of 1 Mbit/s": (_slow_link, EITHER, DESTINATION),
}
"""What strikes, and where the VM must run then: struck in the pre-copy, and while pages are owed."""

MODES: dict[str, dict[str, Any]] = {
    "pre-copy": {"mode": Mode.PRE_COPY},
    "post-copy": {"mode": Mode.POST_COPY},
    "hybrid": {"mode": Mode.HYBRID},
}
CELLS = [
    (mode, phase, fault)
    for mode, phases in (
        ("pre-copy", (Phase.PRECOPY,)),
        ("hybrid", (Phase.PRECOPY, Phase.PAGING)),
        ("post-copy", (Phase.PAGING,)),
    )
    for phase in phases
    for fault in FAULTS
]
SAMPLE = [
    ("post-copy", Phase.PAGING, "destination's QEMU killed"),
    ("hybrid", Phase.PRECOPY, "link cut, longer than the silence limit"),
    ("post-copy", Phase.PAGING, "half-open link"),
]
CHOSEN = CELLS if os.environ.get("FAULTS") == "all" else SAMPLE


@pytest.mark.parametrize(("mode", "phase", "fault"), CHOSEN)
async def test_fault(farm: Farm, mode: str, phase: Phase, fault: str) -> None:
    strike, in_precopy, in_paging = FAULTS[fault]
    wanted = in_paging if phase is Phase.PAGING else in_precopy
    await farm.boot("vm")
    migration = await farm.begin(
        "vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S, peer_silence_limit_s=SILENCE_LIMIT_S, **MODES[mode]
    )
    if phase is Phase.PAGING and mode == "hybrid":
        await farm.adjust(migration, Adjustment(switch_to_post_copy=True))
    await farm.in_phase(migration, phase)
    await strike(farm, migration)
    await farm.hurry(migration)
    record = await farm.ended(migration)
    where = await _judge(farm, record)
    _write_down(mode, phase, fault, wanted, where, record)
    assert where in wanted.split(" or "), record


async def _judge(farm: Farm, record: Migration) -> str:
    """Where the VM runs: exactly there, whole, with nothing left elsewhere, and able to move again."""
    runs = farm.runs_on("vm")
    if not runs:
        assert record.runs_at.startswith("nowhere"), record.runs_at
        assert record.error
        assert record.outcome is Outcome.FAILED
        owner = (await farm.vm("vm")).ownership.owner
        async with farm.client() as client:
            await client.start_vm("vm")
        assert farm.runs_on("vm") == [owner]
        return LOST
    (host,) = runs
    other = "beta" if host == "alpha" else "alpha"
    assert record.outcome is (Outcome.COMPLETED if host == "beta" else Outcome.FAILED), record
    await farm.assert_sound("vm", host)
    await farm.assert_nothing_left("vm", other)
    again = await farm.migrate("vm", other, verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", other)
    return DESTINATION if host == "beta" else SOURCE


def _write_down(mode: str, phase: Phase, fault: str, wanted: str, where: str, record: Migration) -> None:
    RECORDS.parent.mkdir(exist_ok=True)
    known = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    cell = {"mode": mode, "phase": phase.value, "fault": fault}
    known = [entry for entry in known if {key: entry[key] for key in cell} != cell]
    known.append({**cell, "must": wanted, "did": where, "said": record.error})
    RECORDS.write_text(json.dumps(known, indent=1) + "\n")
