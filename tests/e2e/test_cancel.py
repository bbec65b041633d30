"""Cancel, in each phase that a person can meet."""

from __future__ import annotations

import os
import signal

import pytest
from tests.e2e.farm import Farm

from transhume.migration.driver.job import Role
from transhume.model.errors import Conflict, NotFound
from transhume.model.migration import Engine, Outcome, Phase

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 1 << 20
"""At this rate the pre-copy of a small guest takes long enough to be met in it."""


@pytest.mark.parametrize("engine", list(Engine))
async def test_cancel_during_precopy(farm: Farm, engine: Engine) -> None:
    await farm.boot("vm")
    before = await farm.assert_sound("vm", "alpha")
    migration = await farm.begin("vm", "beta", engine=engine, bandwidth_bytes_s=SLOW_BYTES_S // 8)
    await farm.in_phase(migration, Phase.PRECOPY)
    async with farm.client("beta") as client:
        reply = await client.cancel(migration)
    assert reply.accepted
    assert reply.runs_at == "source host alpha"
    record = await farm.ended(migration)
    assert record.outcome is Outcome.CANCELLED
    await farm.assert_sound("vm", "alpha", before)
    await farm.assert_nothing_left("vm", "beta")
    again = await farm.migrate("vm", "beta", verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error


async def test_cancel_by_the_vms_name(farm: Farm) -> None:
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S // 8)
    async with farm.client() as client:
        assert (await client.cancel("vm")).accepted
    assert (await farm.ended(migration)).outcome is Outcome.CANCELLED


async def test_cancel_while_the_destination_prepares(farm: Farm) -> None:
    """At once after the request: whatever exists by then is removed again."""
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S // 8)
    async with farm.client() as client:
        assert (await client.cancel(migration)).accepted
    record = await farm.ended(migration)
    assert record.outcome is Outcome.CANCELLED
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")


async def test_cancel_at_the_switchover_is_decided_by_the_register(farm: Farm) -> None:
    """The destination's mover stands still with the state in its hands: the source's swap comes first."""
    await farm.boot("vm", memory_bytes=64 << 20)
    migration = await farm.begin(
        "vm", "beta", verify=True, post_copy=False, bandwidth_bytes_s=SLOW_BYTES_S // 2
    )
    await farm.in_phase(migration, Phase.PRECOPY)
    mover = farm.mover_pid(migration, "beta", Role.DESTINATION)
    os.kill(mover, signal.SIGSTOP)
    try:
        async with farm.client() as client:
            reply = await client.cancel(migration)
    finally:
        os.kill(mover, signal.SIGCONT)
    assert reply.accepted
    await farm.ended(migration)
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")


async def test_cancel_after_the_commit_says_where_the_vm_runs(farm: Farm) -> None:
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta")
    await farm.ended(migration)
    async with farm.client() as client:
        reply = await client.cancel(migration)
    assert not reply.accepted
    assert "beta" in reply.runs_at
    await farm.assert_sound("vm", "beta")


async def test_cancel_of_nothing(farm: Farm) -> None:
    await farm.boot("vm")
    async with farm.client() as client:
        with pytest.raises(NotFound):
            await client.cancel("no-such-migration")
        with pytest.raises(Conflict):
            await client.cancel("vm")


async def test_many_cancels_leave_nothing(farm: Farm) -> None:
    """At arbitrary moments, one after the other: the VM is always somewhere, whole, and only there."""
    await farm.boot("vm")
    newest = 0
    for delay_polls in (0, 10, 25, 45, 70, 100):
        here = farm.runs_on("vm")[0]
        there = "beta" if here == "alpha" else "alpha"
        migration = await farm.begin("vm", there)
        async with farm.client() as client:
            for _ in range(delay_polls):
                await client.migration(migration)  # a moment that the test does not choose, in round trips
            await client.cancel(migration)
        record = await farm.ended(migration)
        now = here if record.outcome is Outcome.CANCELLED else there
        newest = await farm.assert_sound("vm", now, newest)
        await farm.assert_nothing_left("vm", there if now == here else here)
