"""The frame of both drivers: journal first, then commands; every failure becomes an event."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pytest

from transhume.migration import events as ev
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.job import MoverJob, Role
from transhume.migration.driver.journal import Journal
from transhume.migration.driver.loop import Driver, Handler
from transhume.migration.machine import Command, Event, Machine, Rule
from transhume.model.errors import (
    HostLost,
    StoreError,
    StoreFull,
    StoreUnavailable,
    Unauthorized,
)
from transhume.model.migration import Migration, Outcome, Phase
from transhume.model.orders import MigrationUpdate, SwapReply
from transhume.model.vm import Accel, Ownership, VmSpec

MIGRATION = Migration(id="m1", vm="web", source="alpha", destination="beta", epoch=3)


class Step(StrEnum):
    BEGUN = "begun"
    AT_WORK = "at-work"
    GIVING_UP = "giving-up"
    OVER = "over"


@dataclass(frozen=True)
class Work(Command):
    """Ends when its driver lets it."""


@dataclass(frozen=True)
class Farewell(Command):
    """Survives StopWork."""


@dataclass(frozen=True)
class Said(Event):
    """The farewell is out."""


class SmallMachine(Machine[Step]):
    """Works until it is stopped, says farewell, and is over."""

    table: ClassVar = {
        Step.BEGUN: {
            ev.Started: Rule("_work", (Step.AT_WORK,)),
            ev.CommandFailed: Rule("_stop", (Step.GIVING_UP,)),
            ev.Tick: Rule("", ()),
        },
        Step.AT_WORK: {
            ev.CancelRequested: Rule("_stop", (Step.GIVING_UP,)),
            ev.CommandFailed: Rule("_stop", (Step.GIVING_UP,)),
            ev.Tick: Rule("", ()),
        },
        Step.GIVING_UP: {Said: Rule("_end", (Step.OVER,)), ev.Tick: Rule("", ())},
        Step.OVER: {},
    }
    final: ClassVar = frozenset({Step.OVER})

    def __init__(self) -> None:
        super().__init__(Step.BEGUN)
        self.failure: ev.CommandFailed | None = None

    def _work(self, _: Event, now_s: float) -> Sequence[Command]:
        self.state = Step.AT_WORK
        return (Work(), ev.Publish())

    def _stop(self, event: Event, now_s: float) -> Sequence[Command]:
        self.state = Step.GIVING_UP
        self.failure = event if isinstance(event, ev.CommandFailed) else None
        return (ev.StopWork(), Farewell())

    def _end(self, _: Event, now_s: float) -> Sequence[Command]:
        self.state = Step.OVER
        return (ev.Publish(ended=True),)


class ScriptedRegister:
    """Gives one answer to every swap."""

    def __init__(self) -> None:
        self.answer: SwapReply | Exception = HostLost("nobody there")
        self.asked: list[tuple[Ownership, Ownership]] = []
        self.held = Ownership(owner="alpha", epoch=3)
        self.record = MIGRATION

    async def ownership(self, vm: str) -> Ownership:
        return self.held

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        self.asked.append((expected, wanted))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def migration(self, migration: str) -> Migration:
        return self.record


class SmallDriver(Driver[Step]):
    """Carries out the small machine's commands; notes what was journalled when each began."""

    lasting = frozenset({Farewell})

    def __init__(self, folder: Path, register: ScriptedRegister) -> None:
        job = MoverJob(
            role=Role.SOURCE,
            migration=MIGRATION,
            spec=VmSpec(name="web", memory_bytes=32 << 20, cpus=1, accel=Accel.TCG),
            ram_blocks=(),
            state_dir=folder,
        )
        journal = Journal(folder / "journal.jsonl")
        self.machine = SmallMachine()
        self.begins = asyncio.Event()
        self.begins.set()
        self.trouble: Exception | None = None
        self.tick_trouble: Exception | None = None
        self.ticks = 0
        self.at_work = asyncio.Event()
        self.journalled: list[tuple[str, str | None]] = []
        self.work_was_stopped = False
        self.stops = 0
        self.closed = False
        super().__init__(job, self.machine, journal, register, ControlServer(folder / "mover.sock"))

    def handlers(self) -> Mapping[type[Command], Handler]:
        return {Work: self._do_work, Farewell: self._say_farewell}

    @property
    def past_point_of_no_return(self) -> bool:
        return False

    async def begin(self) -> Event | None:
        await self.begins.wait()
        return ev.Started()

    def stop_work(self) -> None:
        self.stops += 1

    def update(self) -> MigrationUpdate:
        ended = self.machine.finished
        return MigrationUpdate(
            migration="m1",
            host="alpha",
            phase=Phase.ABORTED if ended else Phase.PRECOPY,
            outcome=Outcome.CANCELLED if ended else Outcome.RUNNING,
            runs_at="source host alpha",
        )

    async def tick(self, now_s: float) -> None:
        self.ticks += 1
        if self.tick_trouble is not None:
            raise self.tick_trouble

    async def close(self) -> None:
        self.closed = True

    async def _do_work(self, _: Work) -> None:
        self.journalled.append(("work", self.journal.last_state()))
        self.at_work.set()
        if self.trouble is not None:
            raise self.trouble
        try:
            await asyncio.Event().wait()
        finally:
            self.work_was_stopped = True

    async def _say_farewell(self, _: Farewell) -> Event:
        self.journalled.append(("farewell", self.journal.last_state()))
        return Said()


