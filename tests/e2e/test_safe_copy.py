"""With a safe copy a VM outlives its source, although part of its memory was still there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.e2e.farm import Farm, until

from transhume.migration.driver.job import Role
from transhume.model.errors import PreflightFailed
from transhume.model.migration import Migration, Mode, Outcome, Phase

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 128 << 10


async def _paging(farm: Farm) -> str:
    """From beta, so that the controller outlives the source host."""
    await farm.boot("vm", "beta")
    migration = await farm.begin(
        "vm",
        "alpha",
        mode=Mode.POST_COPY,
        bandwidth_bytes_s=SLOW_BYTES_S,
        peer_silence_limit_s=2.0,
        safe_dir=str(farm.disks),
    )
    await farm.in_phase(migration, Phase.PAGING)
    return migration


async def _copied(farm: Farm, migration: str) -> None:
    async def complete() -> bool:
        async with farm.client() as client:
            paging = (await client.migration(migration)).report.paging
        return paging is not None and paging.safe_copy_ms is not None

    await until(complete, "the safe copy is complete")


def _copies(farm: Farm) -> list[Path]:
    return list(farm.disks.glob("*.pages"))


async def _ended(farm: Farm, migration: str) -> Migration:
    """As the controller has it: the folders of a host that is down stay until it comes back."""

    async def over() -> Migration | None:
        async with farm.client() as client:
            record = await client.migration(migration)
        return record if record.outcome is not Outcome.RUNNING else None

    record: Migration = await until(over, "the migration has ended")
    return record


async def test_a_vm_outlives_its_source_host(farm: Farm) -> None:
    migration = await _paging(farm)
    await _copied(farm, migration)
    assert [path.stat().st_mode & 0o777 for path in _copies(farm)] == [0o600]
    farm.kill_daemon("beta")
    os.kill(farm.mover_pid(migration, "beta", Role.SOURCE), signal.SIGKILL)
    os.kill(farm.qemu_pid("vm", "beta"), signal.SIGKILL)
    record = await _ended(farm, migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.runs_at == "destination host alpha"
    assert record.report.paging is not None
    assert record.report.paging.restored_pages > 50
    assert record.report.paging.link_lost_ms > 0
    await farm.assert_sound("vm", "alpha")
    assert _copies(farm) == []
    await farm.start_daemon("beta")
    await farm.ended(migration)
    await farm.assert_nothing_left("vm", "beta")
    again = await farm.migrate("vm", "beta", verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error


async def test_a_source_that_comes_back_without_its_memory_learns_that_it_was_not_needed(farm: Farm) -> None:
    """QEMU and its mover die, the daemon lives: the successor finds no memory, and the copy is enough."""
    migration = await _paging(farm)
    await _copied(farm, migration)
    os.kill(farm.qemu_pid("vm", "beta"), signal.SIGKILL)
    os.kill(farm.mover_pid(migration, "beta", Role.SOURCE), signal.SIGKILL)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")
    assert _copies(farm) == []


async def test_the_copy_goes_on_behind_a_movers_death(farm: Farm) -> None:
    migration = await _paging(farm)
    victim = farm.mover_pid(migration, "beta", Role.SOURCE)
    os.kill(victim, signal.SIGKILL)
    await _copied(farm, migration)
    await farm.hurry(migration)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "alpha")
    assert _copies(farm) == []


async def test_a_folder_that_is_not_there_is_refused_before_a_byte_moves(farm: Farm) -> None:
    await farm.boot("vm")
    with pytest.raises(PreflightFailed) as refused:
        await farm.begin("vm", "beta", mode=Mode.POST_COPY, safe_dir="/nowhere/at-all")
    assert "cannot be used: No such file or directory" in str(refused.value.reasons)
    await farm.assert_sound("vm", "alpha")
