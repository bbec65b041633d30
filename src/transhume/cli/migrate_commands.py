"""Migrations: `migrate`, `cancel`, `migrations`, `migration`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from pydantic import ValidationError

from transhume.api.client import FarmClient
from transhume.cli.completion import host_names, migration_ids, migrations_and_vms, vm_names
from transhume.cli.follow import follow, view_for, what_it_waits_for
from transhume.cli.migration_tables import dry_run_report, migration_report, migrations_table
from transhume.cli.output import Output, OutputOption
from transhume.cli.quantities import parse_rate_bytes_s, parse_time_ms, parse_time_s
from transhume.cli.session import JsonFlag, Session, say, say_json, session, words_of
from transhume.cli.tables import show
from transhume.model.errors import Refused
from transhume.model.migration import Engine, Migration, MigrationOptions, Mode, OnDeadline, Phase, Rest
from transhume.model.orders import Adjustment, CancelReply

_DEFAULTS = MigrationOptions()


class Action(StrEnum):
    """What `transhume migration` does with a migration."""

    SHOW = "show"
    SET = "set"
    SWITCH = "switch-to-post-copy"


def migrate(
    context: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="A running VM.", autocompletion=vm_names)],
    to: Annotated[
        str | None,
        typer.Option("--to", help="The destination; default: the best one.", autocompletion=host_names),
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="Who moves the memory.")] = _DEFAULTS.engine,
    max_downtime: Annotated[
        str,
        typer.Option(
            "--max-downtime", metavar="MS", help="Switch when the downtime is under this, such as 50."
        ),
    ] = f"{_DEFAULTS.max_downtime_ms:g}",
    deadline: Annotated[
        str, typer.Option("--deadline", metavar="S", help="It must be over by then, such as 300 or 5m.")
    ] = f"{_DEFAULTS.deadline_s:g}",
    on_deadline: Annotated[
        OnDeadline, typer.Option("--on-deadline", help="What to do when it is not.")
    ] = _DEFAULTS.on_deadline,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth", metavar="RATE", help="At most so many BYTES a second (500M), or bits (4Gbit)."
        ),
    ] = None,
    threshold_pages: Annotated[
        int | None,
        typer.Option("--threshold-pages", metavar="N", help="Switch when at most N pages are left."),
    ] = None,
    threshold_fraction: Annotated[
        float | None,
        typer.Option(
            "--threshold-fraction", metavar="F", help="Switch when at most this share of RAM is left."
        ),
    ] = None,
    mode: Annotated[
        Mode, typer.Option("--mode", help="The order of memory and switchover; auto lets the engine choose.")
    ] = _DEFAULTS.mode,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", metavar="N", help="Make N pre-copy passes, whatever is left then."),
    ] = None,
    rest: Annotated[
        Rest | None,
        typer.Option("--rest", help="When the pages travel that are left at the suspension."),
    ] = None,
    no_post_copy: Annotated[
        bool, typer.Option("--no-post-copy", help="Never leave pages for after the resume.")
    ] = False,
    give_up_after: Annotated[
        str | None,
        typer.Option(
            "--give-up-after",
            metavar="S",
            help="After the resume: wait so long for a source that was lost; default: for ever.",
        ),
    ] = None,
    safe: Annotated[
        str | None,
        typer.Option(
            "--safe",
            metavar="DIR",
            help="While pages are owed, write them to this folder too, on storage that both hosts reach.",
        ),
    ] = None,
    residual_limit: Annotated[
        str | None,
        typer.Option(
            "--residual-limit",
            metavar="S",
            help="Owe pages only when few enough are left to be there within this time after the resume.",
        ),
    ] = None,
    ignore_rules: Annotated[
        bool, typer.Option("--ignore-rules", help="Also to where a rule would not have it.")
    ] = False,
    max_iterations: Annotated[int, typer.Option("--max-iterations")] = _DEFAULTS.max_iterations,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare hashes of the RAM: at the switchover, which lengthens the downtime, or once all "
            "pages that were owed are there.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would meet.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Move a running VM to another host; one that still lacks pages of its last move moves when it has them.

    Exit code: 0 moved, 2 refused (nothing changed), 3 failed (the last line says where the VM runs),
    4 cancelled, 5 unknown (the controller was lost).
    """
    current = session(context, as_json)
    values = {
        "engine": engine,
        "max_downtime_ms": parse_time_ms(max_downtime),
        "deadline_s": parse_time_s(deadline),
        "on_deadline": on_deadline,
        "bandwidth_bytes_s": None if bandwidth is None else parse_rate_bytes_s(bandwidth),
        "threshold_pages": threshold_pages,
        "threshold_fraction": threshold_fraction,
        "mode": mode,
        "iterations": iterations,
        "rest": rest,
        "post_copy": not no_post_copy,
        "give_up_after_s": None if give_up_after is None else parse_time_s(give_up_after),
        "safe_dir": safe,
        "residual_limit_s": None if residual_limit is None else parse_time_s(residual_limit),
        "ignore_rules": ignore_rules,
        "max_iterations": max_iterations,
        "verify": verify,
    }
    try:
        options = MigrationOptions.model_validate(values)
    except ValidationError as error:
        raise Refused(f"VM {vm} cannot be moved like this: {words_of(error)}") from error
    if dry_run:
        raise typer.Exit(_dry_run(current, vm, to, options))
    raise typer.Exit(current.call(lambda client: _migrate(client, current, vm, to, options, detach)))


