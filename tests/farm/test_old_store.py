"""An old copy of the store was brought back: the VMs that run are right, and none is ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.farm.scripted_farm import Farm, farm

from transhume.farm.backup import demand_farm, demand_own, demand_same_farm
from transhume.farm.claims import Verdict, judge, raised
from transhume.model.errors import Conflict, Refused
from transhume.model.vm import Ownership, VmState
from transhume.store.memory import MemoryStore
from transhume.store.transfer import export_store, import_store, replace_store
from transhume.trust.files import IdentityFiles


@pytest.mark.parametrize(
    ("held", "claim", "owner_runs_it", "verdict"),
    [
        (Ownership(owner="beta", epoch=2), 2, False, Verdict.ITS_OWN),
        (Ownership(owner="alpha", epoch=3), 2, False, Verdict.DISOWNED),
        (Ownership(owner="alpha", epoch=3), 0, False, Verdict.DISOWNED),
        (Ownership(owner="alpha", epoch=1), 2, False, Verdict.RAISE),
        (Ownership(owner="alpha", epoch=2), 2, False, Verdict.RAISE),
        (Ownership(owner="alpha", epoch=1), 2, True, Verdict.CONTESTED),
    ],
)
def test_the_higher_epoch_counts(held: Ownership, claim: int, owner_runs_it: bool, verdict: Verdict) -> None:
    assert judge(held, "beta", claim, owner_runs_it) is verdict
    assert raised(held, "beta", claim).epoch > held.epoch


async def moved_to_beta(f: Farm) -> None:
    """Web runs on beta under epoch 2, and the register knows it."""
    alpha, beta = f.hosts["alpha"], f.hosts["beta"]
    held = await f.controller.ownership("web")
    assert (await f.controller.swap_ownership("web", held, Ownership(owner="beta", epoch=held.epoch + 1))).won
    alpha.states.pop("web")
    beta.states["web"] = VmState.RUNNING


async def test_the_register_is_raised_to_the_vm_that_runs(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    async with farm("alpha", "beta") as f:
        await f.running_vm()
        await f.beat()
        await export_store(f.store, old)
        await moved_to_beta(f)
        beta = f.hosts["beta"]
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states)
        assert reply.epochs == {"web": 2}

        await replace_store(old, f.store)
        await f.restart()
        assert (await f.controller.ownership("web")).owner == "alpha"
        await f.beat("alpha")
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states, {"web": 2})
        assert reply.disowned == ()
        assert await f.controller.ownership("web") == Ownership(owner="beta", epoch=2)


async def test_a_vm_that_its_owner_runs_too_is_left_to_people(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    async with farm("alpha", "beta") as f:
        await f.running_vm()
        await export_store(f.store, old)
        await moved_to_beta(f)
        await replace_store(old, f.store)
        await f.restart()
        f.hosts["alpha"].states["web"] = VmState.RUNNING
        await f.beat("alpha")
        beta = f.hosts["beta"]
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states, {"web": 2})
        assert (reply.disowned, reply.epochs) == ((), {})
        assert (await f.controller.ownership("web")).owner == "alpha"


async def test_another_farms_records_are_refused(tmp_path: Path) -> None:
    mine, nobodys = tmp_path / "mine.jsonl", tmp_path / "nobodys.jsonl"
    await export_store(MemoryStore(), nobodys)
    with pytest.raises(Refused, match="no authority"):
        demand_farm(nobodys)
    async with farm("alpha") as f, farm("alpha") as other:
        await export_store(f.store, mine)
        with pytest.raises(Conflict, match="name another store"):
            await demand_same_farm(mine, other.store)
        await demand_same_farm(mine, f.store)
        authority = other.controller.members.authority
        (tmp_path / "authority.pem").write_text(authority.certificate_pem)
        with pytest.raises(Conflict, match="is a host of another"):
            demand_own(mine, IdentityFiles(tmp_path))


async def test_what_a_store_has_is_replaced_only_while_nobody_leads(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    store, other = MemoryStore(), MemoryStore()
    await store.transact(puts={"hosts/alpha": b"a"})
    await export_store(store, old)
    await other.transact(puts={"hosts/beta": b"b", "elections/controller": b"beta"})
    with pytest.raises(Conflict, match="host beta leads"):
        await replace_store(old, other)
    with pytest.raises(Conflict, match="not empty"):
        await import_store(old, other)
    await other.transact(deletes=["elections/controller"])
    assert (await replace_store(old, other)).records == 1
    assert [entry.key for entry in await other.list("")] == ["hosts/alpha"]
