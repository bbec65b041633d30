"""A real host is emptied of its VMs, which run on, and gets them back."""

from __future__ import annotations

import asyncio

import pytest
from tests.e2e.farm import Farm, until

from transhume.farm.drain_record import Drain, DrainOptions, DrainState, StepState
from transhume.model.host import HostState

pytestmark = pytest.mark.timeout(400)

NAMES = ("a", "b", "c", "d")


async def over(farm: Farm, host: str) -> Drain:
    async def ended() -> Drain | None:
        async with farm.client() as client:
            drain = await client.pool.drain(host)
        return drain if drain.state.over else None

    drain: Drain = await until(ended, f"the drain of {host} is over", 150.0)
    return drain


async def test_a_host_is_emptied_and_filled_again(farm: Farm) -> None:
    for name in NAMES:
        await farm.boot(name)
    async with farm.client("beta") as client:
        plan = await client.pool.plan_drain("alpha", DrainOptions())
        placed = {(step.destination, step.state) for step in plan.steps}
        assert placed == {("beta", StepState.WAITING)}, [step.reason for step in plan.steps]
        assert [step.wave for step in plan.steps] == [1, 1, 2, 2]
        await client.pool.begin_drain("alpha", DrainOptions())
    drain = await over(farm, "alpha")
    assert drain.state is DrainState.DONE, drain
    newest = {name: await farm.assert_sound(name, "beta") for name in NAMES}
    for name in NAMES:
        await farm.assert_nothing_left(name, "alpha")
    async with farm.client() as client:
        assert [host.state for host in await client.hosts()] == [HostState.MAINTENANCE, HostState.ACTIVE]
        assert await client.pool.undrain("alpha", True, DrainOptions()) is not None
    drain = await over(farm, "alpha")
    assert drain.state is DrainState.DONE, drain
    await asyncio.gather(*(farm.assert_sound(name, "alpha", newest[name]) for name in NAMES))
    async with farm.client() as client:
        assert {host.state for host in await client.hosts()} == {HostState.ACTIVE}
