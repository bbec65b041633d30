"""The event loop of a mover: hands events to the machine and runs its commands side by side."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from transhume.migration import events as ev
from transhume.migration import wire
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.job import MoverJob
from transhume.migration.driver.journal import Journal
from transhume.migration.machine import Command, Event, Machine, UnexpectedEvent
from transhume.migration.register import Register
from transhume.migration.source import REVIVED
from transhume.migration.transfer.channel import FrameChannel
from transhume.model.errors import HostLost, NotFound, PagesLost, StoreError, StoreFull, TranshumeError
from transhume.model.migration import Outcome
from transhume.model.orders import CancelReply, MigrationUpdate
from transhume.model.vm import Ownership

TICK_S = 0.1
PUBLISH_S = 0.2
CANCEL_POLL_S = 0.01
FAREWELL_LIMIT_S = 3.0
"""How long the last commands (words to the peer) may take after the machine has finished."""

StateT = TypeVar("StateT", bound=StrEnum)
Handler = Callable[[Any], Awaitable[Event | None]]


def clock_of(monotonic_s: float) -> str:
    """The time of day of a moment on the monotonic clock, as people write it."""
    wall_s = time.time() + (monotonic_s - time.monotonic())
    return datetime.fromtimestamp(wall_s).strftime("%H:%M:%S")


async def end(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it has let go of what it holds."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Begin(Command):
    """The driver's own first step, before the machine has commanded anything."""


