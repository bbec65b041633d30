"""Only who leads writes, and a comparison of one's own that fails is told from a leadership that is over."""

from __future__ import annotations

import pytest

from transhume.model.errors import StoreUnavailable
from transhume.store.election import LocalElection
from transhume.store.guarded import GuardedStore
from transhume.store.interface import ABSENT, Compare
from transhume.store.memory import MemoryStore


async def test_a_leader_writes_until_it_is_followed() -> None:
    store = MemoryStore()
    leadership = await LocalElection(store, "alpha").campaign("controller", 5.0)
    guarded = GuardedStore(store, leadership)
    assert await guarded.transact(puts={"a": b"1"}) is not None
    assert await guarded.transact(compares=[Compare("a", ABSENT)], puts={"a": b"2"}) is None
    # Another has taken the record: alpha believes that it leads, and its store knows better.
    await store.transact(puts={leadership.guard.key: b"beta"})
    assert leadership.leading
    with pytest.raises(StoreUnavailable, match="another host"):
        await guarded.transact(puts={"a": b"2"})
    entry = await guarded.get("a")
    assert entry is not None
    assert entry.value == b"1"


async def test_who_has_given_up_writes_nothing() -> None:
    store = MemoryStore()
    leadership = await LocalElection(store, "alpha").campaign("controller", 5.0)
    await leadership.resign()
    with pytest.raises(StoreUnavailable):
        await GuardedStore(store, leadership).transact(puts={"a": b"1"})
    assert await store.get("a") is None
