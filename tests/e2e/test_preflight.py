"""What is looked at before a byte moves, on real hosts: every reason in words, all at once, nothing changed.

Reasons that two hosts of one machine cannot have (another QEMU, fewer CPU flags, an old kernel) are shown
from facts in tests/farm/test_preflight.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.farm import Farm, until

from transhume.farm.pool import VMM_OVERHEAD_BYTES
from transhume.model.errors import NotFound, PreflightFailed
from transhume.model.migration import DryRun, Engine, MigrationOptions, Outcome, Phase
from transhume.model.vm import Disk, VmState
from transhume.vmm.capabilities import memory

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 128 << 10


async def dry_run(farm: Farm, to: str | None = "beta", **options: Any) -> DryRun:
    async with farm.client() as client:
        return await client.dry_run("vm", to, MigrationOptions(**options))


async def reasons_against(farm: Farm, to: str | None = "beta", **options: Any) -> tuple[str, ...]:
    """Ask for the migration itself: it is refused, and neither a record nor anything else is left of it."""
    async with farm.client() as client:
        before = await client.migrations()
        with pytest.raises(PreflightFailed) as refused:
            await client.migrate("vm", to, MigrationOptions(**options))
        assert await client.migrations() == before
        assert (await client.vm("vm")).migration == ""
    await farm.assert_nothing_left("vm", "beta")
    assert "cannot move" in refused.value.message
    assert "it runs on alpha as before" in refused.value.message
    return refused.value.reasons


@asynccontextmanager
async def unmounted(farm: Farm, host: str, folder: Path) -> AsyncIterator[None]:
    """Let a host see an empty folder where the others see the shared disks: nothing is mounted there."""
    await stop_daemon(farm, host)
    daemon = farm.lab[host].transhume_command()[:2]
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    state_dir = farm.lab[host].state_dir
    farm.lab[host].start(
        *("unshare", "--mount", "--", "sh", "-c", script, "sh", str(folder)),
        *(*daemon, "transhume.daemon", "--state-dir", str(state_dir)),
    )
    try:
        await until(lambda: farm._answers(host), f"the daemon of {host} answers")
        yield
    finally:
        await stop_daemon(farm, host)
        await farm.start_daemon(host)


async def stop_daemon(farm: Farm, host: str) -> None:
    farm.kill_daemon(host, signal.SIGKILL)
    await farm.daemon_gone(host)


def more_than_there_is() -> int:
    """Nearly all that the pool promises of a host: more than the other has left beside its own work."""
    promised_bytes = memory().total_bytes - (512 << 20) - VMM_OVERHEAD_BYTES
    return (promised_bytes - (8 << 20)) >> 20 << 20


def direct(farm: Farm) -> tuple[Disk, ...]:
    return (Disk(path=str(farm.disks / "vm.img"), cache_direct=True),)


async def test_a_dry_run_predicts_and_moves_nothing(farm: Farm) -> None:
    await farm.boot("vm")
    newest = await farm.assert_sound("vm", "alpha")
    async with farm.client() as client:
        before = await client.migrations()
    found = await dry_run(farm)
    assert (found.vm, found.source, found.destination) == ("vm", "alpha", "beta")
    assert found.reasons == ()
    assert found.wire_bytes is not None
    assert (100 << 10) < found.wire_bytes < (48 << 20)
    assert found.total_ms is not None
    assert found.downtime_ms is not None
    assert 0 < found.downtime_ms <= found.total_ms
    assert found.dirty_rate_bytes_s is not None
    assert found.dirty_rate_bytes_s > 0
    assert found.link_rate_bytes_s is not None
    assert found.sample_ms is not None
    assert "MB/s" in found.verdict
    async with farm.client() as client:
        assert await client.migrations() == before
    assert (await farm.vm("vm")).ownership.epoch == 1
    await farm.assert_nothing_left("vm", "beta")
    await farm.assert_sound("vm", "alpha", newest)


async def test_a_dry_run_knows_the_limits_that_were_asked_for(farm: Farm) -> None:
    await farm.boot("vm")
    found = await dry_run(farm, bandwidth_bytes_s=SLOW_BYTES_S, max_downtime_ms=1.0)
    assert found.link_rate_bytes_s == SLOW_BYTES_S
    assert found.downtime_ms is not None
    assert found.downtime_ms > 1.0
    assert "will switch with about" in found.verdict


async def test_without_a_name_the_other_host_is_chosen(farm: Farm) -> None:
    await farm.boot("vm")
    found = await dry_run(farm, to=None)
    assert found.destination == "beta"
    assert found.reasons == ()


async def test_the_host_where_it_runs(farm: Farm) -> None:
    await farm.boot("vm")
    [reason] = await reasons_against(farm, "alpha")
    assert reason == "VM vm runs on alpha already; name another host with --to"


async def test_hosts_and_vms_that_are_none(farm: Farm) -> None:
    await farm.boot("vm")
    async with farm.client() as client:
        for ask in (client.migrate, client.dry_run):
            with pytest.raises(NotFound, match="the farm has no host gamma"):
                await ask("vm", "gamma", MigrationOptions())
            with pytest.raises(NotFound, match="the farm has no VM other"):
                await ask("other", "beta", MigrationOptions())


async def test_a_vm_that_does_not_run(farm: Farm) -> None:
    spec = await farm.boot("vm")
    async with farm.client() as client:
        await client.kill_vm("vm")
        for _ in ("stopped", "never started"):
            [reason] = await reasons_against(farm)
            assert "VM vm is stopped on alpha and only a running VM can move live" in reason
            assert "transhume vm start vm" in reason
            found = await dry_run(farm)
            assert found.reasons == (reason,)
            assert found.verdict.startswith("no prediction: ")
            await client.delete_vm("vm")
            assert (await client.create_vm(spec, "alpha")).state is VmState.STOPPED


async def test_a_vm_that_is_moving(farm: Farm) -> None:
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S)
    await farm.in_phase(migration, Phase.PRECOPY)
    found = await dry_run(farm)
    assert any(f"VM vm is already migrating ({migration})" in reason for reason in found.reasons)
    assert found.verdict.startswith("no prediction: ")
    async with farm.client() as client:
        assert (await client.migration(migration)).outcome is Outcome.RUNNING, "it goes on undisturbed"
        assert (await client.cancel(migration)).accepted
    await farm.ended(migration)


async def test_a_disk_that_bypasses_the_page_cache(farm: Farm) -> None:
    """Our engine refuses it; QEMU's own may and does move it."""
    await farm.boot("vm", disks=direct(farm))
    [reason] = await reasons_against(farm)
    assert "vm.img has cache.direct=on" in reason
    assert (await dry_run(farm)).reasons == (reason,)
    assert (await dry_run(farm, engine=Engine.QEMU)).reasons == ()
    newest = await farm.assert_sound("vm", "alpha")
    record = await farm.migrate("vm", "beta", engine=Engine.QEMU)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "beta", newest)


