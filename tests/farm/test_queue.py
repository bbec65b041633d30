"""A migration that is asked for while an earlier one of the VM owes pages waits for it, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from tests.farm.scripted_farm import Farm, farm, until

from transhume.model.errors import Conflict, HostLost, NotFound, PreflightFailed, Refused, StoreUnavailable
from transhume.model.migration import (
    Migration,
    MigrationOptions,
    MigrationReport,
    Outcome,
    PagingReport,
    Phase,
)
from transhume.model.orders import Adjustment, CancelReply, DestinationFacts
from transhume.model.vm import Ownership, VmState
from transhume.store.interface import Compare, Entry
from transhume.store.memory import MemoryStore

HOSTS = ("alpha", "beta", "gamma")


async def paging(f: Farm) -> Migration:
    """A migration from alpha whose VM runs at beta and lacks pages."""
    await f.running_vm()
    migration = await f.begun(await f.migrate())
    await f.report(migration, "alpha", Phase.PRECOPY)
    await f.commit(migration)
    await owes(f, migration)
    return await f.controller.migrations.get(migration.id)


async def owes(f: Farm, migration: Migration) -> None:
    report = MigrationReport(paging=PagingReport(owed_pages=12_345))
    await f.report(migration, migration.source, Phase.PAGING, report=report)


async def completes(f: Farm, migration: Migration) -> None:
    await f.report(migration, migration.source, Phase.DONE, outcome=Outcome.COMPLETED)


async def record(f: Farm, migration: Migration) -> Migration:
    return await f.controller.migrations.get(migration.id)


async def assert_free(f: Farm) -> None:
    """Nothing keeps the VM from being moved, stopped or deleted."""
    vm = await f.controller.vms.show("web")
    assert (vm.migration, vm.queued) == ("", "")


async def test_it_waits_and_begins_by_itself_from_where_the_vm_runs_then() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        assert queued.id != earlier.id
        assert (queued.phase, queued.outcome, queued.behind) == (Phase.QUEUED, Outcome.RUNNING, earlier.id)
        assert (queued.source, queued.destination, queued.runs_at) == ("beta", "gamma", "source host beta")
        vm = await f.controller.vms.show("web")
        assert (vm.migration, vm.queued) == (earlier.id, queued.id)
        assert [each.phase for each in await f.controller.migrations.list()] == [Phase.PAGING, Phase.QUEUED]
        await f.controller.migrations.sweep()
        assert "prepare" not in f.hosts["gamma"].calls

        await completes(f, earlier)
        begun = await f.begun(queued)
        assert (begun.id, begun.source, begun.destination, begun.epoch) == (queued.id, "beta", "gamma", 2)
        vm = await f.controller.vms.show("web")
        assert (vm.migration, vm.queued) == (queued.id, "")
        await f.report(begun, "beta", Phase.PRECOPY)
        await f.commit(begun)
        await completes(f, begun)
        assert (await record(f, queued)).runs_at == "destination host gamma"
        assert await f.controller.ownership("web") == Ownership(owner="gamma", epoch=3)
        await assert_free(f)


async def test_a_chain_of_three_hops_each_asked_for_while_the_one_before_owes_pages() -> None:
    async with farm(*HOSTS) as f:
        hop = await paging(f)
        for to in ("gamma", "alpha"):
            queued = await f.migrate(to=to)
            await completes(f, hop)
            hop = await f.begun(queued)
            await f.commit(hop)
            await owes(f, hop)
        await completes(f, hop)
        assert await f.controller.ownership("web") == Ownership(owner="alpha", epoch=4)
        outcomes = [each.outcome for each in await f.controller.migrations.list()]
        assert outcomes == [Outcome.COMPLETED] * 3
        await assert_free(f)


async def test_a_dry_run_says_that_it_would_wait_and_not_that_it_would_be_refused() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        found = await f.controller.migrations.dry_run("web", "gamma", MigrationOptions())
        assert (found.behind, found.source, found.reasons) == (earlier.id, "beta", ())
        queued = await f.migrate(to="gamma")
        found = await f.controller.migrations.dry_run("web", "gamma", MigrationOptions())
        assert found.behind == ""
        assert any(f"migration {queued.id} of VM web is queued already" in each for each in found.reasons)
        await f.controller.migrations.cancel("web")
        await completes(f, earlier)
        assert (await f.controller.migrations.dry_run("web", "gamma", MigrationOptions())).behind == ""


async def test_without_a_destination_it_is_chosen_when_it_begins() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to=None)
        assert queued.destination == ""
        f.hosts["alpha"].destination_facts_now = DestinationFacts(memory_available_bytes=7 << 30)
        await completes(f, earlier)
        assert (await f.begun(queued)).destination == "alpha"


async def test_followers_see_it_wait_begin_and_end() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        follower = f.controller.migrations.follow(queued.id)
        assert (await anext(follower)).migration.phase is Phase.QUEUED
        await completes(f, earlier)
        await f.begun(queued)
        await f.report(queued, "beta", Phase.ABORTED, outcome=Outcome.CANCELLED)
        seen = [event.migration async for event in follower]
        assert [each.phase for each in seen] == [Phase.REQUESTED, Phase.PREPARED, Phase.ABORTED]
        assert seen[-1].outcome is Outcome.CANCELLED


async def test_before_any_page_is_owed_a_second_one_is_refused() -> None:
    async with farm(*HOSTS) as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        for phase in (Phase.PRECOPY, Phase.SUSPENDED, Phase.STATE_SENT):
            await f.report(migration, "alpha", phase)
            with pytest.raises(Conflict, match=f"already migrating \\({migration.id}\\)"):
                await f.migrate(to="gamma")
        assert (await f.controller.vms.show("web")).queued == ""


async def test_only_one_waits() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        with pytest.raises(Conflict, match=f"migration {queued.id} of VM web is queued already"):
            await f.migrate(to="alpha")
        # Neither does anybody come in between when it is about to begin.
        f.hosts["beta"].waits["source_facts"] = asyncio.Event()
        await completes(f, earlier)
        await until(lambda: f.hosts["beta"].calls[-1] == "source_facts")
        assert (await f.controller.vms.show("web")).migration == ""
        with pytest.raises(Conflict, match=queued.id):
            await f.migrate(to="alpha")
        vms = f.controller.vms
        for verb in (vms.start("web"), vms.stop("web", 1.0), vms.kill("web"), vms.delete("web")):
            with pytest.raises(Conflict, match=f"about to move \\(migration {queued.id}\\)"):
                await verb
        f.hosts["beta"].waits["source_facts"].set()
        await f.begun(queued)


async def test_the_host_where_the_vm_runs_already_is_refused_at_once() -> None:
    async with farm(*HOSTS) as f:
        await paging(f)
        with pytest.raises(PreflightFailed) as caught:
            await f.migrate(to="beta")
        assert caught.value.reasons == ("VM web runs on beta already; name another host with --to",)
        with pytest.raises(NotFound):
            await f.migrate(to="nowhere")
        assert (await f.controller.vms.show("web")).queued == ""


async def test_reasons_found_when_it_begins_end_it_with_the_words() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        f.hosts["gamma"].destination_facts_now = DestinationFacts(
            memory_available_bytes=1, disk_obstacles=("disk /x is not there",)
        )
        await completes(f, earlier)
        ended = await f.ended(queued)
        assert (ended.outcome, ended.phase, ended.error_code) == (
            Outcome.FAILED,
            Phase.ABORTED,
            "preflight-failed",
        )
        assert "could not begin" in ended.error
        assert "disk /x is not there" in ended.error
        assert "of memory available" in ended.error
        assert ended.runs_at == "source host beta"
        assert "prepare" not in f.hosts["gamma"].calls
        await assert_free(f)


async def test_a_source_that_does_not_answer_when_it_begins_ends_it() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        f.hosts["beta"].failures["source_facts"] = HostLost("gone")
        await completes(f, earlier)
        ended = await f.ended(queued)
        assert (ended.outcome, ended.error_code) == (Outcome.FAILED, "host-lost")
        await assert_free(f)


async def test_a_vm_that_was_lost_takes_it_along() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        lost = {"error_code": "pages-lost", "error": "7 pages are lost", "runs_at": "nowhere: pages are lost"}
        await f.report(earlier, "beta", Phase.DONE, outcome=Outcome.FAILED, **lost)
        ended = await f.ended(queued)
        assert (ended.outcome, ended.error_code, ended.runs_at) == (
            Outcome.FAILED,
            "pages-lost",
            "nowhere: pages are lost",
        )
        words = (
            f"migration {queued.id} was queued behind {earlier.id}, which ended as failed: 7 pages are lost"
        )
        assert ended.error == words
        assert "source_facts" not in f.hosts["beta"].calls
        await assert_free(f)


async def test_cancel_ends_it_at_once_and_nothing_else() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        reply = await f.controller.migrations.cancel(queued.id)
        assert reply == CancelReply(
            accepted=True, runs_at="source host beta", migration=queued.id, behind=earlier.id
        )
        ended = await record(f, queued)
        assert (ended.outcome, ended.phase) == (Outcome.CANCELLED, Phase.ABORTED)
        assert (await record(f, earlier)).outcome is Outcome.RUNNING
        assert not (await f.controller.migrations.cancel(queued.id)).accepted
        await completes(f, earlier)
        await assert_free(f)
        assert "prepare" not in f.hosts["gamma"].calls


async def test_cancel_by_the_vms_name_takes_the_queued_one_first() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        assert (await f.controller.migrations.cancel("web")).migration == queued.id
        f.hosts["alpha"].cancel_reply = CancelReply(accepted=False, runs_at="destination host beta")
        assert (await f.controller.migrations.cancel("web")).migration == earlier.id
        # There is room for another one.
        assert (await f.migrate(to="gamma")).phase is Phase.QUEUED


async def test_cancel_while_it_is_looked_at_wins() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        f.hosts["gamma"].waits["destination_facts"] = asyncio.Event()
        await completes(f, earlier)
        await until(lambda: "destination_facts" in f.hosts["gamma"].calls)
        assert (await f.controller.migrations.cancel("web")).accepted
        f.hosts["gamma"].waits["destination_facts"].set()
        assert (await f.ended(queued)).outcome is Outcome.CANCELLED
        second = await f.migrate(to="gamma")
        await f.begun(second)
        assert list(f.hosts["gamma"].prepared) == [second.id]


async def test_cancel_after_it_has_begun_is_that_of_any_other() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        await completes(f, earlier)
        begun = await f.begun(queued)
        reply = await f.controller.migrations.cancel(begun.id)
        assert reply == CancelReply(accepted=True, runs_at="beta", migration=begun.id)
        assert f.hosts["beta"].calls[-1] == "cancel"


async def test_a_queued_one_has_no_limits_to_change_and_strangers_have_no_part_in_it() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        with pytest.raises(Conflict, match=f"waits for {earlier.id}"):
            await f.controller.migrations.adjust(queued.id, Adjustment(max_downtime_ms=3))
        # By the VM's name the one under way is meant.
        await f.controller.migrations.adjust("web", Adjustment(bandwidth_bytes_s=0))
        assert len(f.hosts["alpha"].adjustments) == 1
        with pytest.raises(Refused, match="has no part"):
            await f.report(queued, "alpha", Phase.PRECOPY)


async def test_it_survives_a_restart_of_the_controller() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        await f.restart()
        await f.beat()
        assert (await record(f, queued)).phase is Phase.QUEUED
        f.now_s += 100_000.0  # it waits as long as the earlier one takes
        await owes(f, earlier)
        await f.controller.migrations.sweep()
        assert (await record(f, queued)).phase is Phase.QUEUED
        await completes(f, earlier)
        begun = await f.begun(queued)
        await f.commit(begun)
        await completes(f, begun)
        assert (await record(f, queued)).outcome is Outcome.COMPLETED


async def test_a_controller_that_dies_between_the_end_of_one_and_the_begin_of_the_next() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        f.hosts["beta"].waits["source_facts"] = asyncio.Event()
        await completes(f, earlier)
        await until(lambda: f.hosts["beta"].calls[-1] == "source_facts")
        await f.restart()
        f.hosts["beta"].waits.clear()
        await f.beat()
        assert (await record(f, queued)).phase is Phase.QUEUED
        await f.controller.migrations.sweep()
        await f.begun(queued)


async def test_a_cancel_after_a_restart_ends_it() -> None:
    async with farm(*HOSTS) as f:
        await paging(f)
        queued = await f.migrate(to="gamma")
        await f.restart()
        assert (await f.controller.migrations.cancel("web")).migration == queued.id
        assert (await record(f, queued)).outcome is Outcome.CANCELLED


class HeldStore(MemoryStore):
    """A store whose transactions can be held back, and which counts those whose comparison did not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: asyncio.Event | None = None
        self.waiting = 0
        self.lost = 0
        self.silent = False

    async def get(self, key: str) -> Entry | None:
        if self.silent:
            raise StoreUnavailable("no quorum")
        return await super().get(key)

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
        done = await super().transact(compares, puts, deletes)
        self.lost += done is None
        return done

    def hold(self) -> None:
        self.gate, self.waiting = asyncio.Event(), 0

    def release(self) -> None:
        assert self.gate is not None
        self.gate.set()
        self.gate = None


