"""Following a drain to its end: the whole and each VM on lines of their own, Ctrl-C as a wish to cancel."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Protocol

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from transhume.api.client import FarmClient
from transhume.cli.follow import LOST_LIMIT_S, RETRY_S, interrupts
from transhume.cli.pool_tables import drain_lines, drain_report, headline, step_in_words
from transhume.cli.session import EXIT_UNKNOWN, plain, say_json
from transhume.cli.tables import show
from transhume.farm.drain_record import Drain, DrainState
from transhume.model.errors import HostLost, TranshumeError

_EXIT_CODES = {DrainState.DONE: 0, DrainState.INCOMPLETE: 3, DrainState.CANCELLED: 4}


class DrainView(Protocol):
    """How a drain is shown."""

    def update(self, drain: Drain) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...

    def report(self, drain: Drain) -> None: ...


class JsonView:
    """A line of JSON for each news, the last with the whole record."""

    def __init__(self) -> None:
        self._last: Drain | None = None

    def update(self, drain: Drain) -> None:
        if drain != self._last:
            self._last = drain
            say_json({"type": "progress", "drain": plain(drain)})

    def note(self, text: str) -> None:
        say_json({"type": "note", "text": text})

    def close(self) -> None:
        sys.stdout.flush()

    def report(self, drain: Drain) -> None:
        say_json({"type": "report", "drain": plain(drain)})


class PlainView:
    """A line for whatever becomes of a VM, for a log."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def update(self, drain: Drain) -> None:
        for step in drain.steps:
            words = f"{step.state.value} {step.destination}"
            if self._told.get(step.vm) != words:
                self._told[step.vm] = words
                typer.echo(step_in_words(step))

    def note(self, text: str) -> None:
        typer.echo(text)

    def close(self) -> None:
        sys.stdout.flush()

    def report(self, drain: Drain) -> None:
        typer.echo(headline(drain))


class LiveView:
    """Lines that are rewritten, then the report in their place."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._live.start()

    def update(self, drain: Drain) -> None:
        self._live.update(Text("\n".join(drain_lines(drain, self._console.width - 1))), refresh=True)

    def note(self, text: str) -> None:
        self._console.print(text)

    def close(self) -> None:
        self._live.stop()

    def report(self, drain: Drain) -> None:
        show(drain_report(drain))


def view_for(as_json: bool) -> DrainView:
    if as_json:
        return JsonView()
    return LiveView() if sys.stdout.isatty() else PlainView()


async def follow_drain(client: FarmClient, drain: Drain, view: DrainView) -> int:
    """Show a drain until it is over. Returns the exit code that tells what came of it.

    The first Ctrl-C cancels it, the second leaves it alone. Raises `HostLost` when the controller stays away;
    the drain goes on when it is back.
    """
    try:
        async with interrupts() as interrupted:
            last = await _to_the_end(client, drain, view, interrupted)
    finally:
        view.close()
    view.report(last)
    return _EXIT_CODES.get(last.state, EXIT_UNKNOWN)


async def _to_the_end(
    client: FarmClient, drain: Drain, view: DrainView, interrupted: asyncio.Queue[None]
) -> Drain:
    cancelled, lost_since_s = False, None
    while True:
        try:
            drain = await client.pool.drain(drain.host)
            lost_since_s = None
            view.update(drain)
        except HostLost as error:
            now_s = time.monotonic()
            if lost_since_s is None:
                lost_since_s = now_s
                view.note(f"{error.message}; asking again")
            if now_s - lost_since_s > LOST_LIMIT_S:
                raise HostLost(
                    f"{error.message}; the drain goes on when the controller is back, and "
                    f"`transhume drain {drain.host} follow` tells of it"
                ) from error
        if drain.state.over:
            return drain
        try:
            await asyncio.wait_for(interrupted.get(), RETRY_S)
        except TimeoutError:
            continue
        if cancelled:
            view.note(f"left alone: `transhume drain {drain.host} show` tells what becomes of it")
            return drain
        cancelled = True
        view.note(await _cancel(client, drain.host))


async def _cancel(client: FarmClient, host: str) -> str:
    try:
        await client.pool.cancel_drain(host)
    except TranshumeError as error:
        return f"the cancel did not come through: {error.message}"
    return (
        "cancelling: what has moved stays, what is under way is left to end; Ctrl-C again to leave it alone"
    )
