"""What only etcd can show: lost answers, a full quota, another cluster's member, left-over slots."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import httpx
import pytest
from tests.store.etcd_cluster import ADDRESS, ETCD, SKIP_REASON, EtcdCluster, cluster
from tests.store.lossy_proxy import Fate, LossyProxy, lossy_proxy

from transhume.model.errors import StoreError, StoreFull, StoreUnavailable
from transhume.store.address import open_store
from transhume.store.etcd import SLOT_KEPT_S, EtcdStore
from transhume.store.etcd_gateway import EtcdGateway, decode, encode
from transhume.store.etcd_http import Endpoint
from transhume.store.interface import ABSENT, Compare, Store


@pytest.fixture
async def proxy(etcd: EtcdCluster) -> AsyncIterator[LossyProxy]:
    async with lossy_proxy(etcd.members[0].client_port) as made:
        yield made


@pytest.fixture
def prefix() -> str:
    return f"lossy/{uuid.uuid4().hex}"


@pytest.fixture
async def store(proxy: LossyProxy, prefix: str) -> AsyncIterator[Store]:
    """A store that reaches its cluster through the proxy alone; it has a slot already."""
    made = await open_store(f"etcd://{ADDRESS}:{proxy.port}/{prefix}")
    assert await made.transact(puts={"first": b""}) is not None
    yield made
    await made.close()


async def test_a_lost_answer_is_found_again(store: Store, proxy: LossyProxy) -> None:
    proxy.fates = [Fate.LOSE_ANSWER]
    revision = await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"1"})
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"1", revision)


async def test_a_lost_request_is_made_again_and_once(store: Store, proxy: LossyProxy) -> None:
    proxy.fates = [Fate.LOSE_REQUEST]
    seen = proxy.seen
    revision = await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"1"})
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"1", revision)
    assert proxy.seen - seen == 3  # the lost one, the fence, the one that was made


async def test_a_lost_answer_of_a_comparison_is_found_again(store: Store, proxy: LossyProxy) -> None:
    await store.transact(puts={"a": b"1"})
    proxy.fates = [Fate.LOSE_ANSWER]
    assert await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"2"}) is None
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"1"


async def test_the_fence_may_lose_its_answer_too(store: Store, proxy: LossyProxy) -> None:
    proxy.fates = [Fate.LOSE_ANSWER, Fate.LOSE_ANSWER]
    revision = await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"1"})
    assert revision is not None
    proxy.fates = [Fate.LOSE_REQUEST, Fate.LOSE_ANSWER]
    assert await store.transact(compares=[Compare("a", revision)], puts={"a": b"2"}) is not None
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"2"


async def test_a_late_transaction_is_ruled_out_first(store: Store, proxy: LossyProxy) -> None:
    """The one that everything here is for: it is on its way while the next is already answered."""
    first = await store.transact(puts={"owner": b"alpha"})
    assert first is not None
    proxy.fates = [Fate.HOLD, Fate.PASS, Fate.HOLD, Fate.PASS, Fate.HOLD, Fate.PASS]
    with pytest.raises(StoreUnavailable, match="nothing was written"):
        await store.transact(puts={"owner": b"beta"})
    assert len(proxy.held) == 3
    assert await proxy.release() == [False, False, False]
    entry = await store.get("owner")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"alpha", first)


async def test_without_any_answer_the_outcome_is_unknown_and_never_called_a_refusal(
    store: Store, proxy: LossyProxy, etcd: EtcdCluster, prefix: str
) -> None:
    proxy.fates = [Fate.LOSE_ANSWER, *[Fate.LOSE_REQUEST] * 1000]
    with pytest.raises(StoreError, match="whether it was made is unknown") as caught:
        await store.transact(puts={"a": b"1"})
    assert not isinstance(caught.value, StoreUnavailable | StoreFull)
    direct = await open_store(etcd.url(prefix))
    entry = await direct.get("a")
    await direct.close()
    assert entry is not None
    assert entry.value == b"1"
    proxy.fates = []
    assert await store.transact(puts={"a": b"2"}) is not None


async def test_a_cancelled_transaction_does_not_disturb_the_next(store: Store) -> None:
    for _ in range(5):
        task = asyncio.create_task(store.transact(puts={"a": b"cancelled"}))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await store.transact(puts={"a": b"1"}) is not None
        entry = await store.get("a")
        assert entry is not None


async def test_a_change_that_used_up_the_quota_was_made_although_etcd_says_full(
    store: Store, proxy: LossyProxy
) -> None:
    proxy.fates = [Fate.CALL_FULL]
    revision = await store.transact(compares=[Compare("a", ABSENT)], puts={"a": b"1"})
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"1", revision)
    assert revision is not None
    assert await store.transact(compares=[Compare("a", revision)], puts={"a": b"2"}) is not None


async def test_a_full_quota_refuses_and_what_was_acknowledged_is_there() -> None:
    if ETCD is None:
        pytest.skip(SKIP_REASON)
    written: dict[str, bytes] = {}
    with cluster(1, "--quota-backend-bytes", "2000000") as small:
        store = await open_store(small.url("full"))
        with pytest.raises(StoreFull, match="nothing was written"):  # noqa: PT012  # the loop is the question
            for number in range(100):
                await store.transact(puts={f"k{number:03}": b"x" * 100_000})
                written[f"k{number:03}"] = b"x" * 100_000
        assert {entry.key: entry.value for entry in await store.list("")} == written
        with pytest.raises(StoreFull):
            await store.transact(puts={"again": b""})
        fresh = await open_store(small.url("full"))
        with pytest.raises(StoreFull):
            await fresh.transact(puts={"again": b""})
        assert await fresh.get("again") is None
        await fresh.close()
        await store.close()


async def test_a_member_of_another_cluster_is_never_asked(etcd: EtcdCluster) -> None:
    if ETCD is None:
        pytest.skip(SKIP_REASON)
    with cluster(1) as other:
        ours, theirs = (Endpoint(ADDRESS, one.members[0].client_port) for one in (etcd, other))
        store = await EtcdStore.open(EtcdGateway([ours, theirs]), f"/mixed/{uuid.uuid4().hex}")
        await store.transact(puts={"a": b"1"})
        try:
            etcd.kill(etcd.members[0])
            with pytest.raises(StoreUnavailable, match="another cluster"):
                await store.transact(puts={"a": b"2"})
            with pytest.raises(StoreUnavailable, match="another cluster"):
                await store.get("a")
        finally:
            etcd.mend()
            await store.close()


async def test_what_is_not_etcd_is_said_to_be_none() -> None:
    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(hello, ADDRESS, 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(StoreUnavailable, match="is not etcd"):
        await open_store(f"etcd://{ADDRESS}:{port}")
    server.close()


async def test_slots_of_processes_that_are_gone_are_removed(etcd: EtcdCluster, prefix: str) -> None:
    store = await open_store(etcd.url(prefix))
    await store.transact(puts={"a": b"1"})
    root = f"/{prefix}/slots/"
    url = f"http://{ADDRESS}:{etcd.members[0].client_port}/v3/kv/"
    old = encode(f"{time.time() - SLOT_KEPT_S - 60:.0f} left-over".encode())
    async with httpx.AsyncClient() as client:
        await client.post(url + "put", json={"key": encode(f"{root}gone-1".encode()), "value": old})
        await (await open_store(etcd.url(prefix))).close()
        every = {"key": encode(root.encode()), "range_end": encode(root.encode() + b"\xff")}
        left = (await client.post(url + "range", json=every)).json()["kvs"]
        names = [decode(kv["key"]).decode() for kv in left]
        assert len(names) == 1
        assert "gone" not in names[0]
        # Also when it was this one's, after a day of silence: it makes another and goes on.
        await client.post(url + "deleterange", json=every)
    assert await store.transact(compares=[Compare("b", ABSENT)], puts={"b": b"1"}) is not None
    await store.close()


async def test_many_at_once_share_a_few_connections_and_slots(etcd: EtcdCluster, prefix: str) -> None:
    store = await open_store(etcd.url(prefix))
    for _ in range(3):
        revisions = await asyncio.gather(*(store.transact(puts={f"k{n}": b"x"}) for n in range(50)))
        assert len(set(revisions)) == 50
    assert isinstance(store, EtcdStore)
    assert len(store._slots) == store._slot_count <= 50
    await store.close()
