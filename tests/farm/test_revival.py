"""Taking a VM back: only from a destination that is silent, only while it lacks pages, and said plainly."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.farm.scripted_farm import Farm, farm

from transhume.host.shared_folder import probe
from transhume.model.errors import Conflict, PagesLost, PreflightFailed
from transhume.model.migration import (
    Migration,
    MigrationOptions,
    MigrationReport,
    Mode,
    Outcome,
    PagingReport,
    Phase,
)
from transhume.model.orders import FolderFacts, FolderProbe, MigrationUpdate, ProbeStep
from transhume.model.vm import Disk, Ownership, VmSpec, VmState

SILENT_S = 60.0


async def paging(f: Farm, *disks: Disk) -> Migration:
    """A migration whose VM runs at beta and lacks pages."""
    spec = VmSpec(name="web", memory_bytes=512 << 20, cpus=1, disks=disks)
    await f.controller.vms.create(spec, "alpha")
    await f.controller.vms.start("web")
    migration = await f.begun(await f.migrate())
    await f.commit(migration)
    report = MigrationReport(suspended_at_s=f.now_s - 5, paging=PagingReport(owed_pages=9))
    await f.controller.report(
        MigrationUpdate(migration=migration.id, host="alpha", phase=Phase.PAGING, report=report)
    )
    return await f.controller.migrations.get(migration.id)


async def lose_beta(f: Farm) -> None:
    f.now_s += SILENT_S
    await f.beat("alpha")


async def test_an_offer_says_what_is_lost() -> None:
    async with farm() as f:
        record = await paging(f, Disk(path="/srv/web.img"))
        await lose_beta(f)
        offer = await f.controller.revivals.offer("web", record)
        assert (offer.source, offer.destination, offer.age_s) == ("alpha", "beta", SILENT_S + 5)
        assert offer.changed_disks == ("/srv/web.img",)
        assert "switch it off first" in offer.warnings[0]
        assert "65 s ago" in offer.warnings[1]
        assert "/srv/web.img" in offer.warnings[2]


async def test_a_vm_is_taken_back_only_from_a_host_that_is_lost() -> None:
    async with farm() as f:
        record = await paging(f)
        with pytest.raises(Conflict, match="only from a host that is lost"):
            await f.controller.revivals.carry_out("web", record, despite_disks=False)
        assert "revive" not in f.hosts["alpha"].calls


async def test_a_vm_that_has_all_its_pages_is_not_taken_back() -> None:
    async with farm() as f:
        record = await paging(f)
        whole = MigrationReport(paging=PagingReport(owed_pages=9, complete=True))
        update = MigrationUpdate(migration=record.id, host="beta", phase=Phase.PAGING, report=whole)
        await f.controller.report(update)
        await lose_beta(f)
        with pytest.raises(Conflict, match="runs whole on host beta"):
            await f.controller.revivals.offer("web", await f.controller.migrations.get(record.id))


async def test_a_vm_that_went_on_writing_its_disks_needs_another_word() -> None:
    async with farm() as f:
        record = await paging(f, Disk(path="/srv/web.img"), Disk(path="/srv/os.img", read_only=True))
        await lose_beta(f)
        with pytest.raises(Conflict, match=r"writing its disks on host beta \(/srv/web.img\)"):
            await f.controller.revivals.carry_out("web", record, despite_disks=False)
        reply = await f.controller.revivals.carry_out("web", record, despite_disks=True)
        assert reply.revived


async def test_a_source_that_refuses_says_why() -> None:
    async with farm() as f:
        record = await paging(f)
        await lose_beta(f)
        f.hosts["alpha"].refuses_revival = "host beta has answered after all"
        with pytest.raises(Conflict, match="was not taken back: host beta has answered"):
            await f.controller.revivals.carry_out("web", record, despite_disks=False)


async def test_a_host_that_comes_back_is_told_which_vms_are_another_hosts() -> None:
    async with farm() as f:
        record = await paging(f)
        await lose_beta(f)
        swapped = await f.controller.swap_ownership(
            "web", Ownership(owner="beta", epoch=record.epoch + 1), Ownership(owner="alpha", epoch=9)
        )
        assert swapped.won
        beta = f.hosts["beta"]
        beta.states = {"web": VmState.RUNNING, "unknown-here": VmState.RUNNING}
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states)
        assert reply.disowned == ("web",)
        # The answer may be lost, or the VM's mover still at work: it is told until the VM is gone.
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states)
        assert reply.disowned == ("web",)
        beta.states = {"unknown-here": VmState.RUNNING}
        assert (await f.controller.heartbeat("beta", beta.inventory_now, beta.states)).disowned == ()
        alpha = f.hosts["alpha"]
        assert (await f.controller.heartbeat("alpha", alpha.inventory_now, alpha.states)).disowned == ()


async def take_back(f: Farm, record: Migration) -> None:
    """What the source's mover does when it is asked to."""
    swapped = await f.controller.swap_ownership(
        "web",
        Ownership(owner="beta", epoch=record.epoch + 1),
        Ownership(owner="alpha", epoch=record.epoch + 2),
    )
    assert swapped.won


