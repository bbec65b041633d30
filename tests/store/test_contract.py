"""What every store promises, run on each of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.store.etcd_cluster import EtcdCluster

from transhume.model.errors import Refused, StoreError
from transhume.store.address import open_store
from transhume.store.etcd import LIST_PAGE
from transhume.store.interface import (
    ABSENT,
    MAX_TRANSACTION_BYTES,
    MAX_TRANSACTION_CHANGES,
    MAX_VALUE_BYTES,
    Compare,
    Store,
    transaction_bytes,
)
from transhume.store.memory import MemoryStore
from transhume.store.sqlite import SqliteStore


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store
    if request.param == "memory":
        made = MemoryStore()
    elif request.param == "sqlite":
        made = await SqliteStore.open(tmp_path / "farm.sqlite")
    else:
        etcd: EtcdCluster = request.getfixturevalue("etcd")
        made = await open_store(etcd.url(f"contract/{uuid.uuid4().hex}"))
    yield made
    await made.close()


async def test_an_absent_key_is_none(store: Store) -> None:
    assert await store.get("vms/none") is None


async def test_a_put_is_read_back_with_the_revision_of_its_transaction(store: Store) -> None:
    revision = await store.transact(puts={"vms/a": b"one", "vms/b": b"two"})
    entry = await store.get("vms/a")
    assert revision is not None
    assert entry is not None
    assert (entry.key, entry.value, entry.mod_revision) == ("vms/a", b"one", revision)
    other = await store.get("vms/b")
    assert other is not None
    assert other.mod_revision == revision


async def test_revisions_rise_and_survive_a_delete(store: Store) -> None:
    first = await store.transact(puts={"k": b"1"})
    gone = await store.transact(deletes=["k"])
    again = await store.transact(puts={"k": b"2"})
    assert first is not None
    assert gone is not None
    assert again is not None
    assert first < gone < again
    entry = await store.get("k")
    assert entry is not None
    assert entry.mod_revision == again


async def test_a_list_holds_exactly_the_prefix_in_order(store: Store) -> None:
    await store.transact(puts={"vms/b": b"2", "vms/a": b"1", "vmsx": b"3", "vm": b"4", "vms/ü": b"5"})
    assert [entry.key for entry in await store.list("vms/")] == ["vms/a", "vms/b", "vms/ü"]
    assert [entry.key for entry in await store.list("")] == ["vm", "vms/a", "vms/b", "vms/ü", "vmsx"]
    assert await store.list("hosts/") == []


async def test_a_comparison_that_does_not_hold_changes_nothing(store: Store) -> None:
    first = await store.transact(puts={"a": b"1", "b": b"1"})
    assert first is not None
    refused = await store.transact(
        compares=[Compare("a", first), Compare("b", first + 1)], puts={"a": b"2", "c": b"2"}, deletes=["b"]
    )
    assert refused is None
    assert [(entry.key, entry.value) for entry in await store.list("")] == [("a", b"1"), ("b", b"1")]


async def test_absent_is_a_comparison(store: Store) -> None:
    assert await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"1"}) is not None
    assert await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"2"}) is None
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"1"


async def test_of_many_swaps_at_once_exactly_one_wins(store: Store) -> None:
    revision = await store.transact(puts={"ownership/vm": b"alpha 1"})
    assert revision is not None
    swaps = [
        store.transact(compares=[Compare("ownership/vm", revision)], puts={"ownership/vm": f"{n}".encode()})
        for n in range(20)
    ]
    answers = await asyncio.gather(*swaps)
    winners = [n for n, answer in enumerate(answers) if answer is not None]
    assert len(winners) == 1
    entry = await store.get("ownership/vm")
    assert entry is not None
    assert entry.value == f"{winners[0]}".encode()


async def test_deleting_an_absent_key_does_nothing(store: Store) -> None:
    assert await store.transact(deletes=["nobody"]) is not None
    assert await store.list("") == []


@pytest.mark.parametrize(
    ("puts", "deletes"),
    [({"": b""}, []), ({"k" * 600: b""}, []), ({"k": b"x" * (MAX_VALUE_BYTES + 1)}, []), ({"k": b""}, ["k"])],
)
async def test_limits_refuse_before_anything_is_written(
    store: Store, puts: dict[str, bytes], deletes: list[str]
) -> None:
    with pytest.raises(Refused):
        await store.transact(puts={"good": b"1", **puts}, deletes=deletes)
    assert await store.list("") == []


async def test_the_largest_transaction_is_taken_and_a_larger_one_refused(store: Store) -> None:
    many = {f"k{number}": b"x" for number in range(MAX_TRANSACTION_CHANGES)}
    absent = [Compare(key, ABSENT) for key in many]
    with pytest.raises(Refused, match="several"):
        await store.transact(puts={**many, "one more": b""})
    with pytest.raises(Refused, match="several"):
        await store.transact(compares=[*absent, Compare("one more", ABSENT)])
    assert await store.transact(compares=absent, puts=many) is not None
    assert len(await store.list("")) == MAX_TRANSACTION_CHANGES
    big = {"big": b"x" * MAX_VALUE_BYTES}
    big["rest"] = b"x" * (MAX_TRANSACTION_BYTES - transaction_bytes(big) - len("rest"))
    with pytest.raises(Refused, match="several"):
        await store.transact(puts={**big, "rest": big["rest"] + b"x"})
    assert await store.transact(puts=big) is not None
    entry = await store.get("big")
    assert entry is not None
    assert len(entry.value) == MAX_VALUE_BYTES


async def test_any_bytes_are_a_value(store: Store) -> None:
    values = {"empty": b"", "zero": b"\0", "all": bytes(range(256))}
    await store.transact(puts=values)
    assert {entry.key: entry.value for entry in await store.list("")} == values


async def test_a_snapshot_is_of_one_revision_and_says_that_it_is_not_stale(store: Store) -> None:
    await store.transact(puts={"vms/a": b"1", "hosts/a": b"1"})
    revision = await store.transact(puts={"vms/b": b"2"})
    for may_be_stale in (False, True):
        snapshot = await store.snapshot("vms/", may_be_stale=may_be_stale)
        assert [entry.key for entry in snapshot.entries] == ["vms/a", "vms/b"]
        assert revision is not None
        assert snapshot.revision >= revision
        assert snapshot.stale_since_s is None


async def test_a_long_list_is_whole_and_in_order(store: Store) -> None:
    keys = [f"vms/{number:05}" for number in range(LIST_PAGE * 2 + 1)]
    for first in range(0, len(keys), MAX_TRANSACTION_CHANGES):
        await store.transact(puts=dict.fromkeys(keys[first : first + MAX_TRANSACTION_CHANGES], b"x"))
    assert [entry.key for entry in await store.list("vms/")] == keys


async def test_a_list_made_while_others_write_is_of_one_moment(store: Store) -> None:
    """Two records are always written together; no list may show one of a pair newer than the other."""
    await store.transact(puts={"a": b"0", "z": b"0"})
    finished = asyncio.Event()

    async def write() -> None:
        for number in range(1, 40):
            await store.transact(puts={"a": f"{number}".encode(), "z": f"{number}".encode()})
        finished.set()

    async def read() -> None:
        while not finished.is_set():
            first, last = await store.list("")
            assert first.value == last.value

    await asyncio.gather(write(), read())


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    with pytest.raises(StoreError):
        await store.get("a")
    with pytest.raises(StoreError):
        await store.transact(puts={"a": b""})
