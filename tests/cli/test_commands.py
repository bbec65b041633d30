"""Commands against an API on real sockets, with scripted hosts behind it and played movers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.api.daemons import Daemons, two_daemons
from tests.cli.command import finish, start, transhume

from transhume.cli.session import demand_root
from transhume.model.errors import Refused, VmmError
from transhume.model.migration import (
    DowntimeReport,
    Migration,
    MigrationReport,
    Outcome,
    PagingReport,
    Phase,
    Progress,
)
from transhume.model.orders import Adjustment, CancelReply, DestinationFacts, MigrationUpdate
from transhume.model.vm import Ownership


async def test_a_vms_life_in_words_and_in_json() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        made = await transhume(alpha, "vm", "create", "web", "--memory", "256M", "--cpus", "2", "--json")
        assert made.code == 0
        assert made.json["ownership"] == {"owner": "alpha", "epoch": 1}
        assert made.json["spec"]["memory_bytes"] == 256 << 20
        started = await transhume(d.beta_config.state_dir, "vm", "start", "web")
        assert (started.code, started.out) == (0, "VM web runs on alpha\n")
        shown = await transhume(alpha, "--json", "vm", "show", "web")
        assert shown.json["state"] == "running"
        listed = await transhume(alpha, "vm", "list")
        assert listed.out.splitlines()[1].split()[:4] == ["web", "running", "alpha", "256"]
        picture = d.folder / "screen.png"
        assert (await transhume(alpha, "vm", "screendump", "web", str(picture))).code == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        refused = await transhume(alpha, "vm", "delete", "web")
        assert (refused.code, refused.out) == (2, "")
        assert refused.err == "transhume: VM web runs on alpha; stop it first\n"


async def test_what_cannot_be_is_refused_in_one_line() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        for words, told in (
            (("vm", "create", "Web!", "--memory", "256M"), "name:"),
            (("vm", "create", "web", "--memory", "tiny"), "'tiny' is not a size"),
            (("vm", "create", "web", "--memory", "1M"), "memory_bytes:"),
            (("vm", "create", "web", "--memory", "1G", "--disk", "/a,format=vmdk"), "format=vmdk"),
            (("vm", "show", "../../etc"), "'../../etc' is not a name"),
            (("migrate", "web", "--max-downtime", "0"), "max_downtime_ms:"),
            (("migrate", "web", "--mode", "hybrid", "--no-post-copy"), "post-copy is forbidden"),
            (("migration", "m0"), "no migration m0"),
            (("migration", "m0", "set"), "needs --bandwidth, --max-downtime or --deadline"),
            (("migration", "m0", "--deadline", "5m"), "with `transhume migration m0 set`"),
            (("migration", "m0", "set", "--bandwidth", "1K"), "bandwidth_bytes_s"),
            (("migration", "m0", "set", "--max-downtime", "0"), "max_downtime_ms:"),
            (("migration", "m0", "switch-to-post-copy"), "no migration and no VM m0"),
        ):
            done = await transhume(alpha, *words)
            assert done.code == 2, done
            assert done.err.startswith("transhume: ")
            assert told in done.err
            assert len(done.err.splitlines()) == 1
        told_json = await transhume(alpha, "vm", "show", "none", "--json")
        assert told_json.code == 2
        assert told_json.json["type"] == "error"
        assert told_json.json["code"] == "not-found"


async def test_without_a_daemon_there_is_one_clear_line(tmp_path: Path) -> None:
    done = await transhume(tmp_path, "hosts")
    assert done.code == 5
    assert done.err == f"transhume: no daemon answers at {tmp_path}/api.sock; start it with `transhume up`\n"
    (tmp_path / "api.sock").touch()
    assert (await transhume(tmp_path, "hosts")).code == 5


def test_without_root_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(Refused) as caught:
        demand_root()
    assert caught.value.message.startswith("transhume needs root: ")
    assert "\n" not in caught.value.message


Mover = Callable[[Daemons, Migration], Awaitable[None]]


async def play(d: Daemons, mover: Mover) -> None:
    """Wait until a migration has begun, then do what its movers would."""
    async with asyncio.timeout(30):
        while not d.alpha.begun:
            await asyncio.sleep(0.01)
    [order] = d.alpha.begun.values()
    await mover(d, order.migration)


async def tell(
    d: Daemons, migration: Migration, phase: Phase, outcome: Outcome = Outcome.RUNNING, **more: object
) -> None:
    update = MigrationUpdate(migration=migration.id, host="alpha", phase=phase, outcome=outcome)
    await d.controller.report(update.model_copy(update=more))


async def move(d: Daemons, migration: Migration) -> None:
    for fraction in (0.2, 0.6, 0.4):
        progress = Progress(
            migration=migration.id,
            vm="web",
            phase=Phase.PRECOPY,
            elapsed_s=fraction,
            fraction=fraction,
            wire_bytes=int(fraction * 1e8),
            verdict="first pass over the memory",
        )
        await tell(d, migration, Phase.PRECOPY, progress=progress)
    reply = await d.controller.swap_ownership(
        "web", Ownership(owner="alpha", epoch=1), Ownership(owner="beta", epoch=2)
    )
    assert reply.won
    report = MigrationReport(
        downtime=DowntimeReport(stop_ms=3.0, total_ms=31.0),
        wire_bytes=10**8,
        ram_bytes=2 * 10**8,
        total_ms=900.0,
    )
    await tell(d, migration, Phase.DONE, Outcome.COMPLETED, report=report)


async def fail(d: Daemons, migration: Migration) -> None:
    await tell(d, migration, Phase.ABORTED, Outcome.FAILED, error="the link broke", error_code="host-lost")


async def test_migrate_shows_the_way_and_the_report() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        playing = asyncio.create_task(play(d, move))
        done = await transhume(d.beta_config.state_dir, "migrate", "web", "--to", "beta")
        await playing
        assert done.code == 0, done
        assert "moved VM web from alpha to beta" in done.out
        assert "with 31.0 ms of downtime" in done.out
        assert done.out.splitlines()[-1] == "VM web runs at: destination host beta"
        listed = await transhume(d.alpha_config.state_dir, "migrations")
        assert "completed" in listed.out


async def test_migrate_in_json_is_lines_of_progress_and_a_report() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        playing = asyncio.create_task(play(d, move))
        done = await transhume(d.alpha_config.state_dir, "migrate", "web", "--max-downtime", "20", "--json")
        await playing
        assert done.code == 0, done
        *progress, report = done.json_lines
        assert {line["type"] for line in progress} == {"progress"}
        fractions = [line["progress"]["fraction"] for line in progress]
        assert fractions == sorted(fractions)
        assert report["type"] == "report"
        migration = Migration.model_validate(report["migration"])
        assert migration.outcome is Outcome.COMPLETED
        assert migration.options.max_downtime_ms == 20.0


async def test_a_failed_migration_ends_with_3_and_says_where_the_vm_runs() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        playing = asyncio.create_task(play(d, fail))
        done = await transhume(d.alpha_config.state_dir, "migrate", "web")
        await playing
        assert done.code == 3
        assert "the link broke. VM web runs on source host alpha, where it was" in done.out


async def test_a_destination_that_cannot_prepare_ends_with_3() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        d.beta.failures["prepare"] = VmmError("QEMU ended at once")
        done = await transhume(d.alpha_config.state_dir, "migrate", "web", "--to", "beta", "--json")
        assert done.code == 3
        assert done.json_lines[-1]["migration"]["error_code"] == "vmm"


async def test_a_refused_migration_ends_with_2_and_all_reasons() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        d.beta.destination_facts_now = DestinationFacts(memory_available_bytes=1, disk_obstacles=("no disk",))
        done = await transhume(d.alpha_config.state_dir, "migrate", "web", "--to", "beta")
        assert done.code == 2
        assert len(done.err.splitlines()) == 3
        dry = await transhume(d.alpha_config.state_dir, "migrate", "web", "--to", "beta", "--dry-run")
        assert dry.code == 2
        assert "  - no disk" in dry.out
        assert "predicted: " in dry.out


async def interrupted(d: Daemons, accepted: bool, mover: Mover) -> tuple[int, str]:
    """Press Ctrl-C when the migration is under way; the movers act when the cancel has arrived."""
    d.alpha.cancel_reply = CancelReply(accepted=accepted, runs_at="source host alpha" if accepted else "beta")
    process = await start(d.alpha_config.state_dir, "migrate", "web", "--json")
    assert process.stdout is not None
    lines = [await process.stdout.readline()]
    while json.loads(lines[-1])["progress"]["phase"] != "prepared":
        lines.append(await process.stdout.readline())
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        while "cancel" not in d.alpha.calls:
            await asyncio.sleep(0.01)
    await play(d, mover)
    done = await finish(process)
    return done.code, done.out


async def test_ctrl_c_cancels_and_waits_for_the_end() -> None:
    async def cancelled(d: Daemons, migration: Migration) -> None:
        await tell(d, migration, Phase.ABORTED, Outcome.CANCELLED)

    async with two_daemons() as d:
        await d.running_vm("web")
        code, out = await interrupted(d, True, cancelled)
        assert code == 4
        assert "cancelling; VM web runs at: source host alpha" in out
        assert json.loads(out.splitlines()[-1])["migration"]["outcome"] == "cancelled"


async def test_ctrl_c_after_the_commit_is_too_late_and_the_outcome_is_true() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        code, out = await interrupted(d, False, move)
        assert code == 0
        assert "too late to cancel" in out


async def test_detach_and_cancel_by_the_vms_name() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        d.beta.waits["prepare"] = asyncio.Event()
        detached = await transhume(d.alpha_config.state_dir, "migrate", "web", "--detach", "--json")
        assert detached.code == 0
        identity = detached.json["migration"]["id"]
        second = await transhume(d.alpha_config.state_dir, "migrate", "web")
        assert second.code == 2
        assert identity in second.err
        done = await transhume(d.beta_config.state_dir, "cancel", "web")
        assert (done.code, done.out) == (0, "cancelled; the VM runs at: source host alpha\n")
        d.beta.waits["prepare"].set()
        late = await transhume(d.beta_config.state_dir, "cancel", identity)
        assert late.code == 2
        assert "too late" in late.out


async def test_a_migration_under_way_is_given_other_limits() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        alpha = d.alpha_config.state_dir
        identity = (await transhume(alpha, "migrate", "web", "--detach", "--json")).json["migration"]["id"]
        async with asyncio.timeout(30):
            while identity not in d.alpha.begun:
                await asyncio.sleep(0.01)
        words = ("--bandwidth", "0", "--max-downtime", "30", "--deadline", "5m")
        done = await transhume(d.beta_config.state_dir, "migration", identity, "set", *words)
        assert (done.code, done.out) == (0, "done\n"), done.err
        switched = await transhume(alpha, "migration", identity, "switch-to-post-copy", "--json")
        assert switched.json["id"] == identity
        assert d.alpha.adjustments == [
            Adjustment(bandwidth_bytes_s=0, max_downtime_ms=30, deadline_s=300),
            Adjustment(switch_to_post_copy=True),
        ]
        d.alpha.refuses_adjustments = "it is past its pre-copy"
        refused = await transhume(alpha, "migration", identity, "switch-to-post-copy")
        assert refused.code == 2
        assert "it is past its pre-copy" in refused.err


async def test_a_vm_is_revived_when_a_person_says_so() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        alpha = d.alpha_config.state_dir
        refused = await transhume(alpha, "vm", "revive", "web")
        assert (refused.code, "--from-switchover" in refused.err) == (2, True)
        idle = await transhume(alpha, "vm", "revive", "web", "--from-switchover", "--yes")
        assert (idle.code, "is not moving" in idle.err) == (2, True)
        await transhume(alpha, "migrate", "web", "--detach")
        await play(d, lose_its_destination)
        unsure = await transhume(alpha, "vm", "revive", "web", "--from-switchover")
        assert unsure.code == 2
        assert "switch it off first" in unsure.err
        assert "nothing was changed" in unsure.err
        done = await transhume(alpha, "vm", "revive", "web", "--from-switchover", "--yes")
        assert (done.code, done.out) == (0, "VM web runs on alpha again, as it was suspended\n"), done.err


async def lose_its_destination(d: Daemons, migration: Migration) -> None:
    reply = await d.controller.swap_ownership(
        "web", Ownership(owner="alpha", epoch=1), Ownership(owner="beta", epoch=2)
    )
    assert reply.won
    d.later_s = 7200.0
    # The source goes on reporting: a migration that nobody reports on is ended after a while.
    await tell(d, migration, Phase.PAGING, report=MigrationReport(paging=PagingReport(owed_pages=9)))
    await d.controller.heartbeat("alpha", d.alpha.inventory_now, d.alpha.states)


async def test_a_console_of_a_script() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        done = await transhume(d.beta_config.state_dir, "vm", "console", "web")
        assert done.code == 0
        assert done.out in ("", "console of web\r\n")
