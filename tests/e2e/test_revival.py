"""A destination that is lost while pages are owed: the VM comes back as it was suspended.

When a person says so and never by itself, never while the destination answers; and a destination that returns
ends what it still has.
"""

from __future__ import annotations

import os
import signal

import pytest
from tests.e2e.farm import Farm, until

from transhume.demo.observer import Observer
from transhume.farm.revival import Revival
from transhume.migration.driver.job import Role
from transhume.migration.source import REVIVED
from transhume.model.errors import Conflict
from transhume.model.migration import Mode, Outcome, Phase

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 128 << 10
SILENCE_LIMIT_S = 2.0


async def _paging(farm: Farm, without_disks: bool = False) -> str:
    if without_disks:
        await farm.boot_linux("vm")
        with Observer([farm.vm_dir("vm", "alpha") / "serial.log"]) as observer:
            observer.wait_until_ready(60)
    else:
        await farm.boot("vm")
    migration = await farm.begin(
        "vm",
        "beta",
        mode=Mode.POST_COPY,
        bandwidth_bytes_s=SLOW_BYTES_S,
        peer_silence_limit_s=SILENCE_LIMIT_S,
    )
    await farm.in_phase(migration, Phase.PAGING)
    async with farm.client() as client:
        with pytest.raises(Conflict, match="only from a host that is lost"):
            await client.revival("vm")
    return migration


async def _offer(farm: Farm) -> Revival:
    """The offer, as soon as the destination counts as silent."""

    async def offered() -> Revival | None:
        async with farm.client() as client:
            try:
                return await client.revival("vm")
            except Conflict:
                return None

    offer: Revival = await until(offered, "the VM can be taken back")
    return offer


async def _revive(farm: Farm, migration: str) -> None:
    offer = await _offer(farm)
    assert (offer.migration, offer.source, offer.destination) == (migration, "alpha", "beta")
    assert offer.age_s is not None
    assert 5.0 < offer.age_s < 60.0
    assert offer.silent_s > 0
    assert any("run twice" in warning for warning in offer.warnings)
    async with farm.client() as client:
        with pytest.raises(Conflict, match="went on writing its disks"):
            await client.revive("vm")
        reply = await client.revive("vm", despite_disks=True)
        assert reply.revived
        assert reply.runs_at == "source host alpha"


async def test_a_vm_comes_back_from_a_host_that_died(farm: Farm) -> None:
    migration = await _paging(farm)
    farm.kill_daemon("beta")
    os.kill(farm.mover_pid(migration, "beta", Role.DESTINATION), signal.SIGKILL)
    os.kill(farm.qemu_pid("vm", "beta"), signal.SIGKILL)
    await _revive(farm, migration)

    async def over() -> bool:
        async with farm.client() as client:
            return (await client.migration(migration)).outcome is not Outcome.RUNNING

    await until(over, "the record says how it ended")
    async with farm.client() as client:
        record = await client.migration(migration)
    assert (record.outcome, record.error_code) == (Outcome.FAILED, REVIVED)
    assert record.runs_at == "source host alpha"
    await farm.assert_sound("vm", "alpha")
    await farm.start_daemon("beta")
    await farm.ended(migration)
    await farm.assert_nothing_left("vm", "beta")
    again = await farm.migrate("vm", "beta", verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", "beta")


async def test_a_vm_whose_disks_are_still_written_is_not_taken_back(farm: Farm) -> None:
    migration = await _paging(farm)
    farm.lab.cut()
    await _offer(farm)
    async with farm.client() as client:
        with pytest.raises(Conflict, match="is open for writing"):
            await client.revive("vm", despite_disks=True)
    assert farm.runs_on("vm") == ["alpha", "beta"]
    farm.lab.restore()
    await farm.hurry(migration)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "beta")


async def test_a_host_that_was_only_cut_off_ends_what_was_taken_from_it(farm: Farm) -> None:
    """A VM without disks: nothing but the register can tell that it is not to run there."""
    migration = await _paging(farm, without_disks=True)
    farm.lab.cut()
    await _offer(farm)
    async with farm.client() as client:
        assert (await client.revive("vm")).revived
    assert (await farm.vm("vm")).ownership.owner == "alpha"
    farm.lab.restore()

    async def one_is_left() -> bool:
        return farm.runs_on("vm") == ["alpha"]

    await until(one_is_left, "the destination has ended its VM")
    await farm.ended(migration)
    await farm.linux_goes_on("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")


async def test_a_host_without_its_mover_ends_a_vm_that_is_another_hosts(farm: Farm) -> None:
    """The mover may have ended before the VM was taken back: then the daemon ends what it does not own."""
    migration = await _paging(farm, without_disks=True)
    farm.kill_daemon("beta")
    os.kill(farm.mover_pid(migration, "beta", Role.DESTINATION), signal.SIGKILL)
    await _offer(farm)
    async with farm.client() as client:
        assert (await client.revive("vm")).revived
    for leftover in (farm.lab["beta"].state_dir / "migrations").iterdir():
        for file in leftover.iterdir():
            file.unlink()
        leftover.rmdir()
    assert farm.runs_on("vm") == ["alpha", "beta"]
    await farm.start_daemon("beta")

    async def one_is_left() -> bool:
        return farm.runs_on("vm") == ["alpha"]

    await until(one_is_left, "the destination has ended its VM")
    await farm.linux_goes_on("vm", "alpha")