@pytest.fixture
def register() -> ScriptedRegister:
    return ScriptedRegister()


@pytest.fixture
async def driver(tmp_path: Path, register: ScriptedRegister) -> SmallDriver:
    return SmallDriver(tmp_path, register)


@pytest.mark.parametrize(
    ("outcome", "error_code", "epoch", "revoked"),
    [
        (Outcome.RUNNING, "", 4, False),
        (Outcome.RUNNING, "", 5, True),  # taken back, and the record does not say so yet
        (Outcome.FAILED, "revived", 5, True),
        (Outcome.FAILED, "revived", 6, True),  # and moved on since
        (Outcome.COMPLETED, "", 5, False),  # the VM's next move, which may owe pages from here
        (Outcome.FAILED, "memory-differs", 5, False),
    ],
)
async def test_only_a_vm_that_was_taken_back_is_revoked(
    driver: SmallDriver,
    register: ScriptedRegister,
    outcome: Outcome,
    error_code: str,
    epoch: int,
    revoked: bool,
) -> None:
    register.held = Ownership(owner="alpha", epoch=epoch)
    register.record = MIGRATION.model_copy(update={"outcome": outcome, "error_code": error_code})
    known = await driver.ask_controller(ev.AskController())
    assert isinstance(known, ev.MigrationKnown)
    assert known.revoked is revoked


async def test_a_state_is_journalled_before_its_commands_are_carried_out(driver: SmallDriver) -> None:
    running = asyncio.create_task(driver.run())
    await asyncio.wait_for(driver.at_work.wait(), 20)
    driver.post(ev.CancelRequested())
    await asyncio.wait_for(running, 20)
    assert driver.journalled == [("work", "at-work"), ("farewell", "giving-up")]
    assert driver.journal.last_state() == "over"
    assert driver.closed


async def test_the_last_word_is_journalled_and_no_other(driver: SmallDriver) -> None:
    running = asyncio.create_task(driver.run())
    await asyncio.wait_for(driver.at_work.wait(), 20)
    assert driver.journal.last_update() is None
    driver.post(ev.CancelRequested())
    await asyncio.wait_for(running, 20)
    told = driver.journal.last_update()
    assert told is not None
    assert told.outcome is Outcome.CANCELLED
    driver.publish()
    assert driver.journal.last_update() == told, "after the last word nothing more is said"


