"""The baseline and the preview of a join over real sockets: who may ask, and that nothing changes by it."""

from __future__ import annotations

import time

import pytest
from tests.api.daemons import Daemons, two_daemons

from transhume.model.errors import Unauthorized
from transhume.model.finding import Level
from transhume.model.host import GuestCpus, HostInventory, ModelRank
from transhume.sim.scripted_host import INVENTORY
from transhume.trust.token import Token

WHOLE = GuestCpus(models={"Nehalem-v1": ModelRank(2, 31)}, features=("avx2", "sse4.2"))
LESS = GuestCpus(models={"Nehalem-v1": ModelRank(2, 31)}, features=("sse4.2",))


def with_cpus(cpus: GuestCpus) -> HostInventory:
    return INVENTORY.model_copy(update={"cpus_of": {"tcg": cpus}, "kvm_obstacle": "there is none"})


async def told(d: Daemons) -> None:
    d.alpha.inventory_now = d.beta.inventory_now = with_cpus(WHOLE)
    await d.beat()


async def test_the_baseline_is_for_members() -> None:
    async with two_daemons() as d:
        await told(d)
        async with d.near(d.beta_config) as client:
            (base,) = (await client.baseline()).baselines
        assert (base.model, base.hosts, base.flags) == (
            "Nehalem-v1",
            ("alpha", "beta"),
            ("avx2", "sse4.2"),
        )
        for config in (d.alpha_config, d.beta_config):
            async with d.stranger(config) as stranger:
                with pytest.raises(Unauthorized):
                    await stranger.baseline()


async def test_a_preview_needs_a_token_and_leaves_it_good() -> None:
    async with two_daemons() as d:
        await told(d)
        token = (await d.controller.members.invite()).token
        before = await d.store.list("")
        async with d.stranger(d.alpha_config) as stranger:
            findings = await stranger.preview_join(Token.parse(token).secret, "gamma", with_cpus(LESS))
            with pytest.raises(Unauthorized, match="does not know this token"):
                await stranger.preview_join("guess", "gamma", with_cpus(LESS))
            assert await d.store.list("") == before
            lower = [finding for finding in findings if finding.check == "baseline"]
            assert [finding.level for finding in lower] == [Level.NOTE]
            assert lower[0].words.endswith("joining gamma would lower it by avx2")
            assert (await d.join(d.config("gamma"), token)).name == "gamma"
            with pytest.raises(Unauthorized):
                await stranger.preview_join(Token.parse(token).secret, "delta", with_cpus(LESS))


async def test_everybody_may_know_the_time_also_through_a_member() -> None:
    async with two_daemons() as d:
        for config in (d.alpha_config, d.beta_config):
            async with d.stranger(config) as stranger:
                assert abs(await stranger.clock_s() - time.time()) < 30.0


async def test_a_member_of_the_release_before_tells_no_cpus_and_takes_part_otherwise() -> None:
    async with two_daemons() as d:
        await told(d)
        old = INVENTORY.model_dump(mode="json", exclude={"cpus_of", "cpu_vendor"})
        d.beta.inventory_now = HostInventory.model_validate(old)
        await d.beat()
        async with d.near(d.alpha_config) as client:
            found = await client.baseline()
            assert found.untold == ("beta",)
            assert [host.name for host in await client.hosts()] == ["alpha", "beta"]