async def test_a_disk_that_the_other_host_may_not_write(farm: Farm) -> None:
    await farm.boot("vm")
    disk = farm.disks / "vm.img"
    os.chown(disk, 0, 0)
    disk.chmod(0o644)
    [reason] = await reasons_against(farm)
    assert f"may not write {disk}" in reason


async def test_a_host_whose_daemon_does_not_answer(farm: Farm) -> None:
    await farm.boot("vm")
    await stop_daemon(farm, "beta")
    [reason] = await reasons_against(farm)
    assert reason.startswith("host beta does not answer")
    assert "transhume up" in reason
    await farm.start_daemon("beta")
    assert (await dry_run(farm)).reasons == ()


async def test_too_little_memory_there(farm: Farm) -> None:
    await farm.boot("vm", memory_bytes=more_than_there_is())
    [reason] = await reasons_against(farm)
    assert "MiB of memory available" in reason
    assert "host beta has" in reason
    assert "VM vm needs" in reason


async def test_all_reasons_come_at_once_and_a_disk_that_is_not_reached_is_one(farm: Farm) -> None:
    await farm.boot("vm", memory_bytes=more_than_there_is(), disks=direct(farm))
    async with unmounted(farm, "beta", farm.disks):
        direct_disk, too_little, not_there = await reasons_against(farm)
        assert "cache.direct=on" in direct_disk
        assert "of memory available" in too_little
        assert not_there == f"{farm.disks / 'vm.img'} is not there: make it reachable under this path"
        # The first holds for one engine only, and the others for one host only, which is then named.
        assert len(await reasons_against(farm, engine=Engine.QEMU)) == 2
        named = await reasons_against(farm, to=None)
        assert [reason.startswith("to beta: ") for reason in named] == [False, True, True]
    await farm.assert_sound("vm", "alpha")
