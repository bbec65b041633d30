"""What is read from a store is what the store has, also where records were parsed before."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from transhume.farm.records import FarmRecords, Kept, encode, ownership_key
from transhume.model.vm import Ownership
from transhume.store.interface import Entry
from transhume.store.memory import MemoryStore

VMS = st.sampled_from(("a", "b", "c"))
CHANGES = st.lists(st.tuples(VMS, st.none() | st.sampled_from(("alpha", "beta"))), max_size=12)


@given(changes=CHANGES)
async def test_a_list_is_what_one_without_a_memory_reads(changes: list[tuple[str, str | None]]) -> None:
    store = MemoryStore()
    records = FarmRecords(store)
    for epoch, (vm, owner) in enumerate(changes, 1):
        if owner is None:
            await store.transact(deletes=[ownership_key(vm)])
        else:
            await store.transact(puts={ownership_key(vm): encode(Ownership(owner=owner, epoch=epoch))})
        assert await records.ownerships() == await FarmRecords(store).ownerships()


async def test_a_store_brought_back_from_a_backup_may_count_the_same_again() -> None:
    """Another value at the same revision is another record."""

    class Restored(MemoryStore):
        owner = "alpha"

        async def list(self, prefix: str) -> Sequence[Entry]:
            return [Entry(ownership_key("a"), encode(Ownership(owner=self.owner, epoch=1)), 7)]

    store = Restored()
    records = FarmRecords(store)
    await records.ownerships()
    store.owner = "beta"
    assert await records.ownerships() == [Kept(ownership_key("a"), Ownership(owner="beta", epoch=1), 7)]


async def test_what_has_not_changed_is_parsed_once() -> None:
    store = MemoryStore()
    records = FarmRecords(store)
    keys = [ownership_key(vm) for vm in ("a", "b")]
    await store.transact(puts={key: encode(Ownership(owner="alpha", epoch=1)) for key in keys})
    first = await records.ownerships()
    await store.transact(puts={keys[0]: encode(Ownership(owner="beta", epoch=2))})
    second = await records.ownerships()
    assert (second[0].record.owner, second[1]) == ("beta", first[1])
    assert second[1] is first[1]
