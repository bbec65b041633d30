"""The register: one winner, whatever was remembered."""

from __future__ import annotations

import asyncio

import pytest
from tests.farm.scripted_farm import farm

from transhume.farm.ownership import OwnershipRegister
from transhume.farm.records import FarmRecords, encode, ownership_key
from transhume.model.errors import NotFound, Refused
from transhume.model.vm import Ownership
from transhume.store.memory import MemoryStore

HERE, THERE, BACK = (
    Ownership(owner="a", epoch=1),
    Ownership(owner="b", epoch=2),
    Ownership(owner="a", epoch=2),
)


async def register() -> tuple[OwnershipRegister, MemoryStore]:
    store = MemoryStore()
    await store.transact(puts={ownership_key("web"): encode(HERE)})
    return OwnershipRegister(FarmRecords(store)), store


async def test_commit_and_abort_at_once_have_one_winner() -> None:
    held, _ = await register()
    commit, abort = await asyncio.gather(held.swap("web", HERE, THERE), held.swap("web", HERE, BACK))
    assert sorted([commit.won, abort.won]) == [False, True]
    assert (commit.owner, commit.epoch) == (abort.owner, abort.epoch)


async def test_what_somebody_else_wrote_counts_though_another_was_remembered() -> None:
    held, store = await register()
    assert await held.read("web") == HERE
    await store.transact(puts={ownership_key("web"): encode(BACK)})
    reply = await held.swap("web", HERE, THERE)
    assert (reply.won, reply.owner, reply.epoch) == (False, "a", 2)
    third = Ownership(owner="b", epoch=3)
    assert (await held.swap("web", BACK, third)).won
    assert await held.read("web") == third


async def test_a_rewritten_but_equal_register_is_swapped() -> None:
    held, store = await register()
    assert await held.read("web") == HERE
    await store.transact(puts={ownership_key("web"): encode(HERE)})
    assert (await held.swap("web", HERE, THERE)).won


async def test_an_epoch_never_falls_and_a_stranger_is_none() -> None:
    held, _ = await register()
    with pytest.raises(Refused, match="may only rise"):
        await held.swap("web", HERE, HERE)
    with pytest.raises(NotFound):
        await held.read("db")
    with pytest.raises(NotFound):
        await held.swap("db", HERE, THERE)


async def test_a_deleted_vm_leaves_no_ownership() -> None:
    async with farm() as f:
        await f.running_vm()
        await f.controller.ownership("web")
        await f.controller.vms.kill("web")
        await f.controller.vms.delete("web")
        with pytest.raises(NotFound):
            await f.controller.swap_ownership(
                "web", Ownership(owner="alpha", epoch=1), Ownership(owner="beta", epoch=2)
            )