class Driver(ABC, Generic[StateT]):
    """Runs one machine to its end. Subclasses carry out the commands and describe how far it is.

    A handler returns the event that answers its command (or None); what it raises becomes `CommandFailed`.
    Commands run side by side, started in the machine's order.

    A mistake of this program (any other exception than a `TranshumeError` or an `OSError`) is a failure like
    those, with its traceback in mover.log: a machine that is not answered would wait for ever, with a VM.
    """

    def __init__(
        self,
        job: MoverJob,
        machine: Machine[StateT],
        journal: Journal,
        register: Register,
        control: ControlServer,
    ) -> None:
        self.job = job
        self.migration = job.migration
        self.journal = journal
        self.control = control
        self._machine = machine
        self._register = register
        self._channel: FrameChannel | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._work: set[asyncio.Task[None]] = set()
        self._other: set[asyncio.Task[None]] = set()
        self._published_s = 0.0
        self._ended = False
        self._handlers = self.handlers()

    # --- what subclasses supply ------------------------------------------------------------------

    @abstractmethod
    def handlers(self) -> Mapping[type[Command], Handler]:
        """Who carries out which command."""

    @property
    @abstractmethod
    def lasting(self) -> frozenset[type[Command]]:
        """Commands that StopWork does not stop: swaps, farewells, resuming and freeing."""

    @abstractmethod
    async def begin(self) -> Event | None:
        """Find or make this end's VM; the answer sets the machine in motion."""

    @property
    @abstractmethod
    def past_point_of_no_return(self) -> bool:
        """Whether the VM is known to be the destination's."""

    @abstractmethod
    def stop_work(self) -> None:
        """Make the data path end soon, whatever it is doing."""

    @abstractmethod
    def update(self) -> MigrationUpdate:
        """Where the migration stands, for the controller."""

    @abstractmethod
    async def tick(self, now_s: float) -> None:
        """Called ten times a second, before the machine's Tick: signs of life, progress."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything at the end. Never raises."""

    # --- the loop --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the machine until it has finished and the last commands are carried out."""
        if self.journal.last_state() is None:
            # Not by a successor: were it to die at once, the next one would not know how far the first came.
            self.journal.state(self._machine.state.value)
        beginning = asyncio.create_task(self._carry_out(Begin(), self._begin), name="Begin")
        self._work.add(beginning)
        beginning.add_done_callback(self._work.discard)
        ticker = asyncio.create_task(self._tick_forever(), name="ticker")
        try:
            while not self._machine.finished:
                self._take(await self._events.get())
            if self._other:
                await asyncio.wait(self._other, timeout=FAREWELL_LIMIT_S)
        finally:
            ticker.cancel()
            for task in [*self._work, *self._other]:
                task.cancel()
            await asyncio.gather(ticker, *self._work, *self._other, return_exceptions=True)
            await self.close()

    async def cancel(self) -> CancelReply:
        """Ask the machine to stop; the answer comes when it is known what came of it."""
        self.post(ev.CancelRequested())
        while not self._machine.finished and not self.past_point_of_no_return:
            await asyncio.sleep(CANCEL_POLL_S)
        return CancelReply(accepted=not self.past_point_of_no_return, runs_at=self.update().runs_at)

    def post(self, event: Event) -> None:
        """Queue an event. Only from the loop's own thread."""
        self._events.put_nowait(event)

    def post_from_thread(self, event: Event) -> None:
        """Queue an event from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def publish(self, ended: bool = False) -> None:
        """Tell the daemon where we stand; after the last word nothing more is said."""
        if self._ended:
            return
        self._ended = ended
        self._published_s = time.monotonic()
        update = self.update()
        if ended:
            try:
                self.journal.update(update)
            except OSError as error:
                self._log(f"the last word could not be noted: {error}")
        self.control.publish(update)

    async def _begin(self, _: Command) -> Event | None:
        return await self.begin()

    def _take(self, event: Event) -> None:
        before = self._machine.state
        try:
            commands = self._machine.handle(event, time.monotonic())
        except UnexpectedEvent as unexpected:
            self._log(f"ignored: {unexpected}")
            return
        changed = self._machine.state != before
        if changed and not self._machine.finished:
            # Before the commands: a successor must never take less for done than was done.
            self.journal.state(self._machine.state.value)
        self.taken(event)
        for command in commands:
            self._start(command)
        if changed and self._machine.finished:
            # After the last word: without that word the daemon would never hear how it ended.
            self.journal.state(self._machine.state.value)

    def taken(self, event: Event) -> None:
        """Called after the machine has taken an event, before its commands are carried out."""

    def _start(self, command: Command) -> None:
        if isinstance(command, ev.StopWork):
            self.stop_work()
            for task in self._work:
                task.cancel()
            return
        if isinstance(command, ev.Publish):
            self.publish(command.ended)
            return
        handler = self._handlers[type(command)]
        group = self._other if type(command) in self.lasting else self._work
        task = asyncio.create_task(self._carry_out(command, handler), name=type(command).__name__)
        group.add(task)
        task.add_done_callback(group.discard)

    async def _carry_out(self, command: Command, handler: Handler) -> None:
        name = type(command).__name__
        try:
            event = await handler(command)
        except TranshumeError as error:
            self._log(f"{name} failed: {error.message}")
            event = ev.CommandFailed(name, error.code, error.message)
        except OSError as error:
            self._log(f"{name} failed: {error}")
            event = ev.CommandFailed(name, "system", f"{name}: {error}")
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not leave the machine waiting
            self._log_mistake(name)
            event = ev.CommandFailed(name, TranshumeError.code, f"{name}: {error!r}")
        if event is not None:
            self.post(event)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            try:
                await self.tick(now_s)
            except (TranshumeError, OSError) as error:
                self._log(f"tick: {error}")
            except Exception:  # noqa: BLE001 - without ticks no limit of time would end anything
                self._log_mistake("tick")
            self.post(ev.Tick())
            if now_s - self._published_s >= PUBLISH_S and not self._machine.finished:
                self.publish()

    def _send_if_open(self, message: wire.Message) -> None:
        """For words whose loss changes nothing: the register tells the rest. In a worker's thread: the
        connection may go meanwhile.
        """
        channel = self._channel
        if channel is None:
            return
        with suppress(HostLost):
            channel.send(message)

    def _log_mistake(self, where: str) -> None:
        """In an exception's handler: leave what is needed to mend this program."""
        self._log(f"{where} came to grief:\n{traceback.format_exc()}")

    def _log(self, text: str) -> None:
        """A line for the person who reads mover.log. A disk without room for it stops nothing."""
        moment = datetime.now().isoformat(timespec="milliseconds")
        with suppress(OSError):
            print(f"{moment} {text}", file=sys.stderr, flush=True)  # noqa: T201

    async def ask_controller(self, _: ev.AskController) -> Event | None:
        """Whether the migration still goes on. No answer is no answer: whoever asks has a limit of its
        own.
        """
        try:
            record = await self._register.migration(self.migration.id)
            held = await self._register.ownership(self.migration.vm)
        except NotFound:
            return ev.MigrationKnown(going_on=False)
        except TranshumeError:
            return None
        paging = record.report.paging
        return ev.MigrationKnown(
            going_on=record.outcome is Outcome.RUNNING,
            paged=paging is not None and paging.complete and not paging.to_compare,
            lacks_nothing=paging is not None and paging.complete,
            pages_lost=record.error_code == PagesLost.code,
            failed=record.outcome is Outcome.FAILED,
            # A migration that is known to be complete cannot be taken back: a later epoch is then that of the
            # VM's next move, and what is left here is that one's to end.
            revoked=(
                held.epoch > self.migration.epoch + 1
                and record.outcome is not Outcome.COMPLETED
                and record.error_code in ("", REVIVED)
            ),
        )

    # --- the register ----------------------------------------------------------------------------

    async def swap_to_source(self, _: ev.SwapToSource) -> Event:
        """The abort's swap: the register moves on, so no commit of this epoch can follow."""
        return await self._swap(self.migration.source)

    async def swap_to_destination(self, _: ev.SwapToDestination) -> Event:
        """The commit's swap: the one point of no return."""
        return await self._swap(self.migration.destination)

    async def swap_back(self, _: ev.SwapBack) -> Event:
        """Take the VM back after its commit: whoever runs it there has lost the right to."""
        migration = self.migration
        return await self._try_swap(
            Ownership(owner=migration.destination, epoch=migration.epoch + 1),
            Ownership(owner=migration.source, epoch=migration.epoch + 2),
        )

    def warm_up_register(self) -> None:
        """Open the connection to the register in the background, so that the switchover need not.

        That nobody answers now is no failure: only the answer to a swap counts.
        """
        task = asyncio.create_task(self._read_register(), name="warm up")
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _read_register(self) -> None:
        try:
            await self._register.ownership(self.migration.vm)
        except TranshumeError as error:
            self._log(f"the register does not answer now: {error.message}")

    async def _swap(self, owner: str) -> Event:
        migration = self.migration
        return await self._try_swap(
            Ownership(owner=migration.source, epoch=migration.epoch),
            Ownership(owner=owner, epoch=migration.epoch + 1),
        )

    async def _try_swap(self, expected: Ownership, wanted: Ownership) -> Event:
        owner = wanted.owner
        try:
            reply = await self._register.swap_ownership(self.migration.vm, expected, wanted)
        except StoreFull as error:
            self._log(f"the register refused the swap: {error.message}")
            return ev.SwapRefused(error.message)
        except (HostLost, StoreError) as error:
            # `StoreUnavailable` too: a farm that has no leader for a moment ends no migration.
            self._log(f"the register did not answer: {error.message}")
            return ev.SwapUnknown(error.message)
        except TranshumeError as error:
            self._log(f"the register's answer was no answer: {error.message}")
            return ev.SwapUnknown(error.message)
        except Exception as error:  # noqa: BLE001 - it may have been made: only the register can tell
            self._log_mistake("the swap")
            return ev.SwapUnknown(repr(error))
        self._log(f"swap to {owner}: {'won' if reply.won else f'lost to {reply.owner}, {reply.epoch}'}")
        return ev.SwapWon() if reply.won else ev.SwapLost(reply.owner, reply.epoch)
