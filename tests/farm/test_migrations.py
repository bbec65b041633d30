"""Migrations as conversations between an operator, the controller, two scripted hosts and their movers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from tests.farm.scripted_farm import farm, until

from transhume.model.errors import (
    Conflict,
    HostLost,
    NotFound,
    PreflightFailed,
    Refused,
    StoreFull,
    VmmError,
)
from transhume.model.migration import (
    DowntimeReport,
    IterationReport,
    MigrationOptions,
    MigrationReport,
    Outcome,
    Phase,
    Progress,
)
from transhume.model.orders import CancelReply, DestinationFacts
from transhume.model.vm import Ownership, VmState
from transhume.store.interface import Compare
from transhume.store.memory import MemoryStore


async def test_a_vm_moves() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.migrate()
        assert (migration.source, migration.destination, migration.epoch) == ("alpha", "beta", 1)
        assert (await f.controller.vms.show("web")).migration == migration.id
        await f.begun(migration)
        assert f.hosts["beta"].prepared[migration.id].spec.machine_type == "pc-q35-7.2"
        assert f.hosts["alpha"].begun[migration.id].prepared.port == 7000
        await f.report(migration, "alpha", Phase.PRECOPY)
        await f.commit(migration)
        await f.report(migration, "alpha", Phase.RUNNING_AT_DESTINATION, outcome=Outcome.COMPLETED)
        ended = await f.ended(migration)
        assert (ended.outcome, ended.phase, ended.runs_at) == (
            Outcome.COMPLETED,
            Phase.DONE,
            "destination host beta",
        )
        vm = await f.controller.vms.show("web")
        assert (vm.ownership, vm.state, vm.migration) == (
            Ownership(owner="beta", epoch=2),
            VmState.RUNNING,
            "",
        )


async def test_without_a_destination_the_host_with_most_memory_is_chosen() -> None:
    async with farm("alpha", "beta", "gamma", "delta") as f:
        await f.running_vm()
        f.hosts["beta"].destination_facts_now = DestinationFacts(memory_available_bytes=2 << 30)
        f.hosts["gamma"].destination_facts_now = DestinationFacts(memory_available_bytes=4 << 30)
        f.hosts["delta"].destination_facts_now = DestinationFacts(
            memory_available_bytes=8 << 30, disk_obstacles=("disk /x is not there",)
        )
        assert (await f.migrate(to=None)).destination == "gamma"


async def test_a_host_that_does_not_answer_is_not_chosen() -> None:
    async with farm("alpha", "beta", "gamma") as f:
        await f.running_vm()
        f.hosts["gamma"].inventory_now = f.hosts["gamma"].inventory_now.model_copy(
            update={"memory_available_bytes": 7 << 30}
        )
        f.hosts["gamma"].failures["destination_facts"] = HostLost("gone")
        assert (await f.migrate(to=None)).destination == "beta"


async def test_when_no_host_will_do_each_is_named_with_its_reasons() -> None:
    async with farm("alpha", "beta", "gamma") as f:
        await f.running_vm()
        f.hosts["beta"].destination_facts_now = DestinationFacts(memory_available_bytes=1)
        f.hosts["gamma"].failures["destination_facts"] = HostLost("gone")
        with pytest.raises(PreflightFailed) as caught:
            await f.migrate(to=None)
        assert [reason.split(":")[0] for reason in caught.value.reasons] == ["to beta", "to gamma"]
        assert "runs on alpha as before" in caught.value.message
        assert await f.controller.migrations.list() == []


async def test_a_lone_host_is_told_how_to_get_another() -> None:
    async with farm("alpha") as f:
        await f.running_vm()
        with pytest.raises(PreflightFailed) as caught:
            await f.migrate(to=None)
        assert "transhume join" in caught.value.reasons[0]


async def test_preflight_reasons_come_before_anything_changes() -> None:
    async with farm() as f:
        await f.running_vm()
        await f.controller.vms.kill("web")
        f.hosts["beta"].destination_facts_now = DestinationFacts(memory_available_bytes=1)
        with pytest.raises(PreflightFailed) as caught:
            await f.migrate()
        assert len(caught.value.reasons) == 2
        assert (await f.controller.vms.show("web")).migration == ""
        assert "prepare" not in f.hosts["beta"].calls


async def test_of_two_migrations_at_once_the_second_is_refused_with_the_id_of_the_first() -> None:
    async with farm("alpha", "beta", "gamma") as f:
        await f.running_vm()
        answers = await asyncio.gather(f.migrate(), f.migrate(to="gamma"), return_exceptions=True)
        [won] = [answer for answer in answers if not isinstance(answer, BaseException)]
        [lost] = [answer for answer in answers if isinstance(answer, BaseException)]
        assert isinstance(lost, Conflict)
        assert won.id in lost.message
        with pytest.raises(Conflict, match=won.id):
            await f.migrate()


async def test_a_vm_that_moves_is_neither_started_nor_stopped_nor_deleted() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.migrate()
        vms = f.controller.vms
        for verb in (vms.start("web"), vms.stop("web", 1.0), vms.kill("web"), vms.delete("web")):
            with pytest.raises(Conflict, match=migration.id):
                await verb


async def test_a_destination_that_cannot_prepare_leaves_the_vm_where_it_is() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["beta"].failures["prepare"] = VmmError("QEMU on beta ended at once: no such machine")
        ended = await f.ended(await f.migrate())
        assert (ended.outcome, ended.phase, ended.runs_at) == (
            Outcome.FAILED,
            Phase.ABORTED,
            "source host alpha",
        )
        assert ended.error_code == "vmm"
        assert "no such machine" in ended.error
        assert "VM web runs on source host alpha" in ended.error
        await until(lambda: f.hosts["beta"].abandoned == [ended.id])
        vm = await f.controller.vms.show("web")
        assert vm.migration == ""
        assert vm.ownership.owner == "alpha"


async def test_a_source_that_cannot_begin_leaves_nothing_at_the_destination() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["alpha"].failures["begin"] = HostLost("host alpha does not answer")
        migration = await f.migrate()
        ended = await f.ended(migration)
        assert ended.outcome is Outcome.FAILED
        await until(lambda: f.hosts["beta"].abandoned == [ended.id] and "cancel" in f.hosts["alpha"].calls)
        # The order may have arrived all the same: whatever that mover sends, nobody can commit it.
        reply = await f.controller.swap_ownership(
            "web", Ownership(owner="alpha", epoch=1), Ownership(owner="beta", epoch=2)
        )
        assert not reply.won
        assert (reply.owner, reply.epoch) == ("alpha", 2)


async def test_a_migration_can_be_asked_for_again_after_a_failure() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["beta"].failures["prepare"] = VmmError("no")
        await f.ended(await f.migrate())
        f.hosts["beta"].failures.clear()
        migration = await f.migrate()
        assert migration.epoch == 2
        await f.begun(migration)


async def test_cancel_while_the_destination_prepares() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["beta"].waits["prepare"] = asyncio.Event()
        migration = await f.migrate()
        await until(lambda: "prepare" in f.hosts["beta"].calls)
        assert await f.controller.migrations.cancel("web") == CancelReply(
            accepted=True, runs_at="source host alpha", migration=migration.id
        )
        f.hosts["beta"].waits["prepare"].set()
        await until(lambda: f.hosts["beta"].abandoned == [migration.id])
        assert "begin" not in f.hosts["alpha"].calls
        ended = await f.controller.migrations.get(migration.id)
        assert (ended.outcome, ended.runs_at) == (Outcome.CANCELLED, "source host alpha")


async def test_cancel_while_the_source_begins_waits_and_goes_to_the_source() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["alpha"].waits["begin"] = asyncio.Event()
        migration = await f.migrate()
        await until(lambda: "begin" in f.hosts["alpha"].calls)
        cancelling = asyncio.create_task(f.controller.migrations.cancel(migration.id))
        await asyncio.sleep(0)
        assert "cancel" not in f.hosts["alpha"].calls
        f.hosts["alpha"].waits["begin"].set()
        assert (await cancelling).accepted
        assert f.hosts["alpha"].calls[-1] == "cancel"


async def test_cancel_under_way_is_the_sources_business() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        f.hosts["alpha"].cancel_reply = CancelReply(accepted=False, runs_at="beta")
        assert await f.controller.migrations.cancel(migration.id) == CancelReply(
            accepted=False, runs_at="beta", migration=migration.id
        )
        f.hosts["alpha"].failures["cancel"] = HostLost("no answer")
        with pytest.raises(HostLost, match="unknown until it does"):
            await f.controller.migrations.cancel(migration.id)
        await f.commit(migration)
        there = CancelReply(accepted=False, runs_at="destination host beta", migration=migration.id)
        assert await f.controller.migrations.cancel(migration.id) == there


async def test_cancel_of_what_the_source_does_not_know_ends_it() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        f.hosts["alpha"].begun.clear()
        assert (await f.controller.migrations.cancel(migration.id)).accepted
        assert (await f.ended(migration)).outcome is Outcome.CANCELLED
        assert f.hosts["beta"].abandoned == [migration.id]


async def test_cancel_after_the_commit_says_where_the_vm_runs() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.commit(migration)
        f.hosts["alpha"].begun.clear()
        there = CancelReply(accepted=False, runs_at="destination host beta", migration=migration.id)
        assert await f.controller.migrations.cancel(migration.id) == there
        await f.report(migration, "alpha", Phase.DONE, outcome=Outcome.COMPLETED)
        assert await f.controller.migrations.cancel(migration.id) == there
        with pytest.raises(Conflict, match="not moving; it belongs to beta"):
            await f.controller.migrations.cancel("web")
        with pytest.raises(NotFound):
            await f.controller.migrations.cancel("nothing")


async def test_a_claimed_completion_that_the_register_does_not_know_is_refused() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        with pytest.raises(Conflict, match="gives VM web to alpha in epoch 1"):
            await f.report(migration, "beta", Phase.DONE, outcome=Outcome.COMPLETED)
        assert (await f.controller.migrations.get(migration.id)).outcome is Outcome.RUNNING


async def test_a_failure_reported_before_the_commit_fences_the_destination() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.report(
            migration,
            "alpha",
            Phase.ABORTED,
            outcome=Outcome.FAILED,
            error="The link broke.",
            error_code="host-lost",
        )
        ended = await f.controller.migrations.get(migration.id)
        assert (ended.outcome, ended.error_code, ended.runs_at) == (
            Outcome.FAILED,
            "host-lost",
            "source host alpha",
        )
        assert ended.error == "The link broke. VM web runs on source host alpha, where it was"
        assert await f.controller.ownership("web") == Ownership(owner="alpha", epoch=2)


@pytest.mark.parametrize(
    ("runs_at", "told"),
    [
        ("nowhere: The link broke", "The link broke. VM web runs nowhere"),
        ("nowhere: it died", "The link broke. VM web runs nowhere: it died"),
        (
            "nowhere for the moment: paused at source host alpha, to go on",
            "The link broke. VM web runs nowhere for the moment: paused at source host alpha, to go on",
        ),
    ],
)
async def test_where_a_vm_runs_that_runs_nowhere(runs_at: str, told: str) -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.report(
            migration,
            "alpha",
            Phase.ABORTED,
            outcome=Outcome.FAILED,
            error="The link broke.",
            error_code="host-lost",
            runs_at=runs_at,
        )
        assert (await f.controller.migrations.get(migration.id)).error == told


async def test_a_failure_reported_after_the_sources_own_abort_changes_no_epoch() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        aborted = Ownership(owner="alpha", epoch=2)
        assert (await f.controller.swap_ownership("web", Ownership(owner="alpha", epoch=1), aborted)).won
        await f.report(migration, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        assert await f.controller.ownership("web") == aborted
        assert (await f.controller.migrations.get(migration.id)).outcome is Outcome.CANCELLED


async def test_a_failure_reported_after_the_commit_is_a_completion_with_an_error() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.commit(migration)
        await f.report(
            migration, "alpha", Phase.COMMITTED, outcome=Outcome.FAILED, error="QEMU died", runs_at="nowhere"
        )
        ended = await f.controller.migrations.get(migration.id)
        assert (ended.outcome, ended.runs_at, ended.error) == (Outcome.COMPLETED, "nowhere", "QEMU died")


async def test_reports_are_joined_never_backwards_and_twice_is_once() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())

        def progress(elapsed_s: float, fraction: float, phase: Phase = Phase.PRECOPY) -> Progress:
            return Progress(
                migration=migration.id, vm="web", phase=phase, elapsed_s=elapsed_s, fraction=fraction
            )

        await f.report(migration, "alpha", Phase.PRECOPY, progress=progress(2.0, 0.7))
        await f.report(migration, "alpha", Phase.PREPARED, progress=progress(1.0, 0.5, Phase.PREPARED))
        held = await f.controller.migrations.get(migration.id)
        assert held.phase is Phase.PRECOPY
        assert held.progress is not None
        assert (held.progress.elapsed_s, held.progress.fraction) == (2.0, 0.7)
        await f.commit(migration)
        source = MigrationReport(
            iterations=(
                IterationReport(
                    index=0, pages=1, zero_pages=0, wire_bytes=4096, duration_ms=1, dirty_pages_after=0
                ),
            ),
            downtime=DowntimeReport(stop_ms=3.0, total_ms=30.0),
            wire_bytes=5000,
        )
        for _ in range(2):
            await f.report(migration, "alpha", Phase.DONE, outcome=Outcome.COMPLETED, report=source)
        late = MigrationReport(downtime=DowntimeReport(load_ms=7.0))
        for _ in range(2):
            await f.report(migration, "beta", Phase.DONE, outcome=Outcome.COMPLETED, report=late)
        ended = await f.controller.migrations.get(migration.id)
        assert ended.report.downtime == DowntimeReport(stop_ms=3.0, load_ms=7.0, total_ms=30.0)
        assert ended.report.wire_bytes == 5000
        assert len(ended.report.iterations) == 1
        assert await f.controller.ownership("web") == Ownership(owner="beta", epoch=2)


async def test_strangers_may_not_report() -> None:
    async with farm("alpha", "beta", "gamma") as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        with pytest.raises(Refused, match="gamma has no part"):
            await f.report(migration, "gamma", Phase.PRECOPY)
        with pytest.raises(NotFound):
            await f.report(migration.model_copy(update={"id": "m99"}), "alpha", Phase.PRECOPY)


async def test_followers_see_the_way_and_the_end_and_can_go_on_where_they_were() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        follower = f.controller.migrations.follow(migration.id)
        first = await anext(follower)
        assert first.migration.phase is Phase.PREPARED
        await f.report(migration, "alpha", Phase.PRECOPY)
        second = await anext(follower)
        assert second.migration.phase is Phase.PRECOPY
        assert second.id > first.id
        await f.report(migration, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        rest = [event async for event in f.controller.migrations.follow(migration.id, after=second.id)]
        assert [event.migration.outcome for event in rest] == [Outcome.CANCELLED]
        assert [event.migration.outcome async for event in follower] == [Outcome.CANCELLED]


async def test_after_a_restart_the_movers_reports_end_what_was_under_way() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.report(migration, "alpha", Phase.PRECOPY)
        await f.restart()
        assert (await f.controller.migrations.get(migration.id)).phase is Phase.PRECOPY
        f.now_s += 300.0
        await f.controller.migrations.sweep()
        await f.commit(migration)
        await f.report(migration, "alpha", Phase.DONE, outcome=Outcome.COMPLETED)
        assert (await f.controller.migrations.get(migration.id)).outcome is Outcome.COMPLETED


async def test_after_a_restart_one_that_was_only_requested_is_given_up_after_a_limit() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["beta"].waits["prepare"] = asyncio.Event()
        migration = await f.migrate()
        await f.restart()
        await f.beat()
        await f.controller.migrations.sweep()
        assert (await f.controller.migrations.get(migration.id)).outcome is Outcome.RUNNING
        f.now_s += 61.0
        await f.controller.migrations.sweep()
        ended = await f.controller.migrations.get(migration.id)
        assert (ended.outcome, ended.error_code, ended.runs_at) == (
            Outcome.FAILED,
            "timed-out",
            "source host alpha",
        )
        assert f.hosts["beta"].abandoned == [migration.id]
        assert (await f.controller.vms.show("web")).migration == ""


async def test_a_destinations_word_waits_for_the_sources_and_is_taken_without() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.commit(migration)
        for _ in range(2):
            await f.report(migration, "beta", Phase.DONE, outcome=Outcome.COMPLETED)
        held = await f.controller.migrations.get(migration.id)
        assert (held.outcome, held.phase) == (Outcome.RUNNING, Phase.RUNNING_AT_DESTINATION)
        await f.controller.migrations.sweep()
        assert (await f.controller.migrations.get(migration.id)).outcome is Outcome.RUNNING
        f.now_s += 11.0
        await f.controller.migrations.sweep()
        ended = await f.controller.migrations.get(migration.id)
        assert (ended.outcome, ended.phase, ended.error) == (Outcome.COMPLETED, Phase.DONE, "")


async def test_a_vm_lost_after_the_commit_is_not_called_running() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.commit(migration)
        lost = {"outcome": Outcome.FAILED, "runs_at": "nowhere: QEMU died", "error": "QEMU died"}
        await f.report(migration, "beta", Phase.DONE, **lost)
        await f.report(migration, "alpha", Phase.DONE, outcome=Outcome.COMPLETED)
        ended = await f.ended(migration)
        assert ended.runs_at.startswith("nowhere")
        assert "QEMU died" in ended.error


async def test_a_cancel_stays_one_though_the_destination_calls_it_a_failure_first() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.report(migration, "beta", Phase.ABORTED, outcome=Outcome.FAILED, error="the source gave up")
        await f.report(migration, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        assert (await f.ended(migration)).outcome is Outcome.CANCELLED


async def test_what_is_committed_and_never_reported_on_ends_as_the_register_has_it() -> None:
    async with farm() as f:
        await f.running_vm()
        migration = await f.begun(await f.migrate())
        await f.report(migration, "alpha", Phase.PRECOPY)
        await f.commit(migration)
        f.now_s += 10_000.0
        await f.controller.migrations.sweep()
        ended = await f.controller.migrations.get(migration.id)
        assert ended.outcome is Outcome.COMPLETED
        assert ended.runs_at == "unknown until host beta answers"
        assert "gives web to host beta" in ended.error
        assert await f.controller.ownership("web") == Ownership(owner="beta", epoch=2)


class FullStore(MemoryStore):
    """A store whose disk can be full."""

    full = False

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        if self.full and puts:
            raise StoreFull("the disk of the farm's store is full and nothing was written")
        return await super().transact(compares, puts, deletes)


async def test_a_full_store_refuses_a_migration_and_its_end_waits_for_room() -> None:
    store = FullStore()
    async with farm(store=store) as f:
        await f.running_vm()
        store.full = True
        with pytest.raises(StoreFull):
            await f.migrate()
        assert "prepare" not in f.hosts["beta"].calls
        store.full = False
        migration = await f.begun(await f.migrate())
        store.full = True
        # Progress needs no room.
        await f.report(migration, "alpha", Phase.PRECOPY)
        with pytest.raises(StoreFull):
            await f.report(migration, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        assert (await f.controller.migrations.get(migration.id)).outcome is Outcome.RUNNING
        store.full = False
        await f.report(migration, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        assert (await f.ended(migration)).outcome is Outcome.CANCELLED


async def test_a_dry_run_changes_nothing_and_predicts() -> None:
    async with farm() as f:
        await f.running_vm()
        answer = await f.controller.migrations.dry_run("web", None, MigrationOptions())
        assert (answer.source, answer.destination, answer.reasons) == ("alpha", "beta", ())
        assert answer.wire_bytes is not None
        assert answer.wire_bytes >= 512 << 20
        assert answer.downtime_ms is not None
        assert "converges" in answer.verdict
        assert await f.controller.migrations.list() == []


async def test_a_dry_run_tells_reasons_and_why_there_is_no_prediction() -> None:
    async with farm() as f:
        await f.running_vm()
        f.hosts["beta"].destination_facts_now = DestinationFacts(memory_available_bytes=1)
        f.hosts["alpha"].failures["sample_dirty_rate"] = VmmError("the VM does not run")
        answer = await f.controller.migrations.dry_run("web", "beta", MigrationOptions())
        assert len(answer.reasons) == 1
        assert answer.wire_bytes is None
        assert answer.verdict == "no prediction: the VM does not run"
