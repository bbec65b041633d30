"""Members that die or hang: one, and the farm goes on; two, and changes are refused in words, at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tests.store.etcd_cluster import EtcdCluster, Member

from transhume.model.errors import StoreError, StoreUnavailable
from transhume.store.address import open_store
from transhume.store.etcd import EtcdStore, Fresh
from transhume.store.interface import Compare, Store

FIRST_REFUSAL_LIMIT_S = 10.0
"""The first refusal waits for an answer and for an election that may still end well."""

LATER_REFUSAL_LIMIT_S = 1.0
RETURN_LIMIT_S = 20.0


@pytest.fixture
def harmed(etcd: EtcdCluster) -> Iterator[EtcdCluster]:
    """The cluster for a test that harms it; whole again afterwards."""
    try:
        yield etcd
    finally:
        etcd.mend()


@pytest.fixture
def url(harmed: EtcdCluster) -> str:
    return harmed.url(f"faults/{uuid.uuid4().hex}")


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    made = await open_store(url)
    yield made
    await made.close()


@dataclass
class Swaps:
    """What the clients of one record did: each win with the revision it was made at and the one before."""

    wins: dict[int, int] = field(default_factory=dict)
    values: dict[int, bytes] = field(default_factory=dict)
    unknown: set[bytes] = field(default_factory=set)
    finished: bool = False


async def _swap_until_finished(store: Store, name: str, swaps: Swaps) -> None:
    """Read a record and swap it, again and again."""
    number = 0
    while not swaps.finished:
        number += 1
        value = f"{name} {number}".encode()
        try:
            entry = await store.get("owner")
            assert entry is not None
            revision = await store.transact(
                compares=[Compare("owner", entry.mod_revision)], puts={"owner": value}
            )
        except StoreUnavailable:
            continue
        except StoreError:
            swaps.unknown.add(value)
            continue
        if revision is not None:
            assert entry.mod_revision not in swaps.wins, "two clients have won the same version"
            swaps.wins[entry.mod_revision] = revision
            swaps.values[revision] = value


async def _won(swaps: Swaps, more: int) -> None:
    """Wait until so many swaps more were won."""
    wanted = len(swaps.wins) + more
    async with asyncio.timeout(RETURN_LIMIT_S):
        while len(swaps.wins) < wanted:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _swapping(url: str, clients: int) -> AsyncIterator[Swaps]:
    """Clients with a connection of their own each, which all swap the same record."""
    swaps = Swaps()
    stores = [await open_store(url) for _ in range(clients)]
    await stores[0].transact(puts={"owner": b"nobody"})
    tasks = [
        asyncio.create_task(_swap_until_finished(store, f"client-{number}", swaps))
        for number, store in enumerate(stores)
    ]
    try:
        yield swaps
    finally:
        swaps.finished = True
        await asyncio.gather(*tasks, return_exceptions=True)
        for store in stores:
            await store.close()
    for task in tasks:
        task.result()


async def _assert_one_history(url: str, swaps: Swaps) -> None:
    """Every win is built on the one before it: a chain without a fork, without a hole, up to what is there.

    Only a swap whose outcome was called unknown may stand between two wins.
    """
    store = await open_store(url)
    last = await store.get("owner")
    await store.close()
    assert last is not None
    revisions = sorted(swaps.wins.values())
    gaps = [
        (before, built_on)
        for before, (built_on, _) in zip(
            revisions, sorted(swaps.wins.items(), key=lambda one: one[1])[1:], strict=False
        )
        if before != built_on
    ]
    assert all(before < built_on for before, built_on in gaps)
    assert len(gaps) <= len(swaps.unknown)
    if last.mod_revision in swaps.values:
        assert last.value == swaps.values[last.mod_revision]
    else:
        assert last.value in swaps.unknown
        assert last.mod_revision > revisions[-1]


async def test_of_many_clients_each_version_has_one_winner(url: str) -> None:
    async with _swapping(url, 6) as swaps:
        await _won(swaps, 150)
    assert not swaps.unknown
    await _assert_one_history(url, swaps)


def _leader(cluster: EtcdCluster) -> Member:
    return cluster.leader()


def _follower(cluster: EtcdCluster) -> Member:
    leader = cluster.leader()
    return next(member for member in cluster.members if member is not leader)


@pytest.mark.parametrize("choose", [_leader, _follower])
@pytest.mark.parametrize("harm", [EtcdCluster.kill, EtcdCluster.stop])
async def test_one_member_is_lost_and_the_farm_goes_on(
    harmed: EtcdCluster,
    url: str,
    choose: Callable[[EtcdCluster], Member],
    harm: Callable[[EtcdCluster, Member], None],
) -> None:
    async with _swapping(url, 4) as swaps:
        await _won(swaps, 30)
        harm(harmed, choose(harmed))
        await _won(swaps, 30)
        # In the test's own thread, so the clients wait meanwhile, and then go on.
        harmed.mend()
        await _won(swaps, 30)
    await _assert_one_history(url, swaps)


async def _refused(store: Store) -> tuple[StoreError, float]:
    started_s = time.monotonic()
    with pytest.raises(StoreError) as caught:
        await store.transact(puts={"b": b"refused"})
    return caught.value, time.monotonic() - started_s


async def test_without_a_quorum_changes_are_refused_in_words_and_reads_say_how_old(
    harmed: EtcdCluster, store: Store
) -> None:
    before_s = time.time()
    revision = await store.transact(puts={"a": b"1"})
    assert revision is not None
    assert (await store.snapshot("")).stale_since_s is None
    after_s = time.time()
    harmed.kill(*harmed.members[:2])

    # The first may have been sent to a leader that had not noticed yet.
    _, first_s = await _refused(store)
    assert first_s < FIRST_REFUSAL_LIMIT_S
    for _ in range(3):
        error, later_s = await _refused(store)
        assert later_s < LATER_REFUSAL_LIMIT_S
    assert isinstance(error, StoreUnavailable)
    for word in ("no quorum", "no changes since", "nothing was written", "knows no leader", "refused"):
        assert word in error.message
    for endpoint in harmed.endpoints.split(","):
        assert endpoint in error.message

    with pytest.raises(StoreUnavailable):
        await store.get("a")
    with pytest.raises(StoreUnavailable):
        await store.list("")
    stale = await store.snapshot("", may_be_stale=True)
    assert [(entry.key, entry.value) for entry in stale.entries] == [("a", b"1")]
    assert stale.revision >= revision
    assert stale.stale_since_s is not None
    assert before_s <= stale.stale_since_s <= after_s

    harmed.mend()
    assert await store.transact(compares=[Compare("a", revision)], puts={"a": b"2"}) is not None
    assert (await store.snapshot("", may_be_stale=True)).stale_since_s is None


async def test_a_member_that_lags_behind_does_not_answer_for_the_farm(
    harmed: EtcdCluster, store: Store
) -> None:
    revision = await store.transact(puts={"a": b"1"})
    assert revision is not None
    assert isinstance(store, EtcdStore)
    harmed.kill(*harmed.members[:2])
    assert (await store.snapshot("", may_be_stale=True)).stale_since_s is not None
    # As if a later change had been seen, which has not come to the survivor.
    store._fresh = Fresh(revision + 1, time.time())
    with pytest.raises(StoreUnavailable):
        await store.snapshot("", may_be_stale=True)


async def test_a_process_that_has_seen_nothing_cannot_say_how_old_and_does_not_open(
    harmed: EtcdCluster, url: str
) -> None:
    harmed.kill(*harmed.members[:2])
    with pytest.raises(StoreUnavailable, match="no quorum"):
        await open_store(url)


async def test_all_members_are_lost_and_come_back(harmed: EtcdCluster, store: Store) -> None:
    revision = await store.transact(puts={"a": b"1"})
    assert revision is not None
    harmed.kill(*harmed.members)
    with pytest.raises(StoreUnavailable):
        await store.transact(puts={"a": b"2"})
    with pytest.raises(StoreUnavailable):
        await store.snapshot("", may_be_stale=True)
    harmed.mend()
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"1", revision)
    assert await store.transact(compares=[Compare("a", revision)], puts={"a": b"2"}) is not None
