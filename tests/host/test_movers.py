"""A host's movers: started, heard, replaced when they die, and forgotten only when their end was heard."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import IO

import pytest
from tests.host.scripted_mover import PREPARED

from transhume.host import movers as movers_module
from transhume.host.movers import Movers
from transhume.migration.driver.job import MoverFolder, MoverJob, Role
from transhume.model.errors import Conflict, HostLost, NotFound, TranshumeError, VmmError
from transhume.model.host import HostInventory
from transhume.model.migration import Migration, Outcome, Phase
from transhume.model.orders import HeartbeatReply, MigrationUpdate, Prepared, Renewed, SwapReply
from transhume.model.vm import Accel, Ownership, VmSpec, VmState

WAITING = Prepared.model_validate(PREPARED)
ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


class Controller:
    """Notes what it is told; raises `trouble` instead as long as there is any."""

    def __init__(self) -> None:
        self.told: list[MigrationUpdate] = []
        self.trouble: TranshumeError | None = None
        self.tries = 0

    async def report(self, update: MigrationUpdate) -> None:
        self.tries += 1
        if self.trouble is not None:
            raise self.trouble
        self.told.append(update)

    async def ownership(self, vm: str) -> Ownership:
        raise NotImplementedError

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        raise NotImplementedError

    async def migration(self, migration: str) -> Migration:
        raise NotImplementedError

    async def renew(self, host: str, request_pem: str) -> Renewed:
        raise NotImplementedError

    async def heartbeat(
        self,
        host: str,
        inventory: HostInventory,
        vm_states: Mapping[str, VmState],
        vm_epochs: Mapping[str, int] | None = None,
    ) -> HeartbeatReply:
        raise NotImplementedError


class Farm:
    """The movers of one host, and as many daemons after one another as a test wants."""

    def __init__(self, folder: Path) -> None:
        self.controller = Controller()
        self.migrations_dir = folder / "migrations"
        self.completed: list[str] = []
        self.started: list[subprocess.Popen[bytes]] = []
        self.movers = self.daemon()

    def daemon(self) -> Movers:
        return Movers(
            self.migrations_dir, self.controller, lambda job, _: self.completed.append(job.migration.vm)
        )

    def job(self, vm: str, role: Role = Role.SOURCE, migration: str = "m1") -> MoverJob:
        return MoverJob(
            role=role,
            migration=Migration(id=migration, vm=vm, source="alpha", destination="beta", epoch=1),
            spec=VmSpec(name=vm, memory_bytes=32 << 20, cpus=1, accel=Accel.TCG),
            ram_blocks=(),
            state_dir=self.migrations_dir.parent,
        )

    def folder(self, role: Role = Role.SOURCE, migration: str = "m1") -> MoverFolder:
        return MoverFolder.of(self.migrations_dir, migration, role)

    def pid(self) -> int:
        try:
            return int(self.folder().pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    @property
    def outcomes(self) -> list[Outcome]:
        return [update.outcome for update in self.controller.told]

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < deadline_s, f"not within {LIMIT_S:g} s: {what}"
            await asyncio.sleep(0.01)

    async def until_forgotten(self) -> None:
        await self.until(lambda: not list(self.migrations_dir.iterdir()), "the mover's folder is gone")

    async def until_heard_of(self) -> None:
        await self.until(lambda: bool(self.controller.told), "the mover is heard of")


@pytest.fixture
async def farm(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Farm]:
    """With movers that follow a script instead of a VM."""
    made = Farm(short_dir)

    def scripted(argument: str, stdin: int, words: IO[bytes] | int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "tests.host.scripted_mover", argument],
            stdin=stdin,
            stdout=words,
            stderr=words,
            cwd=ROOT,
            start_new_session=True,
        )
        made.started.append(process)
        return process

    monkeypatch.setattr(movers_module, "_python_mover", scripted)
    monkeypatch.setattr(movers_module, "RELAY_RETRY_S", 0.01)
    monkeypatch.setattr(movers_module, "SUCCESSOR_PAUSE_S", 0.01)
    yield made
    await made.movers.close()
    for process in made.started:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


async def test_a_destination_says_where_it_waits(farm: Farm) -> None:
    assert await farm.movers.start_destination(farm.job("waits", Role.DESTINATION)) == WAITING
    mover = farm.movers.of_vm("waits")
    assert mover is not None
    assert mover.lives
    reply = await farm.movers.cancel("m1", Role.DESTINATION)
    assert reply.accepted
    await farm.until_forgotten()
    assert farm.movers.of_vm("waits") is None
    assert farm.outcomes[-1] is Outcome.CANCELLED


async def test_a_destination_that_fails_says_why(farm: Farm) -> None:
    with pytest.raises(VmmError, match="the link was lost"):
        await farm.movers.start_destination(farm.job("fails", Role.DESTINATION))
    await farm.until_forgotten()


async def test_a_mover_that_dies_without_a_word_is_reported_with_what_it_printed(farm: Farm) -> None:
    with pytest.raises(VmmError, match="the destination's mover could not start: it has nothing to say"):
        await farm.movers.start_destination(farm.job("silent", Role.DESTINATION))
    await farm.until_forgotten()
    [update] = farm.controller.told
    assert update.outcome is Outcome.FAILED
    assert update.phase is Phase.ABORTED
    assert update.host == "beta"
    assert update.runs_at == "source host alpha"


async def test_a_real_mover_without_a_configuration_is_reported(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no host.json in the state folder: the product's own mover ends, with a reason."""
    farm = Farm(short_dir)
    farm.movers.start_source(farm.job("web"))
    await farm.until_heard_of()
    await farm.until_forgotten()
    [update] = farm.controller.told
    assert update.outcome is Outcome.FAILED
    assert "the source's mover could not start" in update.error
    assert "host.json" in update.error
    await farm.movers.close()