async def test_stopping_work_ends_the_work_and_leaves_the_farewell(driver: SmallDriver) -> None:
    running = asyncio.create_task(driver.run())
    await asyncio.wait_for(driver.at_work.wait(), 20)
    reply = await asyncio.wait_for(driver.cancel(), 20)
    await asyncio.wait_for(running, 20)
    assert reply.accepted
    assert reply.runs_at == "source host alpha"
    assert driver.work_was_stopped
    assert driver.stops == 1
    assert ("farewell", "giving-up") in driver.journalled


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (Unauthorized("who are you?"), "unauthorized"),
        (OSError(28, "No space left on device"), "system"),
        (AssertionError("that cannot be"), "internal"),
    ],
    ids=["ours", "the kernel's", "a mistake"],
)
async def test_what_a_handler_raises_becomes_an_event(
    driver: SmallDriver, trouble: Exception, code: str
) -> None:
    driver.trouble = trouble
    await asyncio.wait_for(driver.run(), 20)
    assert driver.machine.failure is not None
    assert (driver.machine.failure.command, driver.machine.failure.code) == ("Work", code)


@pytest.mark.parametrize(
    "trouble",
    [HostLost("nobody there"), OSError(9, "Bad file descriptor"), AssertionError("that cannot be")],
    ids=["ours", "the kernel's", "a mistake"],
)
async def test_time_goes_on_for_the_machine_whatever_a_tick_raises(
    driver: SmallDriver, trouble: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.tick_trouble = trouble
    running = asyncio.create_task(driver.run())
    async with asyncio.timeout(20):
        while driver.ticks < 3:
            await asyncio.sleep(0.01)
    driver.post(ev.CancelRequested())
    await asyncio.wait_for(running, 20)
    assert "tick" in capsys.readouterr().err


async def test_an_event_out_of_turn_is_passed_over(driver: SmallDriver) -> None:
    running = asyncio.create_task(driver.run())
    await asyncio.wait_for(driver.at_work.wait(), 20)
    driver.post(ev.Listening())
    driver.post(ev.CancelRequested())
    await asyncio.wait_for(running, 20)
    assert driver.machine.finished


async def test_a_successor_that_dies_at_once_leaves_its_predecessors_state(
    tmp_path: Path, register: ScriptedRegister
) -> None:
    """Or a third mover would take the migration for one that had hardly begun, and ask no register."""
    first = Journal(tmp_path / "journal.jsonl")
    first.state("awaiting-commit")
    first.close()
    second = SmallDriver(tmp_path, register)
    second.begins.clear()
    running = asyncio.create_task(second.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert Journal(tmp_path / "journal.jsonl").last_state() == "awaiting-commit"


async def test_the_first_mover_leaves_a_sign_that_something_was_begun(driver: SmallDriver) -> None:
    driver.begins.clear()
    running = asyncio.create_task(driver.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert driver.journal.last_state() == "begun"


async def test_the_swaps_are_those_of_this_epoch(driver: SmallDriver, register: ScriptedRegister) -> None:
    register.answer = SwapReply(won=True, owner="beta", epoch=4)
    assert await driver.swap_to_destination(ev.SwapToDestination()) == ev.SwapWon()
    register.answer = SwapReply(won=False, owner="beta", epoch=4)
    assert await driver.swap_to_source(ev.SwapToSource()) == ev.SwapLost("beta", 4)
    expected = Ownership(owner="alpha", epoch=3)
    assert register.asked == [
        (expected, Ownership(owner="beta", epoch=4)),
        (expected, Ownership(owner="alpha", epoch=4)),
    ]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (StoreFull("no room"), ev.SwapRefused("no room")),
        (StoreError("what?"), ev.SwapUnknown("what?")),
        (StoreUnavailable("no leader"), ev.SwapUnknown("no leader")),
        (HostLost("nobody there"), ev.SwapUnknown("nobody there")),
        (Unauthorized("not you"), ev.SwapUnknown("not you")),
        (AssertionError("that cannot be"), ev.SwapUnknown("AssertionError('that cannot be')")),
    ],
)
async def test_only_a_full_store_is_a_swap_that_was_certainly_not_made(
    driver: SmallDriver, register: ScriptedRegister, error: Exception, event: Event
) -> None:
    register.answer = error
    assert await driver.swap_to_destination(ev.SwapToDestination()) == event
