"""Following a migration to its true end: progress on one line, Ctrl-C as a wish to cancel."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from transhume.api.client import FarmClient
from transhume.cli.migration_tables import migration_report, queued_in_words
from transhume.cli.progress_line import progress_line
from transhume.cli.session import plain, say_json
from transhume.cli.tables import show
from transhume.model.errors import HostLost, TranshumeError
from transhume.model.migration import Migration, Outcome, Phase, Progress

LOST_LIMIT_S = 60.0
"""How long a lost controller is asked again. A migration goes on without it."""

RETRY_S = 0.5
PLAIN_LINE_INTERVAL_S = 2.0

_EXIT_CODES = {Outcome.COMPLETED: 0, Outcome.FAILED: 3, Outcome.CANCELLED: 4, Outcome.RUNNING: 5}


class View(Protocol):
    """How a migration is shown."""

    def update(self, record: Migration) -> None: ...

    def note(self, text: str) -> None:
        """Something a person should know, outside the progress."""
        ...

    def close(self) -> None: ...

    def report(self, record: Migration) -> None: ...


class JsonView:
    """A line of JSON for each news, the last with the whole record."""

    def __init__(self) -> None:
        self._last: Progress | None = None

    def update(self, record: Migration) -> None:
        shown = record.progress or Progress(
            migration=record.id, vm=record.vm, phase=record.phase, elapsed_s=0.0
        )
        shown = shown.model_copy(update={"phase": record.phase})
        if shown != self._last:
            self._last = shown
            say_json({"type": "progress", "progress": plain(shown)})

    def note(self, text: str) -> None:
        say_json({"type": "note", "text": text})

    def close(self) -> None:
        sys.stdout.flush()

    def report(self, record: Migration) -> None:
        say_json({"type": "report", "migration": plain(record)})


class PlainView:
    """Whole lines at a modest rate, for a log."""

    def __init__(self) -> None:
        self._shown_at_s = 0.0
        self._phase = ""

    def update(self, record: Migration) -> None:
        now_s = time.monotonic()
        if record.phase.value == self._phase and now_s - self._shown_at_s < PLAIN_LINE_INTERVAL_S:
            return
        self._phase, self._shown_at_s = record.phase.value, now_s
        typer.echo(progress_line(record, 400))

    def note(self, text: str) -> None:
        typer.echo(text)

    def close(self) -> None:
        sys.stdout.flush()

    def report(self, record: Migration) -> None:
        show(migration_report(record))


class LiveView:
    """One line that is rewritten, then the report in its place."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._live.start()

    def update(self, record: Migration) -> None:
        line = Text(progress_line(record, self._console.width - 1), no_wrap=True, overflow="ellipsis")
        self._live.update(line, refresh=True)

    def note(self, text: str) -> None:
        self._console.print(text)

    def close(self) -> None:
        self._live.stop()

    def report(self, record: Migration) -> None:
        show(migration_report(record))


def view_for(as_json: bool) -> View:
    if as_json:
        return JsonView()
    return LiveView() if sys.stdout.isatty() else PlainView()


async def follow(client: FarmClient, migration: Migration, view: View) -> int:
    """Show a migration until it has ended, with what it waits for if it is queued. Returns the exit code that
    tells its outcome.

    Raises `HostLost` when the controller stays away; the migration goes on without it.
    """
    try:
        if migration.phase is Phase.QUEUED:
            view.note(await what_it_waits_for(client, migration))
        async with interrupts() as interrupted:
            last = await _to_the_end(client, migration, view, interrupted)
    finally:
        view.close()
    view.report(last)
    if last.outcome is Outcome.COMPLETED and last.error:
        # It has moved, and then something went wrong at the destination: where it runs is in the report.
        return _EXIT_CODES[Outcome.RUNNING]
    return _EXIT_CODES[last.outcome]


async def what_it_waits_for(client: FarmClient, migration: Migration) -> str:
    """A sentence about a queued migration; what the earlier one still owes is left out if nobody tells."""
    try:
        earlier = await client.migration(migration.behind)
    except TranshumeError:
        return queued_in_words(migration, None)
    return queued_in_words(migration, earlier)


async def _to_the_end(
    client: FarmClient, migration: Migration, view: View, interrupted: asyncio.Queue[None]
) -> Migration:
    """The record as it ended, or as it was when the person pressed Ctrl-C a second time."""
    state = _Following(migration)
    following = asyncio.create_task(_follow(client, view, state), name="follow")
    cancelled = False
    try:
        while not following.done():
            interrupt = asyncio.create_task(interrupted.get())
            await asyncio.wait({following, interrupt}, return_when=asyncio.FIRST_COMPLETED)
            pressed = interrupt.done()
            interrupt.cancel()
            if not pressed:
                continue
            if cancelled:
                view.note(f"left alone: `transhume migration {migration.id}` tells what becomes of it")
                return state.record
            cancelled = True
            view.note(await _cancel(client, migration))
        return await following
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


class _Following:
    """Where a follower is."""

    def __init__(self, record: Migration) -> None:
        self.record = record
        self.seen_id = 0


async def _follow(client: FarmClient, view: View, state: _Following) -> Migration:
    lost_since_s: float | None = None
    while True:
        try:
            async for event in client.follow(state.record.id, state.seen_id):
                lost_since_s = None
                state.seen_id, state.record = event.id, _forwards(state.record, event.migration)
                view.update(state.record)
                if state.record.outcome is not Outcome.RUNNING:
                    return state.record
        except HostLost as error:
            now_s = time.monotonic()
            if lost_since_s is None:
                lost_since_s = now_s
                view.note(f"{error.message}; the migration goes on, asking again")
            if now_s - lost_since_s > LOST_LIMIT_S:
                raise HostLost(
                    f"{error.message}; the outcome of migration {state.record.id} is unknown: it goes on by "
                    f"itself, and `transhume migration {state.record.id}` tells when the controller is back"
                ) from error
            await asyncio.sleep(RETRY_S)


def _forwards(shown: Migration, news: Migration) -> Migration:
    """The news, with a bar that does not run backwards when a restarted controller knows less."""
    if shown.progress is None:
        return news
    if news.progress is None:
        return news.model_copy(update={"progress": shown.progress})
    fraction = max(shown.progress.fraction, news.progress.fraction)
    return news.model_copy(update={"progress": news.progress.model_copy(update={"fraction": fraction})})


async def _cancel(client: FarmClient, migration: Migration) -> str:
    try:
        reply = await client.cancel(migration.id)
    except TranshumeError as error:
        return f"the cancel did not come through: {error.message}"
    if reply.accepted:
        return f"cancelling; VM {migration.vm} runs at: {reply.runs_at}"
    return f"too late to cancel; VM {migration.vm} runs at: {reply.runs_at}"


@asynccontextmanager
async def interrupts() -> AsyncIterator[asyncio.Queue[None]]:
    """Each Ctrl-C as an item of a queue, and not as an exception in the middle of something."""
    pressed: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, pressed.put_nowait, None)
    try:
        yield pressed
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
