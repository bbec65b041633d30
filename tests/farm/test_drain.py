"""Drains of scripted farms: in order, through failures, pauses, cancels and restarts of the controller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.farm.scripted_farm import MIB, Farm, farm, until

from transhume.farm.drain_record import Drain, DrainKind, DrainOptions, DrainState, StepKind, StepState
from transhume.farm.records import FarmRecords
from transhume.farm.rules import Rule, RuleKind
from transhume.model.errors import Conflict, HostLost, NotFound, PreflightFailed, StoreUnavailable
from transhume.model.host import HostState
from transhume.model.migration import Migration, MigrationReport, Outcome, Phase, Progress
from transhume.model.orders import DestinationFacts
from transhume.model.vm import Ownership, VmSpec, VmState

THREE = ("alpha", "beta", "gamma")
TWO_AT_ONCE = DrainOptions()


async def with_vms(f: Farm, *names: str, host: str = "alpha", memory_mib: int = 512) -> None:
    for name in names:
        await f.running_vm(name, host, memory_mib)
    f.now_s += 60.0
    await f.beat()


async def drained(f: Farm, host: str = "alpha", options: DrainOptions = TWO_AT_ONCE) -> Drain:
    return await f.controller.drains.begin(host, options)


async def shown(f: Farm, host: str = "alpha") -> Drain:
    return await f.controller.drains.show(host)


def states(drain: Drain) -> dict[str, str]:
    return {step.vm: step.state.value for step in drain.steps}


async def moving(f: Farm, count: int) -> Sequence[Migration]:
    """Wait until so many migrations are under way and their sources have begun."""
    under_way = f.controller.migrations.under_way
    await until(lambda: len(under_way()) == count)
    for each in under_way():
        await begun(f, each)
    return sorted(under_way(), key=lambda each: each.vm)


async def complete(f: Farm, migration: Migration) -> None:
    await f.reached(migration, Phase.PREPARED)
    await f.commit(migration)
    f.hosts[migration.source].specs.pop(migration.vm, None)
    f.hosts[migration.source].states.pop(migration.vm, None)
    report = MigrationReport(wire_bytes=77, total_ms=1500.0)
    await f.report(migration, migration.source, Phase.DONE, outcome=Outcome.COMPLETED, report=report)


async def fail(f: Farm, migration: Migration, error: str = "the link broke") -> None:
    await f.reached(migration, Phase.PREPARED)
    await f.report(
        migration,
        migration.source,
        Phase.ABORTED,
        outcome=Outcome.FAILED,
        error=error,
        error_code="host-lost",
    )


async def begun(f: Farm, migration: Migration) -> None:
    await until(lambda: migration.id in f.hosts[migration.source].begun)


async def complete_all(f: Farm, host: str = "alpha") -> Drain:
    """Let every move that begins succeed until the drain is over."""
    for _ in range(50):
        for each in f.controller.migrations.under_way():
            await begun(f, each)
            await complete(f, each)
        if await f.controller.drains.advance(host):
            return await shown(f, host)
    raise AssertionError(f"not over: {await shown(f, host)}")


async def ended(f: Farm, host: str = "alpha") -> Drain:
    for _ in range(50):
        if await f.controller.drains.advance(host):
            return await shown(f, host)
        await asyncio.sleep(0)
    raise AssertionError(f"not over: {await shown(f, host)}")


async def test_every_vm_goes_two_at_once_and_the_host_stays_without() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        plan = await f.controller.drains.plan("alpha", TWO_AT_ONCE)
        assert {step.vm: (step.wave, step.destination) for step in plan.steps} == {
            "a": (1, "beta"),
            "b": (1, "gamma"),
            "c": (2, "beta"),
        }
        assert plan.wire_bytes == 3 * 512 * MIB
        assert plan.seconds > 0
        assert f.controller.members.record("alpha").state is HostState.ACTIVE
        with pytest.raises(NotFound, match="never drained"):
            await shown(f)

        await drained(f)
        assert f.controller.members.record("alpha").state is HostState.DRAINING
        first, second = await moving(f, 2)
        assert {first.vm, second.vm} == {"a", "b"}
        with pytest.raises(PreflightFailed) as caught:
            await f.controller.vms.create(VmSpec(name="new", memory_bytes=64 * MIB, cpus=1), "alpha")
        assert "alpha is being drained" in caught.value.reasons[0]
        progress = Progress(migration=first.id, vm="a", phase=Phase.PRECOPY, elapsed_s=1, fraction=0.5)
        await f.report(first, "alpha", Phase.PRECOPY, progress=progress)
        assert [step.progress for step in (await shown(f)).steps] == [0.5, 0.0, 0.0]
        await complete(f, first)
        both = await moving(f, 2)
        assert [each.vm for each in both] == ["b", "c"]
        for each in both:
            await complete(f, each)
        drain = await ended(f)
        assert drain.state is DrainState.DONE
        assert [(step.wire_bytes, step.seconds, step.progress) for step in drain.steps] == [
            (77, 1.5, 1.0)
        ] * 3
        assert f.controller.members.record("alpha").state is HostState.MAINTENANCE
        assert await f.controller.vms.create(VmSpec(name="new", memory_bytes=64 * MIB, cpus=1), None)
        assert (await f.controller.vms.show("new")).ownership.owner != "alpha"


async def test_one_that_fails_is_tried_once_elsewhere_while_the_others_go_on() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        await drained(f)
        first, second = await moving(f, 2)
        await fail(f, first, "QEMU died")
        # The others go before it is its turn again.
        await complete(f, second)
        retry = first
        for _ in range(50):
            await f.controller.drains.advance("alpha")
            for each in f.controller.migrations.under_way():
                await begun(f, each)
                if each.vm == "a":
                    retry = each
                else:
                    await complete(f, each)
            if retry is not first:
                break
        assert retry.destination != first.destination
        await fail(f, retry, "it died again")
        drain = await complete_all(f)
        assert drain.state is DrainState.INCOMPLETE
        assert states(drain) == {"a": "failed", "b": "moved", "c": "moved"}
        [failed] = [step for step in drain.steps if step.vm == "a"]
        assert "it died again" in failed.reason
        assert (failed.attempts, set(failed.tried)) == (2, {"beta", "gamma"})
        assert (await f.controller.vms.show("a")).ownership == Ownership(owner="alpha", epoch=3)
        # The next drain has one VM to move, and remembers the others.
        await drained(f)
        drain = await complete_all(f)
        assert states(drain) == {"a": "moved", "b": "moved", "c": "moved"}


async def test_it_goes_on_by_itself_after_a_restart_of_the_controller() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        await drained(f)
        first, second = await moving(f, 2)
        await f.restart()
        assert f.controller.members.record("alpha").state is HostState.DRAINING
        # Nobody has reported to the new controller yet: nothing is given up for that.
        await f.controller.drains.advance("alpha")
        assert states(await shown(f)) == {"a": "moving", "b": "moving", "c": "waiting"}
        await complete(f, first)
        await f.controller.drains.advance("alpha")
        assert states(await shown(f)) == {"a": "moved", "b": "moving", "c": "waiting"}
        await f.beat()
        f.controller.drains.wake()
        await complete(f, second)
        [third] = await moving(f, 1)
        assert third.vm == "c"
        await f.restart()
        await f.beat()
        await complete(f, third)
        assert (await ended(f)).state is DrainState.DONE
        await f.restart()
        assert [host.state for host in await f.controller.members.hosts()] == [
            "maintenance",
            "active",
            "active",
        ]


async def test_a_migration_that_was_entered_before_the_drain_knew_is_its_own() -> None:
    """The controller died between the two writes."""
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b")
        await drained(f, options=DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        kept = await FarmRecords(f.store).drain("alpha")
        assert kept is not None
        step = kept.record.steps[0].model_copy(update={"state": StepState.WAITING, "migration": ""})
        drain = kept.record.model_copy(update={"steps": (step, *kept.record.steps[1:])})
        await f.controller.close()
        await f.store.transact(puts={kept.key: drain.model_dump_json().encode()})
        await f.restart()
        await f.beat()
        await f.controller.drains.advance("alpha")
        shown_step = (await shown(f)).steps[0]
        assert (shown_step.state, shown_step.migration) == (StepState.MOVING, first.id)
        assert len(f.controller.migrations.under_way()) == 1


async def test_a_pause_begins_nothing_and_ends_nothing() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        await drained(f, options=DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        assert (await f.controller.drains.pause("alpha")).state is DrainState.PAUSED
        with pytest.raises(Conflict, match="is paused, not running"):
            await f.controller.drains.pause("alpha")
        await complete(f, first)
        await f.controller.drains.advance("alpha")
        assert states(await shown(f)) == {"a": "moved", "b": "waiting", "c": "waiting"}
        await f.restart()
        await f.beat()
        await f.controller.drains.advance("alpha")
        assert f.controller.migrations.under_way() == ()
        await f.controller.drains.resume("alpha")
        drain = await complete_all(f)
        assert drain.state is DrainState.DONE


async def test_a_cancel_leaves_what_has_moved_and_lets_the_rest_end() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        await drained(f, options=DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        await complete(f, first)
        [second] = await moving(f, 1)
        drain = await f.controller.drains.cancel("alpha", now=False)
        assert drain.state is DrainState.CANCELLING
        await complete(f, second)
        drain = await ended(f)
        assert drain.state is DrainState.CANCELLED
        assert states(drain) == {"a": "moved", "b": "moved", "c": "left"}
        assert f.controller.members.record("alpha").state is HostState.ACTIVE
        with pytest.raises(Conflict, match="is over: cancelled"):
            await f.controller.drains.cancel("alpha", now=False)


async def test_a_cancel_now_takes_back_what_is_under_way() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b")
        await drained(f, options=DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        await f.controller.drains.cancel("alpha", now=True)
        assert "cancel" in f.hosts["alpha"].calls
        await f.report(first, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        drain = await ended(f)
        assert states(drain) == {"a": "left", "b": "left"}
        assert drain.state is DrainState.CANCELLED


async def test_no_vm_begins_after_the_deadline() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b")
        await drained(f, options=DrainOptions(parallel=1, deadline_s=100.0))
        [first] = await moving(f, 1)
        assert first.options.deadline_s == 100.0
        f.now_s += 100.0
        await f.beat()
        await complete(f, first)
        drain = await ended(f)
        assert drain.state is DrainState.INCOMPLETE
        [late] = [step for step in drain.steps if step.vm == "b"]
        assert (late.state, late.reason) == (StepState.FAILED, "the deadline of the drain came first")


async def test_stopped_vms_change_their_owner_or_are_left_with_a_word() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "web", "old")
        await f.controller.vms.kill("old")
        f.hosts["beta"].destination_facts_now = DestinationFacts(
            memory_available_bytes=6 << 30, disk_obstacles=("disk /old is not there",)
        )
        f.hosts["gamma"].destination_facts_now = f.hosts["beta"].destination_facts_now
        drain = await drained(f)
        [old] = [step for step in drain.steps if step.vm == "old"]
        assert (old.kind, old.state) == (StepKind.REHOME, StepState.LEFT)
        assert "beta: disk /old is not there" in old.reason
        [web] = [step for step in drain.steps if step.vm == "web"]
        assert (web.state, web.reason.count("disk /old")) == (StepState.BLOCKED, 2)
        assert (await ended(f)).state is DrainState.INCOMPLETE
        for host in ("beta", "gamma"):
            f.hosts[host].destination_facts_now = None
        await drained(f)
        drain = await complete_all(f)
        assert (drain.state, states(drain)) == (DrainState.DONE, {"old": "moved", "web": "moved"})
        assert (await f.controller.vms.show("old")).ownership.epoch == 2
        assert (await f.controller.vms.show("old")).ownership.owner != "alpha"


async def test_undrain_brings_back_who_was_there() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "off")
        await f.controller.vms.kill("off")
        await with_vms(f, "other", host="beta")
        await drained(f)
        with pytest.raises(Conflict, match="is being drained"):
            await f.controller.drains.undrain("alpha", True, TWO_AT_ONCE)
        await complete_all(f)
        drain = await f.controller.drains.undrain("alpha", True, TWO_AT_ONCE)
        assert drain is not None
        assert (drain.kind, {step.destination for step in drain.steps}) == (DrainKind.RESTORE, {"alpha"})
        assert f.controller.members.record("alpha").state is HostState.ACTIVE
        for each in await moving(f, 2):
            assert each.destination == "alpha"
            await complete(f, each)
        drain = await ended(f)
        assert states(drain) == {"a": "moved", "b": "moved", "off": "moved"}
        assert drain.state is DrainState.DONE
        owners = {vm.spec.name: vm.ownership.owner for vm in await f.controller.vms.list()}
        assert owners == {"a": "alpha", "b": "alpha", "off": "alpha", "other": "beta"}
        with pytest.raises(Conflict, match="is not drained"):
            await f.controller.drains.undrain("alpha", False, TWO_AT_ONCE)


async def test_undrain_alone_only_opens_the_host_again() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a")
        await drained(f)
        await complete_all(f)
        assert await f.controller.drains.undrain("alpha", False, TWO_AT_ONCE) is None
        assert f.controller.members.record("alpha").state is HostState.ACTIVE
        assert (await f.controller.vms.show("a")).ownership.owner == "beta"


async def test_the_last_host_is_not_drained_and_drains_do_not_cross() -> None:
    async with farm("alpha", "beta") as f:
        await with_vms(f, "a", host="alpha")
        await with_vms(f, "b", host="beta")
        await drained(f, "alpha")
        [first] = await moving(f, 1)
        with pytest.raises(Conflict, match="beta is the last one that may have VMs \\(alpha is draining\\)"):
            await drained(f, "beta")
        with pytest.raises(Conflict, match="is being drained"):
            await drained(f, "alpha")
        await complete(f, first)
        await ended(f, "alpha")
        with pytest.raises(Conflict, match="alpha is maintenance"):
            await f.controller.drains.plan("beta", TWO_AT_ONCE)
    async with farm("alpha") as f:
        assert (await drained(f)).steps == ()
        assert (await ended(f)).state is DrainState.DONE


async def test_two_drains_at_once_send_nothing_to_each_other() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", host="alpha")
        await drained(f, "alpha", DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        assert first.destination == "beta"
        await drained(f, "beta")
        await complete(f, first)
        # What had been on its way to beta is taken on by beta's own drain.
        [onward, second] = await moving(f, 2)
        assert {each.destination for each in (onward, second)} == {"gamma"}
        assert {onward.source, second.source} == {"alpha", "beta"}
        for each in (onward, second):
            await complete(f, each)
        for host in ("alpha", "beta"):
            assert (await ended(f, host)).state is DrainState.DONE
        owners = {vm.ownership.owner for vm in await f.controller.vms.list()}
        assert owners == {"gamma"}


async def test_what_blocks_a_vm_is_told_before_and_the_others_go() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "gpu", "web", "pinned")
        f.hosts["alpha"].source_changes = {"device_obstacles": ("it has a VFIO device",)}
        plan = await f.controller.drains.plan("alpha", TWO_AT_ONCE)
        assert set(states(plan).values()) == {"blocked"}
        assert plan.steps[0].reason == "it has a VFIO device"
        f.hosts["alpha"].source_changes = {}
        await f.controller.rules.add(Rule(name="r", kind=RuleKind.PIN, vms=("pinned",), hosts=("alpha",)))
        plan = await f.controller.drains.plan("alpha", TWO_AT_ONCE)
        assert states(plan) == {"gpu": "waiting", "web": "waiting", "pinned": "blocked"}
        assert plan.notes == ("alpha carries the controller: its VMs go, its daemon and the controller stay",)
        [pinned] = [step for step in plan.steps if step.vm == "pinned"]
        assert "rule r keeps pinned on alpha" in pinned.reason


async def test_vms_that_belong_together_go_together() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        await f.controller.rules.add(Rule(name="r", kind=RuleKind.AFFINITY, vms=("a", "c")))
        await f.controller.rules.add(Rule(name="s", kind=RuleKind.ANTI_AFFINITY, vms=("a", "b")))
        await drained(f)
        await complete_all(f)
        owners = {vm.spec.name: vm.ownership.owner for vm in await f.controller.vms.list()}
        assert owners["a"] == owners["c"] != owners["b"]
        assert (await f.controller.overview.view()).broken_rules == ()


async def test_a_move_asked_for_by_hand_is_taken_over_and_one_that_ends_otherwise_is_told() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        by_hand = await f.begun(await f.migrate("a", "gamma"))
        drain = await drained(f)
        [step] = [step for step in drain.steps if step.vm == "a"]
        assert (step.state, step.migration) == (StepState.MOVING, by_hand.id)
        await f.report(by_hand, "alpha", Phase.ABORTED, outcome=Outcome.CANCELLED)
        drain = await complete_all(f)
        assert states(drain) == {"a": "failed", "b": "moved", "c": "moved"}
        [step] = [step for step in drain.steps if step.vm == "a"]
        assert "was cancelled" in step.reason


async def test_a_vm_that_is_deleted_or_stopped_meanwhile_holds_nothing_up() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", "c")
        await drained(f, options=DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        for name in ("b", "c"):
            await f.controller.vms.kill(name)
        await f.controller.vms.delete("c")
        await complete(f, first)
        drain = await ended(f)
        assert states(drain) == {"a": "moved", "b": "moved", "c": "left"}
        assert (await f.controller.vms.show("b")).state is VmState.STOPPED


async def test_a_host_that_falls_silent_is_waited_for_and_a_store_that_fails_asked_again() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b")
        await drained(f, options=DrainOptions(parallel=1))
        [first] = await moving(f, 1)
        f.now_s += 20.0
        await f.beat("beta", "gamma")
        await complete(f, first)
        await f.controller.drains.advance("alpha")
        assert states(await shown(f)) == {"a": "moved", "b": "waiting"}
        f.hosts["alpha"].failures["source_facts"] = HostLost("gone")
        await f.beat()
        await f.controller.drains.advance("alpha")
        assert states(await shown(f)) == {"a": "moved", "b": "waiting"}
        f.hosts["alpha"].failures.clear()
        transact = f.store.transact

        async def broken(*_: object, **__: object) -> int | None:
            raise StoreUnavailable("no quorum")

        f.store.transact = broken  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            await f.controller.drains.advance("alpha")
        f.store.transact = transact  # type: ignore[method-assign]
        assert (await complete_all(f)).state is DrainState.DONE


async def test_the_destination_that_was_planned_is_given_up_when_it_is_full_by_then() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "a", "b", memory_mib=3000)
        drain = await drained(f, options=DrainOptions(parallel=1))
        assert [step.destination for step in drain.steps] == ["beta", "gamma"]
        [first] = await moving(f, 1)
        await f.running_vm("guest", "gamma", 6000)
        await complete(f, first)
        [second] = await moving(f, 1)
        assert (second.vm, second.destination) == ("b", "beta")
        await complete(f, second)
        assert (await ended(f)).state is DrainState.DONE


async def test_a_host_that_leaves_the_farm_takes_its_drain_along() -> None:
    async with farm(*THREE) as f:
        await with_vms(f, "b", host="beta")
        await drained(f, "beta")
        await complete_all(f, "beta")
        await f.controller.members.remove("beta")
        assert await f.store.get("drains/beta") is None
        with pytest.raises(NotFound):
            await shown(f, "beta")