async def _migrate(
    client: FarmClient, current: Session, vm: str, to: str | None, options: MigrationOptions, detach: bool
) -> int:
    migration = await client.migrate(vm, to, options)
    if not detach:
        return await follow(client, migration, view_for(current.as_json))
    if current.as_json:
        say_json({"type": "report", "migration": migration.model_dump(mode="json")})
    elif migration.phase is Phase.QUEUED:
        say(await what_it_waits_for(client, migration))
    else:
        say(
            f"moving VM {vm} to {migration.destination}; "
            f"`transhume migration {migration.id}` tells how far it is"
        )
    return 0


def _dry_run(current: Session, vm: str, to: str | None, options: MigrationOptions) -> int:
    answer = current.call(lambda client: client.dry_run(vm, to, options))
    if current.as_json:
        say_json({"type": "dry-run", "dry_run": answer.model_dump(mode="json")})
    else:
        show(dry_run_report(answer))
    return Refused.exit_code if answer.reasons else 0


def cancel(
    context: typer.Context,
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MIGRATION|VM", help="Its id, or the name of the VM.", autocompletion=migrations_and_vms
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Give up a migration; after its commit, say where the VM runs. Exit code 2 when it was too late.

    By the VM's name, one that is queued is given up before the one that it waits for.
    """
    current = session(context, as_json)
    reply = current.call(lambda client: client.cancel(reference))
    if current.as_json:
        say_json(reply)
    else:
        say(_cancel_in_words(reply))
    if not reply.accepted:
        raise typer.Exit(Refused.exit_code)


def _cancel_in_words(reply: CancelReply) -> str:
    if not reply.accepted:
        return f"too late to cancel; the VM runs at: {reply.runs_at}"
    if reply.behind:
        return (
            f"cancelled {reply.migration}, which was queued behind {reply.behind}; {reply.behind} goes on, "
            f"and the VM runs at: {reply.runs_at}"
        )
    return f"cancelled; the VM runs at: {reply.runs_at}"


def migrations(
    context: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=500, help="Only the latest so many.")
    ] = 100,
    output: OutputOption = Output.TABLE,
    as_json: JsonFlag = False,
) -> None:
    """List the migrations, past and under way."""
    current = session(context, as_json or output is Output.JSON)
    found: list[Migration] = current.call(lambda client: client.migrations(limit))
    if current.as_json:
        say_json(list(found))
    else:
        show(migrations_table(found, output is Output.WIDE))


def migration(
    context: typer.Context,
    identity: Annotated[
        str, typer.Argument(metavar="MIGRATION", help="Its id.", autocompletion=migration_ids)
    ],
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="show, set, or switch-to-post-copy.")
    ] = Action.SHOW,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth", metavar="RATE", help="With set: at most this rate, such as 500M; 0: no limit."
        ),
    ] = None,
    max_downtime: Annotated[
        str | None, typer.Option("--max-downtime", metavar="MS", help="With set: the downtime to keep.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option("--deadline", metavar="S", help="With set: counted from the request.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the report of one migration, or change one that is under way."""
    current = session(context, as_json)
    limits = {
        "bandwidth_bytes_s": 0 if bandwidth == "0" else bandwidth and parse_rate_bytes_s(bandwidth),
        "max_downtime_ms": max_downtime and parse_time_ms(max_downtime),
        "deadline_s": deadline and parse_time_s(deadline),
    }
    if any(limit is not None for limit in limits.values()) != (action is Action.SET):
        raise Refused(
            f"`transhume migration {identity} set` needs --bandwidth, --max-downtime or --deadline"
            if action is Action.SET
            else f"limits are changed with `transhume migration {identity} set`"
        )
    if action is not Action.SHOW:
        try:
            adjustment = Adjustment.model_validate(limits | {"switch_to_post_copy": action is Action.SWITCH})
        except ValidationError as error:
            raise Refused(f"migration {identity} cannot be changed like this: {words_of(error)}") from error
        current.call(lambda client: client.adjust(identity, adjustment))
        if not current.as_json:
            say(
                "done"
                if action is Action.SET
                else "it will be suspended now; the rest follows after the resume"
            )
            return
    found = current.call(lambda client: client.migration(identity))
    if current.as_json:
        say_json(found)
    else:
        show(migration_report(found))