async def test_of_two_who_queue_at_once_one_wins() -> None:
    store = HeldStore()
    async with farm(*HOSTS, store=store) as f:
        await paging(f)
        store.hold()
        asking = [asyncio.create_task(f.migrate(to=to)) for to in ("gamma", "alpha")]
        await until(lambda: store.waiting == 2)
        store.release()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        [won] = [answer for answer in answers if isinstance(answer, Migration)]
        [refused] = [answer for answer in answers if isinstance(answer, Conflict)]
        assert won.id in refused.message
        assert store.lost == 1
        assert (await f.controller.vms.show("web")).queued == won.id
        assert len(await f.controller.migrations.list()) == 2


async def test_one_asked_for_at_the_very_end_of_the_earlier_one_is_not_forgotten() -> None:
    """Whichever transaction comes first: it waits and begins, or it never had to wait."""
    store = HeldStore()
    async with farm(*HOSTS, store=store) as f:
        earlier = await paging(f)
        store.hold()
        ending = asyncio.create_task(completes(f, earlier))
        await until(lambda: store.waiting == 1)
        asking = asyncio.create_task(f.migrate(to="gamma"))
        await until(lambda: store.waiting == 2)
        store.release()
        await ending
        begun = await f.begun(await asking)
        assert store.lost >= 1
        assert (begun.source, begun.destination, begun.epoch) == ("beta", "gamma", 2)
        vm = await f.controller.vms.show("web")
        assert (vm.migration, vm.queued) == (begun.id, "")


