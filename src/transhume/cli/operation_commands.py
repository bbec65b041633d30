"""What happens in the farm and its long actions: `events`, `operations`, `operation`."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import aclosing
from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from transhume.api.client import FarmClient
from transhume.cli.completion import OperationArgument
from transhume.cli.follow import LOST_LIMIT_S, RETRY_S
from transhume.cli.output import Output, OutputOption
from transhume.cli.quantities import parse_time_s
from transhume.cli.session import JsonFlag, Session, plain, say, say_json, session
from transhume.cli.tables import clock, plain_table, show
from transhume.farm.feed import EventPage, FarmEvent
from transhume.farm.operations import Operation, OperationState
from transhume.model.errors import HostLost

_EXIT_CODES = {OperationState.FAILED: 3, OperationState.CANCELLED: 4}


class Action(StrEnum):
    """What `transhume operation` does with an operation."""

    SHOW = "show"
    WAIT = "wait"
    CANCEL = "cancel"


def events(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    after: Annotated[
        int | None, typer.Option("--after", metavar="ID", min=0, help="Only what came after this event.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=1000, help="Without --follow: the latest so many.")
    ] = 100,
    as_json: JsonFlag = False,
) -> None:
    """Show what happened in the farm lately; with --follow what happens now."""
    current = session(context, as_json)
    if follow:
        current.call(lambda client: _follow(client, current, after))
        return
    page: EventPage = current.call(lambda client: client.feed.history(after or 0, limit))
    if current.as_json:
        say_json(page)
        return
    if page.gap:
        say("earlier events are not shown, or not held any more")
    for event in page.events:
        _tell(current, event)


async def _follow(client: FarmClient, current: Session, after: int | None) -> None:
    lost_since_s: float | None = None
    while True:
        try:
            async with aclosing(client.feed.follow(after)) as stream:
                async for event in stream:
                    lost_since_s = None
                    after = event.id
                    _tell(current, event)
        except HostLost as error:
            now_s = time.monotonic()
            if lost_since_s is None:
                lost_since_s = now_s
                typer.echo(f"transhume: {error.message}; asking again", err=True)
            if now_s - lost_since_s > LOST_LIMIT_S:
                raise
            await asyncio.sleep(RETRY_S)


def _tell(current: Session, event: FarmEvent) -> None:
    if current.as_json:
        say_json({"type": "event", "event": plain(event)})
    else:
        say(f"{event.id}  {clock(event.at_s)}  {event.kind.value:<15}  {event.text}")
    sys.stdout.flush()


def operations(
    context: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=500, help="Only the latest so many.")
    ] = 100,
    output: OutputOption = Output.TABLE,
    as_json: JsonFlag = False,
) -> None:
    """List long actions, past and under way: migrations and drains."""
    current = session(context, as_json or output is Output.JSON)
    found: list[Operation] = current.call(lambda client: client.operations.list(limit))
    if current.as_json:
        say_json(list(found))
    else:
        show(_table(found, output is Output.WIDE))


def operation(
    context: typer.Context,
    identity: OperationArgument,
    action: Annotated[Action, typer.Argument(metavar="[ACTION]", help="show, wait or cancel.")] = Action.SHOW,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="S", help="With wait: at most so long, such as 10m.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one operation, wait for its end, or give it up.

    Exit code of wait: 0 done, 3 failed or not all of it done, 4 cancelled.
    """
    current = session(context, as_json)
    limit_s = None if timeout is None else parse_time_s(timeout)

    async def work(client: FarmClient) -> Operation:
        if action is Action.WAIT:
            return await client.operations.wait(identity, limit_s)
        if action is Action.CANCEL:
            return await client.operations.cancel(identity)
        return await client.operations.show(identity)

    found = current.call(work)
    if current.as_json:
        say_json(found)
    else:
        show(_table([found]))
        if found.error:
            say(found.error)
    if action is Action.WAIT:
        raise typer.Exit(_EXIT_CODES.get(found.state, 0))


def _table(found: list[Operation], wide: bool = False) -> Table:
    table = plain_table(
        "OPERATION", "STATE", "DONE", "BEGUN", "WHAT", *(("KIND", "VM", "HOST", "ERROR") if wide else ())
    )
    for each in found:
        table.add_row(
            each.id,
            each.state.value,
            f"{each.progress:.0%}",
            clock(each.created_at_s),
            each.text,
            *((each.kind.value, each.vm or "-", each.host, each.error or "-") if wide else ()),
        )
    return table
