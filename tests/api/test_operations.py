"""Events and operations through HTTP, asked of the controller's host and of a member."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
import pytest
from tests.api.daemons import Daemons, two_daemons

from transhume.farm.drain_record import DrainOptions
from transhume.farm.feed import FarmEvent, Kind
from transhume.farm.operations import OperationKind, OperationState
from transhume.model.errors import Conflict, NotFound, TimedOut
from transhume.model.migration import MigrationOptions, MigrationReport, Outcome, Phase
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import Ownership, VmState


async def take(stream: AsyncIterator[FarmEvent], count: int) -> list[FarmEvent]:
    async with asyncio.timeout(20):
        return [await anext(stream) for _ in range(count)]


async def complete(d: Daemons, migration: str) -> None:
    record = await d.controller.migration(migration)
    await d.controller.swap_ownership(
        record.vm,
        Ownership(owner=record.source, epoch=record.epoch),
        Ownership(owner=record.destination, epoch=record.epoch + 1),
    )
    await d.controller.report(
        MigrationUpdate(
            migration=migration,
            host=record.source,
            phase=Phase.DONE,
            outcome=Outcome.COMPLETED,
            report=MigrationReport(),
        )
    )


async def test_a_life_is_told_in_order_and_taken_up_again_by_id() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        begin = d.controller.feed.last_id
        await d.running_vm()
        await client.pool.set_vm("web", add_labels=("front",))
        async with aclosing(client.feed.follow(begin)) as stream:
            told = await take(stream, 3)
            assert [event.kind for event in told] == [Kind.VM_CREATED, Kind.VM_STATE, Kind.VM_CHANGED]
            assert [event.id for event in told] == [begin + 1, begin + 2, begin + 3]
            assert told[1].data == {"state": "running", "before": "stopped"}
            await client.kill_vm("web")  # while it is followed
            assert (await take(stream, 1))[0].text == "VM web at alpha is stopped, was running"
        await client.delete_vm("web")
        async with aclosing(client.feed.follow(told[-1].id)) as stream:
            assert [event.kind for event in await take(stream, 2)] == [Kind.VM_STATE, Kind.VM_DELETED]
        page = await client.feed.history(told[-1].id, 1)
        assert [event.kind for event in page.events] == [Kind.VM_DELETED]
        assert page.gap  # the limit left one out


async def test_a_number_that_is_not_held_is_told_first() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        feed = d.controller.feed
        for after in (1, feed.last_id + 1000):
            async with aclosing(client.feed.follow(after)) as stream:
                first, second = await take(stream, 2)
            assert first.kind is Kind.GAP
            assert "look at the farm anew" in first.text
            assert first.data == {"after": after, "oldest_id": feed.oldest_id}
            assert second.id == first.id + 1 == feed.oldest_id
            assert (await client.feed.history(after)).gap
        async with aclosing(client.feed.follow(0)) as stream:
            assert (await take(stream, 1))[0].id == feed.oldest_id


async def test_the_standard_header_resumes_a_stream_on_every_host() -> None:
    async with two_daemons() as d:
        await d.running_vm()
        last_id = d.controller.feed.last_id
        for config in (d.alpha_config, d.beta_config):
            transport = httpx.AsyncHTTPTransport(uds=str(config.api_socket))
            async with (
                httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
                # The header of a client that reconnects is newer than the address it began with.
                http.stream(
                    "GET", "/v1/events?after=1", headers={"Last-Event-ID": str(last_id - 1)}
                ) as answer,
            ):
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = answer.aiter_lines()
                async with asyncio.timeout(20):
                    assert (await anext(lines)).startswith(":")
                    assert await anext(lines) == ""
                    assert await anext(lines) == f"id: {last_id}"
                    assert await anext(lines) == "event: vm-state"
                    assert (
                        FarmEvent.model_validate_json((await anext(lines)).removeprefix("data: ")).vm == "web"
                    )


async def test_a_migration_is_an_operation_with_a_result() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm()
        begin = d.controller.feed.last_id
        migration = (await client.migrate("web", "beta", MigrationOptions())).id
        begun = await client.operations.show(migration)
        assert (begun.kind, begun.state, begun.vm) == (OperationKind.MIGRATION, OperationState.RUNNING, "web")
        with pytest.raises(TimedOut, match="it goes on"):
            await client.operations.wait(migration, 0.05)
        waiting = asyncio.create_task(client.operations.wait(migration))
        await complete(d, migration)
        async with asyncio.timeout(20):
            ended = await waiting
        assert (ended.state, ended.progress) == (OperationState.DONE, 1.0)
        assert ended.migration is not None
        assert ended.migration.outcome is Outcome.COMPLETED
        with pytest.raises(Conflict, match="is over: done"):
            await client.operations.cancel(migration)
        with pytest.raises(NotFound, match="no operation m0"):
            await client.operations.show("m0")
        told = {event.kind for event in (await client.feed.history(begin)).events}
        assert {Kind.MIGRATION_PHASE, Kind.VM_MOVED, Kind.MIGRATION_ENDED} <= told


async def test_a_drain_is_an_operation_and_its_steps_are_told() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm()
        begin = d.controller.feed.last_id
        await client.pool.begin_drain("alpha", DrainOptions())
        async with aclosing(client.feed.follow(begin)) as stream, asyncio.timeout(20):
            async for event in stream:
                if event.kind is Kind.DRAIN_STEP:
                    break
        assert event.data["state"] == "moving"
        [moving, drain] = sorted(await client.operations.list(), key=lambda each: each.kind, reverse=True)
        assert (drain.id, drain.kind, drain.state) == (
            "drain-alpha",
            OperationKind.DRAIN,
            OperationState.RUNNING,
        )
        assert moving.id == event.migration
        await complete(d, moving.id)
        ended = await client.operations.wait("drain-alpha", 20)
        assert (ended.state, ended.progress) == (OperationState.DONE, 1.0)
        told = (await client.feed.history(begin)).events
        assert [event.data["state"] for event in told if event.kind is Kind.DRAIN_STEP] == ["moving", "moved"]
        assert [event.data["state"] for event in told if event.kind is Kind.DRAIN_STATE] == ["done"]
        assert [event.data["state"] for event in told if event.kind is Kind.HOST_CHANGED] == [
            "draining",
            "maintenance",
        ]


async def test_an_operation_is_cancelled() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm()
        await client.pool.begin_drain("alpha", DrainOptions())
        cancelled = await client.operations.cancel("drain-alpha")
        assert cancelled.state is OperationState.CANCELLING
        for operation in await client.operations.list():
            if operation.kind is OperationKind.MIGRATION and not operation.state.over:
                await client.operations.cancel(operation.id)
                update = MigrationUpdate(
                    migration=operation.id, host="alpha", phase=Phase.ABORTED, outcome=Outcome.CANCELLED
                )
                await d.controller.report(update)
        assert (await client.operations.wait("drain-alpha", 20)).state is OperationState.CANCELLED


async def test_hosts_that_are_lost_come_back_and_leave() -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        begin = d.controller.feed.last_id
        d.later_s = 7200.0
        async with aclosing(client.feed.follow(begin)) as stream:
            lost = await take(stream, 2)
            assert [(event.kind, event.host) for event in lost] == [
                (Kind.HOST_LOST, "alpha"),
                (Kind.HOST_LOST, "beta"),
            ]
            await d.beat()
            back = await take(stream, 2)
            assert {event.kind for event in back} == {Kind.HOST_BACK}
            d.beta.states["ghost"] = VmState.RUNNING  # a VM that is not beta's is not told
            await d.beat()
            await client.remove_host("beta")
            assert (await take(stream, 1))[0].kind is Kind.HOST_REMOVED
