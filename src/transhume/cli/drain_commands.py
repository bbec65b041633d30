"""Drains: `drain`, `undrain`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import ValidationError

from transhume.api.client import FarmClient
from transhume.cli.completion import host_names
from transhume.cli.drain_follow import follow_drain, view_for
from transhume.cli.pool_tables import drain_report, plan_report
from transhume.cli.quantities import parse_rate_bytes_s, parse_time_s
from transhume.cli.session import JsonFlag, Session, plain, say, say_json, session, words_of
from transhume.cli.tables import show
from transhume.farm.drain_record import DEFAULT_PARALLEL, Drain, DrainOptions, StepState
from transhume.model.errors import Refused
from transhume.model.migration import MigrationOptions

HostArgument = Annotated[
    str, typer.Argument(metavar="HOST", help="A member of the farm.", autocompletion=host_names)
]
ParallelOption = Annotated[int, typer.Option("--parallel", metavar="N", help="At most so many VMs at once.")]
PerHostOption = Annotated[
    int | None, typer.Option("--per-host", metavar="N", help="At most so many to one host at once.")
]
PerLinkOption = Annotated[
    int | None, typer.Option("--per-link", metavar="N", help="At most so many between two hosts at once.")
]
DeadlineOption = Annotated[
    str | None,
    typer.Option(
        "--deadline", metavar="S", help="Begin no VM later, such as 600 or 30m, and end those by then."
    ),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option("--bandwidth", metavar="RATE", help="For each VM at most this rate, such as 500M."),
]
NoPostCopyFlag = Annotated[
    bool, typer.Option("--no-post-copy", help="Never leave pages for after the resume.")
]
IgnoreRulesFlag = Annotated[bool, typer.Option("--ignore-rules", help="Also where a rule would not have it.")]
DetachFlag = Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")]


class Action(StrEnum):
    """What `transhume drain` does with a drain."""

    BEGIN = "begin"
    PLAN = "plan"
    SHOW = "show"
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    FOLLOW = "follow"


def drain(
    context: typer.Context,
    host: HostArgument,
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="plan, show, follow, pause, resume or cancel.")
    ] = Action.BEGIN,
    parallel: ParallelOption = DEFAULT_PARALLEL,
    per_host: PerHostOption = None,
    per_link: PerLinkOption = None,
    deadline: DeadlineOption = None,
    bandwidth: BandwidthOption = None,
    no_post_copy: NoPostCopyFlag = False,
    ignore_rules: IgnoreRulesFlag = False,
    now: Annotated[bool, typer.Option("--now", help="With cancel: the migrations under way too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether the plan is good.")] = False,
    detach: DetachFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Move all VMs off a host: shows the plan, asks, and does it. Then the host gets no VMs until `undrain`.

    Exit code: 0 all have gone, 2 refused or not confirmed (nothing changed), 3 some are still there,
    4 cancelled, 5 unknown (the controller was lost). With plan: 2 when a VM cannot go.
    """
    current = session(context, as_json)
    if now and action is not Action.CANCEL:
        raise Refused(f"--now belongs to `transhume drain {host} cancel`")
    options = _options(host, parallel, per_host, per_link, deadline, bandwidth, no_post_copy, ignore_rules)
    if action in (Action.BEGIN, Action.PLAN):
        plan = current.call(lambda client: client.pool.plan_drain(host, options))
        if action is Action.PLAN:
            raise typer.Exit(_tell_plan(current, plan))
        if not yes:
            confirm(current, plan)
        raise typer.Exit(current.call(lambda client: _begin(client, current, host, options, detach)))
    if action is Action.FOLLOW:
        raise typer.Exit(current.call(lambda client: _follow(client, current, host)))
    found = current.call(lambda client: _do(client, host, action, now))
    if current.as_json:
        say_json(found)
    else:
        show(drain_report(found))


def undrain(
    context: typer.Context,
    host: HostArgument,
    restore: Annotated[
        bool, typer.Option("--restore", help="Bring back the VMs that the drain moved away.")
    ] = False,
    parallel: ParallelOption = DEFAULT_PARALLEL,
    per_host: PerHostOption = None,
    per_link: PerLinkOption = None,
    deadline: DeadlineOption = None,
    bandwidth: BandwidthOption = None,
    no_post_copy: NoPostCopyFlag = False,
    ignore_rules: IgnoreRulesFlag = False,
    detach: DetachFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Let VMs be placed on a host again, and with --restore bring back those that were there.

    Exit codes are those of `drain`.
    """
    current = session(context, as_json)
    options = _options(host, parallel, per_host, per_link, deadline, bandwidth, no_post_copy, ignore_rules)
    begun = current.call(lambda client: client.pool.undrain(host, restore, options))
    if begun is not None and not detach:
        raise typer.Exit(current.call(lambda client: follow_drain(client, begun, view_for(current.as_json))))
    if current.as_json:
        say_json({"name": host, "restore": plain(begun)})
    elif begun is None:
        say(f"host {host} takes VMs again")
    else:
        say(f"host {host} takes VMs again; `transhume drain {host} show` tells how many are back")


def _options(
    host: str,
    parallel: int,
    per_host: int | None,
    per_link: int | None,
    deadline: str | None,
    bandwidth: str | None,
    no_post_copy: bool,
    ignore_rules: bool,
) -> DrainOptions:
    try:
        return DrainOptions(
            parallel=parallel,
            per_host=per_host,
            per_link=per_link,
            deadline_s=None if deadline is None else parse_time_s(deadline),
            migration=MigrationOptions(
                bandwidth_bytes_s=None if bandwidth is None else parse_rate_bytes_s(bandwidth),
                post_copy=not no_post_copy,
                ignore_rules=ignore_rules,
            ),
        )
    except ValidationError as error:
        raise Refused(f"host {host} cannot be drained like this: {words_of(error)}") from error


async def _begin(client: FarmClient, current: Session, host: str, options: DrainOptions, detach: bool) -> int:
    begun = await client.pool.begin_drain(host, options)
    if not detach:
        return await follow_drain(client, begun, view_for(current.as_json))
    if current.as_json:
        say_json({"type": "report", "drain": plain(begun)})
    else:
        say(f"host {host} is being drained; `transhume drain {host} show` tells how far it is")
    return 0


async def _follow(client: FarmClient, current: Session, host: str) -> int:
    return await follow_drain(client, await client.pool.drain(host), view_for(current.as_json))


async def _do(client: FarmClient, host: str, action: Action, now: bool) -> Drain:
    match action:
        case Action.PAUSE:
            return await client.pool.pause_drain(host)
        case Action.RESUME:
            return await client.pool.resume_drain(host)
        case Action.CANCEL:
            return await client.pool.cancel_drain(host, now)
        case _:
            return await client.pool.drain(host)


def _tell_plan(current: Session, plan: Drain) -> int:
    if current.as_json:
        say_json({"type": "plan", "drain": plain(plan)})
    else:
        show(plan_report(plan))
    return Refused.exit_code if any(step.state is StepState.BLOCKED for step in plan.steps) else 0


def confirm(current: Session, plan: Drain) -> None:
    """Show the plan and ask. Raises `Refused` without a yes."""
    if current.as_json or not sys.stdin.isatty():
        raise Refused(
            f"nothing was changed: `transhume drain {plan.host} plan` shows what would be done, "
            "and --yes does it"
        )
    show(plan_report(plan))
    if not typer.confirm(f"Drain {plan.host} like this?", err=True):
        raise Refused("nothing was changed")
