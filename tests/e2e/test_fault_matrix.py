"""Each fault at each moment, for each order of transfer: what must happen, and what did.

Three hosts: the VM moves from alpha to beta, and the controller is on gamma, so that it and either daemon die
apart. `make test` takes a sample of the cells, `make faults` all of them; either writes what it saw to
build/faults.json, from which docs/faults.py fills in the table of docs/FAULTS.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.e2e.boot_guest import read_sweeps
from tests.e2e.farm import Farm, until
from tests.e2e.fault_moments import CONTROLLER, DESTINATION, SOURCE, Moment, held
from tests.e2e.fault_strikes import FAULTS, HERE, LOST, THERE, Scene

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab
from transhume.model.migration import Migration, Mode, Outcome

pytestmark = pytest.mark.timeout(240)

RECORDS = Path("build/faults.json")

COLUMNS = [
    (Mode.PRE_COPY, Moment.PREPARED),
    (Mode.PRE_COPY, Moment.PRECOPY),
    (Mode.PRE_COPY, Moment.SUSPENDED),
    (Mode.PRE_COPY, Moment.STATE_SENT),
    (Mode.PRE_COPY, Moment.COMMIT_ASKED),
    (Mode.PRE_COPY, Moment.COMMITTED),
    (Mode.HYBRID, Moment.PAGING),
    (Mode.POST_COPY, Moment.COMMIT_ASKED),
    (Mode.POST_COPY, Moment.PAGING),
]
CELLS = [
    (mode, moment, fault)
    for mode, moment in COLUMNS
    for fault, known in FAULTS.items()
    if moment in known.wanted
]
SAMPLE = [
    (Mode.POST_COPY, Moment.PAGING, "destination's QEMU killed"),
    (Mode.HYBRID, Moment.PAGING, "frame of pages damaged"),
    (Mode.POST_COPY, Moment.COMMIT_ASKED, "destination's mover killed"),
]
CHOSEN = CELLS if os.environ.get("FAULTS") == "all" else SAMPLE


@pytest.fixture(scope="module")
def running_farm(guest: Guest) -> Iterator[Farm]:
    """Three hosts, the controller on one that no VM touches."""
    disks = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    disks.chmod(0o755)
    try:
        with Lab((CONTROLLER, SOURCE, DESTINATION)) as lab:
            farm = Farm(lab, disks, guest)
            asyncio.run(farm.form())
            yield farm
    finally:
        shutil.rmtree(disks, ignore_errors=True)


@pytest_asyncio.fixture
async def farm(running_farm: Farm) -> AsyncIterator[Farm]:
    """The farm, cleared before and after each test; what one cell left over is not the next one's fault."""
    await running_farm.clear()
    yield running_farm
    try:
        await running_farm.clear()
    except AssertionError:
        for host in running_farm.lab.hosts:
            shutil.rmtree(host.vm_dir("vm"), ignore_errors=True)
        raise


@pytest.mark.parametrize(("mode", "moment", "fault"), CHOSEN)
async def test_fault(farm: Farm, mode: Mode, moment: Moment, fault: str) -> None:
    known = FAULTS[fault]
    began_s = time.monotonic()
    await farm.boot("vm", SOURCE)
    async with AsyncExitStack() as stack:
        scene = Scene(farm, moment, stack)
        if known.set_up is not None:
            await known.set_up(scene)
        async with held(farm, mode, moment) as migration:
            scene.migration = migration
            await known.strike(scene)
        await farm.hurry(migration)
        record = await farm.ended(migration)
    where = await _judge(farm, record)
    wanted = known.wanted[moment]
    _write_down(
        {"mode": mode.value, "moment": moment.value, "fault": fault},
        {"must": wanted, "did": where, "said": record.error, "took_s": round(time.monotonic() - began_s, 1)},
    )
    assert where in wanted.split(" or "), record


async def _judge(farm: Farm, record: Migration) -> str:
    """Where the VM runs: exactly there, whole, with nothing left elsewhere, and able to move again."""
    runs = farm.runs_on("vm")
    if runs:
        (host,) = runs
        assert record.outcome is (Outcome.COMPLETED if host == DESTINATION else Outcome.FAILED), record
        assert record.runs_at.endswith(f" host {host}") or f" host {host}," in record.runs_at, record
        where = THERE if host == DESTINATION else HERE
    else:
        assert record.runs_at.startswith("nowhere"), record.runs_at
        assert record.error
        assert record.outcome is Outcome.FAILED
        host = (await farm.vm("vm")).ownership.owner
        await _boot_again(farm, host)
        where = LOST
    assert record.outcome is Outcome.COMPLETED or record.error, record
    other = SOURCE if host == DESTINATION else DESTINATION
    await farm.assert_sound("vm", host)
    await farm.assert_nothing_left("vm", other)
    await until(lambda: _no_mover_is_left(farm, host), f"{host} has no mover's folder")
    again = await farm.migrate("vm", other, verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", other)
    await farm.assert_nothing_left("vm", host)
    return where


async def _boot_again(farm: Farm, host: str) -> None:
    async with farm.client() as client:
        await client.start_vm("vm")
    assert farm.runs_on("vm") == [host]

    async def sweeps() -> bool:
        return (await read_sweeps(farm.vm_dir("vm", host))).newest > 2

    await until(sweeps, "the guest sweeps")


async def _no_mover_is_left(farm: Farm, host: str) -> bool:
    return not list((farm.lab[host].state_dir / "migrations").iterdir())


def _write_down(cell: dict[str, str], seen: dict[str, Any]) -> None:
    RECORDS.parent.mkdir(exist_ok=True)
    known = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    known = [entry for entry in known if {key: entry.get(key) for key in cell} != cell]
    known.append({**cell, **seen})
    RECORDS.write_text(json.dumps(known, indent=1) + "\n")