async def test_a_host_that_came_back_right_before_is_told_too() -> None:
    async with farm() as f:
        record = await paging(f)
        await lose_beta(f)
        f.hosts["beta"].states = {"web": VmState.RUNNING}
        await f.beat("beta")
        await take_back(f, record)
        beta = f.hosts["beta"]
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states)
        assert reply.disowned == ("web",)


FAILED = {"outcome": Outcome.FAILED, "error": "it has ended"}


async def test_only_the_source_says_how_a_vm_that_was_taken_back_came_out() -> None:
    async with farm() as f:
        record = await paging(f)
        await take_back(f, record)
        with pytest.raises(Conflict, match="is for host alpha to say"):
            await f.report(record, "beta", Phase.DONE, runs_at="nowhere: it died", **FAILED)
        assert (await f.controller.migrations.get(record.id)).outcome is Outcome.RUNNING
        await f.report(record, "alpha", Phase.ABORTED, runs_at="source host alpha", **FAILED)
        ended = await f.controller.migrations.get(record.id)
        assert (ended.outcome, ended.runs_at) == (Outcome.FAILED, "source host alpha")


async def test_a_record_that_ended_while_its_vm_was_taken_back_says_so_later() -> None:
    async with farm() as f:
        record = await paging(f)
        f.now_s += 10_000
        await f.controller.migrations.sweep()
        assert (await f.controller.migrations.get(record.id)).outcome is Outcome.COMPLETED
        await take_back(f, record)
        await f.report(record, "alpha", Phase.ABORTED, runs_at="source host alpha", **FAILED)
        ended = await f.controller.migrations.get(record.id)
        assert (ended.outcome, ended.runs_at) == (Outcome.FAILED, "source host alpha")


async def test_pages_that_were_not_lost_after_all_may_differ() -> None:
    async with farm() as f:
        record = await paging(f)
        there = "destination host beta"
        lost = {"outcome": Outcome.FAILED, "error_code": PagesLost.code, "error": "lost", "runs_at": there}
        await f.report(record, "alpha", Phase.DONE, **lost)
        whole = MigrationReport(paging=PagingReport(owed_pages=9, complete=True))
        differs = {**lost, "error_code": "memory-differs", "error": "page 7 differs"}
        await f.report(record, "beta", Phase.DONE, report=whole, **differs)
        ended = await f.controller.migrations.get(record.id)
        assert (ended.outcome, ended.error_code) == (Outcome.FAILED, "memory-differs")


async def test_a_safe_copy_needs_a_folder_that_both_hosts_share() -> None:
    options = MigrationOptions(mode=Mode.POST_COPY, safe_dir="/srv/shared")
    async with farm() as f:
        await f.running_vm()
        f.hosts["beta"].folder_obstacle = "/srv/shared is another folder there"
        f.hosts["alpha"].folder_bytes = 1 << 20
        with pytest.raises(PreflightFailed) as refused:
            await f.controller.migrations.request("web", "beta", options)
        assert len(refused.value.reasons) == 2
        assert "has room for 1 MiB, and the safe copy may need 512 MiB" in refused.value.reasons[0]
        assert "host beta: /srv/shared is another folder there" in refused.value.reasons[1]
        steps = [order.step for order in f.hosts["alpha"].probes]
        assert steps == [ProbeStep.LEAVE, ProbeStep.REMOVE]


def test_a_mark_tells_a_shared_folder_from_another_of_the_same_name(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()

    def ask(folder: Path, step: ProbeStep) -> FolderFacts:
        return probe(FolderProbe(path=str(folder), mark="0123456789abcdef", step=step))

    left = ask(mine, ProbeStep.LEAVE)
    assert left.obstacle == ""
    assert left.available_bytes > 0
    assert ask(mine, ProbeStep.FIND).obstacle == ""
    assert "not storage that both share" in ask(other, ProbeStep.FIND).obstacle
    assert "there is no folder" in ask(tmp_path / "none", ProbeStep.FIND).obstacle
    assert ask(mine, ProbeStep.REMOVE).obstacle == ""
    assert list(mine.iterdir()) == []
    assert "cannot be used" in ask(tmp_path / "none", ProbeStep.LEAVE).obstacle
