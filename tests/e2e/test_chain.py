"""Many moves: one VM from host to host and back, and many VMs at once in both directions.

Three hosts. A VM that still lacks pages of its last move is asked to move on at once: that waits, and begins
by itself.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.e2e.boot_guest import fill_still_pages, read_still_pages, read_sweeps
from tests.e2e.farm import Farm, until

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab
from transhume.demo.observer import Observer
from transhume.model.errors import Conflict
from transhume.model.migration import (
    LEAST_BANDWIDTH_BYTES_S,
    Migration,
    MigrationOptions,
    Mode,
    Outcome,
    Phase,
)
from transhume.model.vm import Ownership

pytestmark = pytest.mark.timeout(240)

HOSTS = ("alpha", "beta", "gamma")
SLOW_BYTES_S = 128 << 10
"""A push so slow that pages are owed until it is told to hurry."""

STILL_PAGES = 1024
"""So much for each VM to move that none is over before all have begun."""

MODES = (Mode.PRE_COPY, Mode.POST_COPY, Mode.HYBRID, Mode.AUTO)


@pytest.fixture(scope="module")
def running_farm_of_three(guest: Guest) -> Iterator[Farm]:
    """Three hosts in network namespaces of their own, joined by a switch."""
    disks = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    disks.chmod(0o755)
    try:
        with Lab(HOSTS) as lab:
            farm = Farm(lab, disks, guest)
            asyncio.run(farm.form())
            yield farm
    finally:
        shutil.rmtree(disks, ignore_errors=True)


@pytest_asyncio.fixture
async def three(running_farm_of_three: Farm) -> AsyncIterator[Farm]:
    """The farm of three, cleared before and after each test."""
    await running_farm_of_three.clear()
    yield running_farm_of_three
    await running_farm_of_three.clear()


async def _request(farm: Farm, vm: str, to: str, **options: Any) -> Migration:
    async with farm.client() as client:
        return await client.migrate(vm, to, MigrationOptions(**options))


async def _move_on(farm: Farm, migration: str, to: str, **options: Any) -> str:
    """Ask for the next move while pages of this one are owed, then let this one end. The next one's id."""
    await farm.in_phase(migration, Phase.PAGING)
    queued = await _request(farm, "vm", to, **options)
    assert (queued.phase, queued.behind) == (Phase.QUEUED, migration)
    with pytest.raises(Conflict, match=queued.id):
        await _request(farm, "vm", "alpha")
    await farm.in_phase(migration, Phase.PAGING)
    await farm.in_phase(queued.id, Phase.QUEUED)
    await farm.hurry(migration)
    return queued.id


async def _ended_well(farm: Farm, migration: str, here: str, there: str) -> Migration:
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert (record.source, record.destination) == (here, there)
    assert record.runs_at == f"destination host {there}"
    await farm.assert_nothing_left("vm", here)
    return record


async def test_a_guest_goes_from_host_to_host_and_back_without_waiting_for_its_pages(three: Farm) -> None:
    farm = three
    await farm.boot_linux("vm", append="workload.rate_pages_s=2000", cpus=2)
    logs = [farm.vm_dir("vm", host) / "serial.log" for host in HOSTS]
    with Observer(logs) as observer:
        observer.wait_until_ready(60)
        first = (await _request(farm, "vm", "beta", mode=Mode.POST_COPY, bandwidth_bytes_s=SLOW_BYTES_S)).id
        second = await _move_on(
            farm, first, "gamma", mode=Mode.HYBRID, iterations=1, bandwidth_bytes_s=16 << 20
        )
        posted = await _ended_well(farm, first, "alpha", "beta")
        third = await _move_on(farm, second, "alpha", mode=Mode.PRE_COPY, post_copy=False, verify=True)
        mixed = await _ended_well(farm, second, "beta", "gamma")
        copied = await _ended_well(farm, third, "gamma", "alpha")
        observer.wait_for_full_verification(60)
        corrupt = observer.ask(lambda timeline: [tick.corrupt for tick in timeline.ticks()])
    assert set(corrupt) == {0}
    for record in (posted, mixed):
        assert record.report.paging is not None
        assert record.report.paging.owed_pages > 0
    assert copied.report.paging is None
    assert copied.report.downtime.verify_ms > 0
    vm = await farm.vm("vm")
    assert vm.ownership == Ownership(owner="alpha", epoch=4)
    assert (vm.migration, vm.queued) == ("", "")
    assert farm.runs_on("vm") == ["alpha"]