async def test_a_folder_that_cannot_be_written_is_an_error_in_words(farm: Farm) -> None:
    farm.migrations_dir.write_text("in the way")
    with pytest.raises(VmmError, match=r"the mover's folder .* cannot be written"):
        farm.movers.start_source(farm.job("ends"))
    assert farm.movers.of_vm("ends") is None


async def test_what_a_source_says_reaches_the_controller(farm: Farm) -> None:
    farm.movers.start_source(farm.job("ends"))
    await farm.until_heard_of()
    await farm.until_forgotten()
    assert farm.outcomes[-1] is Outcome.COMPLETED
    assert farm.completed == ["ends"]


async def test_only_what_completed_teaches_the_cost(farm: Farm) -> None:
    farm.movers.start_source(farm.job("fails"))
    await farm.until_heard_of()
    await farm.until_forgotten()
    assert farm.completed == []


async def test_the_last_word_is_said_until_it_was_heard(farm: Farm) -> None:
    farm.controller.trouble = HostLost("the controller does not answer")
    farm.movers.start_source(farm.job("ends"))
    await farm.until(lambda: farm.controller.tries > 3, "it was tried again")
    assert farm.folder().path.exists()
    assert farm.movers.of_vm("ends") is not None
    farm.controller.trouble = None
    await farm.until_forgotten()
    assert farm.outcomes == [Outcome.COMPLETED]


async def test_what_the_controller_refuses_for_good_counts_as_heard(farm: Farm) -> None:
    farm.controller.trouble = NotFound("there is no such migration")
    farm.movers.start_source(farm.job("ends"))
    await farm.until(lambda: farm.controller.tries > 0, "it was tried")
    await farm.until_forgotten()


async def test_a_killed_mover_gets_a_successor_in_its_folder(farm: Farm) -> None:
    farm.movers.start_source(farm.job("stubborn"))
    await farm.until_heard_of()
    first = farm.pid()
    os.kill(first, signal.SIGKILL)
    await farm.until(lambda: farm.outcomes[-1] is Outcome.COMPLETED, "the successor completes it")
    await farm.until_forgotten()
    assert len(farm.started) >= 2


async def test_successors_come_until_one_ends_the_migration(farm: Farm) -> None:
    farm.movers.start_source(farm.job("waits"))
    seen: set[int] = set()
    for _ in range(3):
        await farm.until(lambda: farm.pid() not in {0, *seen}, "another mover is at work")
        pid = farm.pid()
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
    await farm.until(lambda: farm.pid() not in seen, "the last one is at work")
    assert (await farm.movers.cancel("m1", Role.SOURCE)).accepted
    await farm.until_forgotten()


async def test_a_cancel_that_comes_too_late_says_where_the_vm_runs(farm: Farm) -> None:
    farm.movers.start_source(farm.job("late"))
    await farm.until_heard_of()
    reply = await farm.movers.cancel("m1", Role.SOURCE)
    assert not reply.accepted
    assert reply.runs_at == "beta"
    await farm.until_forgotten()


