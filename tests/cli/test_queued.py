"""What a person sees of a migration that waits for an earlier one of the VM."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.api.daemons import Daemons, two_daemons
from tests.cli.command import Done, finish, start, transhume

from transhume.model.migration import Migration, Outcome, Phase, Progress
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import Ownership, VmState

OWED_PAGES = 12_345
LIMIT_S = 30.0


async def paging(d: Daemons) -> Migration:
    """A migration whose VM runs at beta and lacks pages."""
    await d.running_vm("web")
    asked = await transhume(d.alpha_config.state_dir, "migrate", "web", "--detach", "--json")
    migration = Migration.model_validate(asked.json["migration"])
    async with asyncio.timeout(LIMIT_S):
        while migration.id not in d.alpha.begun:
            await asyncio.sleep(0.01)
    await commit(d, migration)
    progress = Progress(
        migration=migration.id,
        vm="web",
        phase=Phase.PAGING,
        elapsed_s=1.0,
        remaining_bytes=OWED_PAGES * 4096,
    )
    update = MigrationUpdate(migration=migration.id, host="alpha", phase=Phase.PAGING, progress=progress)
    await d.controller.report(update)
    return migration


async def commit(d: Daemons, migration: Migration) -> None:
    reply = await d.controller.swap_ownership(
        "web",
        Ownership(owner=migration.source, epoch=migration.epoch),
        Ownership(owner=migration.destination, epoch=migration.epoch + 1),
    )
    assert reply.won
    here, there = (d.alpha, d.beta) if migration.source == "alpha" else (d.beta, d.alpha)
    here.states["web"], there.states["web"] = VmState.STOPPED, VmState.RUNNING
    there.specs["web"] = here.specs["web"]


async def complete(d: Daemons, migration: Migration) -> None:
    await d.controller.report(
        MigrationUpdate(
            migration=migration.id, host=migration.source, phase=Phase.DONE, outcome=Outcome.COMPLETED
        )
    )


async def queue(alpha: Path) -> tuple[str, Done]:
    """Ask for a second move; the id of what is queued, and what was said."""
    done = await transhume(alpha, "migrate", "web", "--to", "alpha", "--detach")
    assert done.code == 0, done
    return done.out.split()[1], done


async def test_it_is_said_what_a_queued_migration_waits_for() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        earlier = await paging(d)
        refused = await transhume(alpha, "migrate", "web", "--to", "beta")
        assert refused.code == 2
        assert "VM web runs on beta already" in refused.err
        queued, done = await queue(alpha)
        assert done.out == (
            f"migration {queued} is queued behind {earlier.id}, which still owes {OWED_PAGES:,} pages\n"
        )
        listed = await transhume(alpha, "migrations")
        assert listed.out.splitlines()[2].split()[:6] == [
            queued,
            "web",
            "beta",
            "alpha",
            "transhume",
            "queued",
        ]
        assert f"{earlier.id} then {queued}" in (await transhume(alpha, "vm", "list")).out
        shown = await transhume(alpha, "migration", queued)
        assert shown.out.splitlines()[0] == (
            f"queued behind {earlier.id}: VM web from beta to alpha (migration {queued})"
        )
        second = await transhume(alpha, "migrate", "web", "--to", "alpha")
        assert second.code == 2
        assert queued in second.err


async def test_cancel_by_the_vms_name_says_which_one_it_was() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        earlier = await paging(d)
        queued, _ = await queue(alpha)
        done = await transhume(d.beta_config.state_dir, "cancel", "web")
        assert (done.code, done.out) == (
            0,
            f"cancelled {queued}, which was queued behind {earlier.id}; {earlier.id} goes on, "
            "and the VM runs at: source host beta\n",
        )
        again, _ = await queue(alpha)
        told = await transhume(alpha, "cancel", again, "--json")
        assert told.json == {
            "accepted": True,
            "runs_at": "source host beta",
            "migration": again,
            "behind": earlier.id,
        }


async def test_a_queued_migration_is_followed_to_its_end() -> None:
    async with two_daemons() as d:
        earlier = await paging(d)
        process = await start(d.alpha_config.state_dir, "migrate", "web", "--to", "alpha", "--json")
        assert process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            note = json.loads(await process.stdout.readline())
            waiting = json.loads(await process.stdout.readline())
        assert note["type"] == "note"
        assert note["text"].endswith(f"is queued behind {earlier.id}, which still owes {OWED_PAGES:,} pages")
        assert waiting["progress"]["phase"] == "queued"
        await complete(d, earlier)
        async with asyncio.timeout(LIMIT_S):
            while not d.beta.begun:
                await asyncio.sleep(0.01)
        [order] = d.beta.begun.values()
        assert order.migration.id == waiting["progress"]["migration"]
        await commit(d, order.migration)
        await complete(d, order.migration)
        done = await finish(process)
        assert done.code == 0, done
        report = done.json_lines[-1]
        assert report["type"] == "report"
        assert report["migration"]["runs_at"] == "destination host alpha"