async def test_an_end_that_meets_a_new_one_in_the_queue_leaves_it_there() -> None:
    store = HeldStore()
    async with farm(*HOSTS, store=store) as f:
        earlier = await paging(f)
        store.hold()
        asking = asyncio.create_task(f.migrate(to="gamma"))
        await until(lambda: store.waiting == 1)
        ending = asyncio.create_task(completes(f, earlier))
        await until(lambda: store.waiting == 2)
        store.release()
        await ending
        queued = await asking
        assert store.lost >= 1
        assert queued.behind == earlier.id
        await f.begun(queued)


async def test_a_cancel_that_meets_the_begin_waits_for_it() -> None:
    store = HeldStore()
    async with farm(*HOSTS, store=store) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        f.hosts["gamma"].waits["prepare"] = asyncio.Event()
        await completes(f, earlier)
        store.hold()
        await until(lambda: store.waiting == 1)
        cancelling = asyncio.create_task(f.controller.migrations.cancel(queued.id))
        store.release()
        reply = await cancelling
        assert (reply.accepted, reply.behind) == (True, "")  # it had begun
        f.hosts["gamma"].waits["prepare"].set()
        assert (await f.ended(queued)).outcome is Outcome.CANCELLED
        await until(lambda: f.hosts["gamma"].abandoned == [queued.id])
        await assert_free(f)


