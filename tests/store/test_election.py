"""One leader for each name: what every store promises, and leaders that die, hang or are cut off."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.store.etcd_cluster import EtcdCluster

from transhume.model.errors import Refused
from transhume.store.address import open_election, open_store
from transhume.store.election import Election, Leadership, LocalElection
from transhume.store.etcd import EtcdStore
from transhume.store.etcd_election import EtcdElection, EtcdLeadership, revoke
from transhume.store.interface import Store
from transhume.store.memory import MemoryStore

TTL_S = 3.0
LATE_S = 3.0
"""What a takeover may take beyond the lease: etcd looks for leases that ran out twice a second, on two cores
that others use too."""

SOME_LOOKS_S = 0.7
"""Long enough for a candidate to look several times whether it may lead."""

CANDIDATE = """
import asyncio, sys
from transhume.store.address import open_election, open_store

async def main():
    store = await open_store(sys.argv[1])
    held = await open_election(store, "child").campaign("drain", float(sys.argv[2]))
    print("leads", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        leading = held.leading
        written = await store.transact(compares=[held.guard], puts={"by": b"child"})
        print(leading, written is not None, flush=True)

asyncio.run(main())
"""


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        made: Store = MemoryStore()
    elif request.param == "sqlite":
        made = await open_store(f"sqlite://{tmp_path}/farm.sqlite")
    else:
        etcd: EtcdCluster = request.getfixturevalue("etcd")
        made = await open_store(etcd.url(f"election/{uuid.uuid4().hex}"))
    yield made
    await made.close()


@pytest.fixture
def election(store: Store) -> Election:
    return open_election(store, "alpha")


def leads(held: Leadership) -> bool:
    """Asked anew each time."""
    return held.leading


def test_each_store_has_its_election(store: Store, election: Election) -> None:
    assert isinstance(election, EtcdElection if isinstance(store, EtcdStore) else LocalElection)


async def test_a_single_candidate_leads_until_it_resigns(store: Store, election: Election) -> None:
    assert await election.leader("drain") is None
    held = await election.campaign("drain", TTL_S)
    assert leads(held)
    assert held.name == "drain"
    assert await election.leader("drain") == "alpha"
    assert await election.leader("balance") is None
    assert await store.transact(compares=[held.guard], puts={"a": b"1"}) is not None
    await held.resign()
    assert not leads(held)
    assert "drain" in await held.lost()
    assert await election.leader("drain") is None
    assert await store.transact(compares=[held.guard], puts={"a": b"2"}) is None
    await held.resign()


async def test_the_second_candidate_waits_for_the_first(store: Store, election: Election) -> None:
    first = await election.campaign("drain", TTL_S)
    waiting = asyncio.create_task(election.campaign("drain", TTL_S))
    await asyncio.wait({waiting}, timeout=SOME_LOOKS_S)
    assert not waiting.done()
    assert await store.transact(compares=[first.guard], puts={"a": b"1"}) is not None
    await first.resign()
    second = await waiting
    assert leads(second)
    assert not leads(first)
    assert await store.transact(compares=[first.guard], puts={"a": b"2"}) is None
    assert await store.transact(compares=[second.guard], puts={"a": b"3"}) is not None
    await first.resign()
    assert leads(second)
    assert await store.transact(compares=[second.guard], puts={"a": b"4"}) is not None
    await second.resign()


async def test_names_do_not_wait_for_each_other(election: Election) -> None:
    held = [await election.campaign(name, TTL_S) for name in ("drain", "balance")]
    assert all(one.leading for one in held)
    for one in held:
        await one.resign()


async def test_a_campaign_that_was_cancelled_leaves_the_way_free(election: Election) -> None:
    first = await election.campaign("drain", TTL_S)
    waiting = asyncio.create_task(election.campaign("drain", TTL_S))
    await asyncio.wait({waiting}, timeout=SOME_LOOKS_S)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await first.resign()
    second = await asyncio.wait_for(election.campaign("drain", TTL_S), TTL_S + LATE_S)
    await second.resign()


async def test_a_time_to_live_that_is_too_short_is_refused(election: Election) -> None:
    for ttl_s in (1.0, -1.0, float("nan")):
        with pytest.raises(Refused, match="too short"):
            await election.campaign("drain", ttl_s)


async def test_a_store_of_one_process_knows_no_leader_of_the_past(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/farm.sqlite"
    store = await open_store(url)
    await open_election(store, "alpha").campaign("drain", TTL_S)
    await store.close()
    store = await open_store(url)
    election = open_election(store, "alpha")
    assert await election.leader("drain") is None
    held = await election.campaign("drain", TTL_S)
    assert leads(held)
    await store.close()


class Child:
    """A candidate in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().strip()

    async def act(self) -> str:
        """Whether it thinks that it leads, and whether the store took what it wrote as a leader."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return await self.line()


@contextlib.asynccontextmanager
async def child(url: str) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CANDIDATE, url, str(TTL_S)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
        # To the end of its output, so that the pipe is closed when the loop is.
        await process.communicate()


async def test_a_leader_that_was_killed_is_followed_within_its_lease(etcd: EtcdCluster) -> None:
    url = etcd.url(f"election/{uuid.uuid4().hex}")
    store = await open_store(url)
    election = open_election(store, "parent")
    async with child(url) as leader:
        assert await leader.line() == "leads"
        assert await election.leader("drain") == "child"
        waiting = asyncio.create_task(election.campaign("drain", TTL_S))
        assert await leader.act() == "True True"
        leader.process.kill()
        killed_s = time.monotonic()
        held = await asyncio.wait_for(waiting, TTL_S + LATE_S)
        assert time.monotonic() - killed_s < TTL_S + LATE_S
        assert leads(held)
        assert await election.leader("drain") == "parent"
        await held.resign()
    await store.close()


async def test_a_leader_that_stood_still_no_longer_leads_and_writes_nothing(etcd: EtcdCluster) -> None:
    url = etcd.url(f"election/{uuid.uuid4().hex}")
    store = await open_store(url)
    election = open_election(store, "parent")
    async with child(url) as leader:
        assert await leader.line() == "leads"
        leader.process.send_signal(signal.SIGSTOP)
        held = await asyncio.wait_for(election.campaign("drain", TTL_S), TTL_S + LATE_S)
        leader.process.send_signal(signal.SIGCONT)
        assert await leader.act() == "False False"
        assert await store.get("by") is None
        assert leads(held)
        await held.resign()
    await store.close()


async def test_a_leader_whose_lease_was_ended_is_told(etcd: EtcdCluster) -> None:
    store = await open_store(etcd.url(f"election/{uuid.uuid4().hex}"))
    assert isinstance(store, EtcdStore)
    held = await open_election(store, "alpha").campaign("drain", TTL_S)
    assert isinstance(held, EtcdLeadership)
    await revoke(store, held._lease)
    assert "run out" in await asyncio.wait_for(held.lost(), TTL_S)
    assert not leads(held)
    await held.resign()
    await store.close()


async def test_a_leader_whose_record_was_taken_is_told(etcd: EtcdCluster) -> None:
    store = await open_store(etcd.url(f"election/{uuid.uuid4().hex}"))
    held = await open_election(store, "alpha").campaign("drain", TTL_S)
    await store.transact(puts={held.guard.key: b"somebody"})
    assert "somebody" in await asyncio.wait_for(held.lost(), TTL_S)
    await held.resign()
    await store.close()


async def test_a_lease_is_renewed_as_long_as_its_leader_lives(etcd: EtcdCluster) -> None:
    store = await open_store(etcd.url(f"election/{uuid.uuid4().hex}"))
    held = await open_election(store, "alpha").campaign("drain", TTL_S)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(held.lost(), 2 * TTL_S)
    assert leads(held)
    assert await store.transact(compares=[held.guard], puts={"a": b"1"}) is not None
    await held.resign()
    await store.close()


async def test_a_leader_that_is_cut_off_from_the_store_is_told_in_time(etcd: EtcdCluster) -> None:
    """It must know before anybody else can lead, that is before its lease has run out."""
    store = await open_store(etcd.url(f"election/{uuid.uuid4().hex}"))
    held = await open_election(store, "alpha").campaign("drain", TTL_S)
    try:
        for member in etcd.members:
            etcd.stop(member)
        stopped_s = time.monotonic()
        reason = await asyncio.wait_for(held.lost(), TTL_S + LATE_S)
        assert "could not be renewed" in reason
        assert time.monotonic() - stopped_s < TTL_S
        assert not leads(held)
    finally:
        etcd.mend()
    await held.resign()
    await store.close()