async def test_two_cancels_at_once_get_the_same_answer(farm: Farm) -> None:
    farm.movers.start_source(farm.job("waits"))
    await farm.until_heard_of()
    cancels = (farm.movers.cancel("m1", Role.SOURCE) for _ in range(2))
    first, second = await asyncio.gather(*cancels)
    assert first == second
    assert first.accepted


async def test_there_is_nothing_to_cancel(farm: Farm) -> None:
    with pytest.raises(NotFound, match="m1 is not under way"):
        await farm.movers.cancel("m1", Role.SOURCE)


async def test_one_end_of_a_migration_has_one_mover(farm: Farm) -> None:
    farm.movers.start_source(farm.job("waits"))
    with pytest.raises(Conflict, match="already under way"):
        farm.movers.start_source(farm.job("waits"))


async def test_the_one_that_stands_by_is_taken_and_replaced(farm: Farm) -> None:
    farm.movers.stand_by()
    farm.movers.stand_by()
    assert len(farm.started) == 1, "one is enough"
    farm.movers.start_source(farm.job("ends"))
    await farm.until_heard_of()
    await farm.until_forgotten()
    first, second = farm.started
    assert first.wait() == 0
    assert second.poll() is None, "another one stands by"


async def test_none_is_started_to_stand_by_while_one_is_at_work(farm: Farm) -> None:
    farm.movers.start_source(farm.job("waits"))
    farm.movers.stand_by()
    assert len(farm.started) == 1


async def test_one_that_died_while_it_stood_by_is_not_used(farm: Farm) -> None:
    farm.movers.stand_by()
    [dead] = farm.started
    dead.kill()
    dead.wait()
    farm.movers.start_source(farm.job("ends"))
    await farm.until_heard_of()
    await farm.until_forgotten()
    assert farm.outcomes[-1] is Outcome.COMPLETED


async def test_the_one_that_stands_by_ends_with_the_daemon_and_the_others_go_on(farm: Farm) -> None:
    farm.movers.stand_by()
    standing_by = farm.started[0]
    other = farm.daemon()
    other.start_source(farm.job("waits"))
    await farm.until_heard_of()
    await other.close()
    await farm.movers.close()
    assert standing_by.wait() in (0, -signal.SIGKILL)
    at_work = farm.started[-1]
    assert at_work.poll() is None
    assert farm.folder().mover_lives()


async def test_the_next_daemon_takes_up_a_living_mover(farm: Farm) -> None:
    farm.movers.start_source(farm.job("waits"))
    await farm.until_heard_of()
    await farm.movers.close()
    farm.controller.told.clear()
    farm.movers = farm.daemon()
    farm.movers.recover()
    await farm.until_heard_of()
    assert farm.controller.told[0].phase is Phase.PREPARED
    assert (await farm.movers.cancel("m1", Role.SOURCE)).accepted
    await farm.until_forgotten()


async def test_the_next_daemon_hears_of_what_ended_meanwhile(farm: Farm) -> None:
    farm.controller.trouble = HostLost("the controller does not answer")
    farm.movers.start_source(farm.job("ends"))
    await farm.until(lambda: farm.controller.tries > 0, "it has ended")
    await farm.movers.close()
    farm.controller.trouble = None
    farm.movers = farm.daemon()
    farm.movers.recover()
    await farm.until_forgotten()
    assert farm.outcomes == [Outcome.COMPLETED]
    assert len(farm.started) - 1 <= 1, "nothing was begun again but a mover that stands by"


async def test_the_next_daemon_replaces_a_mover_that_died_meanwhile(farm: Farm) -> None:
    farm.movers.start_source(farm.job("stubborn"))
    await farm.until_heard_of()
    await farm.movers.close()
    os.kill(farm.pid(), signal.SIGKILL)
    farm.started[0].wait()
    farm.movers = farm.daemon()
    farm.movers.recover()
    await farm.until_forgotten()
    assert farm.outcomes[-1] is Outcome.COMPLETED


async def test_a_folder_without_a_job_is_removed(farm: Farm) -> None:
    half = farm.folder(migration="m9").path
    half.mkdir(parents=True)
    (half / "job.draft").write_text("{")
    farm.movers.recover()
    assert not half.exists()
    assert farm.controller.told == []