async def test_a_store_that_does_not_answer_when_it_should_begin_is_asked_again() -> None:
    store = HeldStore()
    async with farm(*HOSTS, store=store) as f:
        earlier = await paging(f)
        queued = await f.migrate(to="gamma")
        f.hosts["beta"].waits["source_facts"] = asyncio.Event()
        await completes(f, earlier)
        await until(lambda: f.hosts["beta"].calls[-1] == "source_facts")
        store.silent = True
        f.hosts["beta"].waits.pop("source_facts").set()
        await until(lambda: not any(task.get_name() == f"set up {queued.id}" for task in asyncio.all_tasks()))
        store.silent = False
        assert (await record(f, queued)).phase is Phase.QUEUED
        async with asyncio.timeout(5):
            while queued.id not in f.hosts["beta"].begun:
                await f.controller.migrations.sweep()
                await asyncio.sleep(0)


async def test_the_options_of_the_queued_one_hold_when_it_begins() -> None:
    async with farm(*HOSTS) as f:
        earlier = await paging(f)
        options = MigrationOptions(max_downtime_ms=7, verify=True)
        queued = await f.controller.migrations.request("web", "gamma", options)
        await completes(f, earlier)
        await f.begun(queued)
        assert f.hosts["beta"].begun[queued.id].migration.options == options
        assert f.hosts["beta"].states["web"] is VmState.RUNNING
