"""The feed's ring, and what is told of each record that is written."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from transhume.farm.drain_record import Drain, DrainState, DrainStep, StepState
from transhume.farm.feed import Feed, Kind, News
from transhume.farm.record_news import RecordNews
from transhume.farm.records import HostRecord, VmRecord, encode
from transhume.model.host import HostState
from transhume.model.vm import Ownership, VmSpec

NEWS = News(kind=Kind.VM_CHANGED, text="something", vm="web")


def feed(size: int = 3) -> Feed:
    return Feed(first_id=101, clock_s=lambda: 5.0, size=size)


def told(ring: Feed, count: int) -> Feed:
    for _ in range(count):
        ring.tell(NEWS)
    return ring


def test_a_new_ring_lacks_nothing_that_it_gave() -> None:
    ring = feed()
    assert (ring.last_id, ring.oldest_id) == (100, 101)
    assert not ring.lacks(0)
    assert not ring.lacks(100)
    assert ring.lacks(99)  # of before this controller's start
    assert ring.lacks(101)  # never given


def test_what_has_left_the_ring_is_said_to_be_missing() -> None:
    ring = told(feed(), 5)
    assert (ring.oldest_id, ring.last_id) == (103, 105)
    assert not ring.lacks(102)
    assert ring.lacks(101)
    page = ring.page(101, 10)
    assert ([event.id for event in page.events], page.gap) == ([103, 104, 105], True)
    page = ring.page(103, 10)
    assert ([event.id for event in page.events], page.gap) == ([104, 105], False)
    page = ring.page(102, 2)
    assert ([event.id for event in page.events], page.gap) == ([104, 105], True)


async def test_a_follower_that_is_slower_than_the_ring_is_told() -> None:
    ring = told(feed(), 3)
    async with aclosing(ring.follow(100)) as stream, asyncio.timeout(5):
        assert (await anext(stream)).id == 101
        told(ring, 4)  # meanwhile: 102 to 104 have gone
        gap = await anext(stream)
        assert (gap.kind, gap.id, gap.data) == (Kind.GAP, 104, {"after": 101, "oldest_id": 105})
        assert [(await anext(stream)).id for _ in range(3)] == [105, 106, 107]


async def test_streams_end_when_the_feed_is_closed() -> None:
    ring = told(feed(), 1)
    ring.close()
    assert [event.id async for event in ring.follow(0)] == [101]
    assert [event.id async for event in ring.follow()] == []


def kinds(news: list[News]) -> list[Kind]:
    return [each.kind for each in news]


def test_a_vm_and_its_owner() -> None:
    records = RecordNews()
    record = VmRecord(spec=VmSpec(name="web", memory_bytes=64 << 20, cpus=1))
    assert kinds(records.written("vms/web", encode(record))) == [Kind.VM_CREATED]
    moving = record.model_copy(update={"migration": "m1"})
    assert records.written("vms/web", encode(moving)) == []  # the migration's own news tell it
    [changed] = records.written("vms/web", encode(record.model_copy(update={"labels": ("db",)})))
    assert (changed.kind, changed.data) == (Kind.VM_CHANGED, {"labels": ["db"]})
    assert changed.text == "VM web was changed: labels is db"
    assert records.written("ownership/web", encode(Ownership(owner="alpha", epoch=1))) == []
    [moved] = records.written("ownership/web", encode(Ownership(owner="beta", epoch=2)))
    assert moved.data == {"source": "alpha", "destination": "beta", "epoch": 2}
    assert records.owner("web") == "beta"
    assert records.written("ownership/web", encode(Ownership(owner="beta", epoch=2))) == []
    assert kinds(records.written("vms/web", None)) == [Kind.VM_DELETED]
    assert records.written("vms/web", None) == []


def test_a_host() -> None:
    records = RecordNews()
    host = HostRecord(name="alpha", address="192.0.2.1", port=1, joined_at_s=0)
    assert kinds(records.written("hosts/alpha", encode(host))) == [Kind.HOST_JOINED]
    assert records.written("hosts/alpha", encode(host.model_copy(update={"joined_at_s": 1.0}))) == []
    [changed] = records.written("hosts/alpha", encode(host.model_copy(update={"state": HostState.DRAINING})))
    assert changed.data == {"state": "draining"}
    assert kinds(records.written("hosts/alpha", None)) == [Kind.HOST_REMOVED]


def test_a_drain_and_one_that_follows_it() -> None:
    records = RecordNews()
    step = DrainStep(vm="web", source="alpha")
    drain = Drain(host="alpha", steps=(step,), created_at_s=1.0)
    assert kinds(records.written("drains/alpha", encode(drain))) == [Kind.DRAIN_BEGUN]
    assert records.written("drains/alpha", encode(drain)) == []
    moved = step.model_copy(update={"state": StepState.MOVED, "destination": "beta"})
    done = drain.model_copy(update={"state": DrainState.DONE, "steps": (moved,)})
    first, second = records.written("drains/alpha", encode(done))
    assert (first.kind, first.text) == (Kind.DRAIN_STEP, "drain of alpha: VM web is moved to beta")
    assert (second.kind, second.data["vms_over"]) == (Kind.DRAIN_STATE, 1)
    again = drain.model_copy(update={"created_at_s": 2.0})
    assert kinds(records.written("drains/alpha", encode(again))) == [Kind.DRAIN_BEGUN]


def test_secrets_and_what_cannot_be_read_are_not_told() -> None:
    records = RecordNews()
    assert records.written("tokens/abc", b'{"expires_at_s": 1}') == []
    assert records.written("authority", b"{}") == []
    assert records.written("vms/web", b"not json") == []