async def test_a_queued_move_that_is_cancelled_leaves_the_vm_where_it_went(three: Farm) -> None:
    farm = three
    await farm.boot("vm")
    first = (await _request(farm, "vm", "beta", mode=Mode.POST_COPY, bandwidth_bytes_s=SLOW_BYTES_S)).id
    await farm.in_phase(first, Phase.PAGING)
    queued = await _request(farm, "vm", "gamma")
    async with farm.client("gamma") as client:
        reply = await client.cancel("vm")
    assert (reply.accepted, reply.migration, reply.behind) == (True, queued.id, first)
    await farm.hurry(first)
    await _ended_well(farm, first, "alpha", "beta")
    assert (await farm.ended(queued.id)).outcome is Outcome.CANCELLED
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "gamma")


async def test_a_queued_move_outlives_the_controller(three: Farm) -> None:
    farm = three
    await farm.boot("vm")
    first = (await _request(farm, "vm", "beta", mode=Mode.POST_COPY, bandwidth_bytes_s=SLOW_BYTES_S)).id
    await farm.in_phase(first, Phase.PAGING)
    queued = await _request(farm, "vm", "gamma")
    farm.kill_daemon("alpha")
    await farm.daemon_gone("alpha")
    await farm.start_daemon("alpha")
    await farm.in_phase(queued.id, Phase.QUEUED)
    await farm.hurry(first)
    await _ended_well(farm, first, "alpha", "beta")
    await _ended_well(farm, queued.id, "beta", "gamma")
    await farm.assert_sound("vm", "gamma")


async def test_eight_vms_move_at_once_in_both_directions(three: Farm) -> None:
    farm = three
    moves = [
        (f"vm-{here}-{mode.value}", here, there, mode)
        for mode in MODES
        for here, there in (("alpha", "beta"), ("beta", "alpha"))
    ]
    await asyncio.gather(*(farm.boot(vm, here, calm=True, memory_bytes=32 << 20) for vm, here, _, _ in moves))
    still = {vm: fill_still_pages(farm.vm_dir(vm, here), STILL_PAGES) for vm, here, _, _ in moves}
    newest = {vm: (await read_sweeps(farm.vm_dir(vm, here))).newest for vm, here, _, _ in moves}
    asked = await asyncio.gather(
        *(
            _request(farm, vm, there, mode=mode, bandwidth_bytes_s=LEAST_BANDWIDTH_BYTES_S)
            for vm, _, there, mode in moves
        )
    )
    await asyncio.gather(*(_under_way(farm, migration.id) for migration in asked))
    async with farm.client() as client:
        together = [await client.migration(migration.id) for migration in asked]
    assert [record.outcome for record in together] == [Outcome.RUNNING] * len(moves)
    await asyncio.gather(*(farm.hurry(migration.id) for migration in asked))
    records = await asyncio.gather(*(farm.ended(migration.id) for migration in asked))
    for record, (vm, here, there, mode) in zip(records, moves, strict=True):
        assert record.outcome is Outcome.COMPLETED, f"{vm}: {record.error}"
        assert record.runs_at == f"destination host {there}"
        assert mode is not Mode.POST_COPY or record.report.paging is not None
        await farm.assert_sound(vm, there, newest[vm])
        assert read_still_pages(farm.vm_dir(vm, there), STILL_PAGES) == still[vm].content
        await farm.assert_nothing_left(vm, here)


async def _under_way(farm: Farm, migration: str) -> None:
    """Wait until memory moves."""

    async def moves() -> bool:
        async with farm.client() as client:
            record = await client.migration(migration)
        assert record.outcome is Outcome.RUNNING, record.error
        return record.phase not in (Phase.REQUESTED, Phase.PREPARED)

    await until(moves, f"migration {migration} is under way")
