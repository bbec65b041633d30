"""The pool: `farm`, `host set`, `rule add|list|remove`."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from transhume.cli.completion import host_names
from transhume.cli.pool_tables import farm_report, rules_table
from transhume.cli.quantities import parse_size_bytes
from transhume.cli.session import JsonFlag, say, say_json, session, words_of
from transhume.cli.tables import show
from transhume.farm.rules import Rule, RuleKind
from transhume.model.errors import Refused

rule_app = typer.Typer(name="rule", help="Say which VMs may be where.", no_args_is_help=True)

LabelOption = Annotated[list[str] | None, typer.Option("--label", help="A label for rules. May repeat.")]
UnlabelOption = Annotated[list[str] | None, typer.Option("--unlabel", help="Take a label away. May repeat.")]

FenceOption = Annotated[
    str | None,
    typer.Option(
        "--fence-command",
        metavar="COMMAND",
        help="What switches a lost host off (on the controller's host only; it is told TRANSHUME_HOST).",
    ),
]


def farm(
    context: typer.Context,
    cpu_overcommit: Annotated[
        float | None,
        typer.Option("--cpu-overcommit", metavar="F", help="Promise each CPU so often, on every host."),
    ] = None,
    fence_command: FenceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the farm as one pool: what it has, what is promised, whether it could lose a host."""
    current = session(context, as_json)
    if cpu_overcommit is not None or fence_command is not None:
        current.call(lambda client: client.pool.set_farm(cpu_overcommit, fence_command))
    view = current.call(lambda client: client.pool.view())
    if current.as_json:
        say_json(view)
    else:
        show(farm_report(view))


def set_host(
    context: typer.Context,
    host: Annotated[
        str, typer.Argument(metavar="HOST", help="A member of the farm.", autocompletion=host_names)
    ],
    reserve_memory: Annotated[
        str | None, typer.Option("--reserve-memory", metavar="SIZE", help="What it keeps for itself: 2G.")
    ] = None,
    cpu_overcommit: Annotated[
        float | None, typer.Option("--cpu-overcommit", metavar="F", help="Promise each of its CPUs so often.")
    ] = None,
    label: LabelOption = None,
    unlabel: UnlabelOption = None,
    fence_command: FenceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Set what a host keeps for itself, how often its CPUs are promised, its labels, what switches it off."""
    current = session(context, as_json)
    reserve_bytes = None if reserve_memory is None else parse_size_bytes(reserve_memory)
    add, remove = tuple(label or ()), tuple(unlabel or ())
    if reserve_bytes is None and cpu_overcommit is None and not add and not remove and fence_command is None:
        raise Refused(
            "say what to set: --reserve-memory, --cpu-overcommit, --label, --unlabel or --fence-command"
        )
    current.call(
        lambda client: client.pool.set_host(host, reserve_bytes, cpu_overcommit, add, remove, fence_command)
    )
    if current.as_json:
        say_json({"name": host})
    else:
        say(f"host {host} is set; `transhume farm` shows it")


@rule_app.command("add")
def add_rule(
    context: typer.Context,
    kind: Annotated[RuleKind, typer.Argument(metavar="KIND", help="affinity, anti-affinity, pin or avoid.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The rule's name.")],
    vm: Annotated[list[str], typer.Option("--vm", help="A VM, or @label for all that carry it. May repeat.")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="For pin and avoid: a host, or @label. May repeat.")
    ] = None,
    prefer: Annotated[bool, typer.Option("--prefer", help="Keep it where it can be kept.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a rule. It moves nothing by itself; one that nothing could satisfy is refused."""
    current = session(context, as_json)
    try:
        rule = Rule(name=name, kind=kind, vms=tuple(vm), hosts=tuple(host or ()), preferred=prefer)
    except ValidationError as error:
        raise Refused(f"rule {name} cannot be made: {words_of(error)}") from error
    view = current.call(lambda client: client.pool.add_rule(rule))
    if current.as_json:
        say_json(view)
        return
    say(f"rule {name} holds from now on")
    for warning in view.warnings:
        typer.echo(f"! {warning}", err=True)


@rule_app.command("list")
def list_rules(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the rules, whom they mean, and what breaks them."""
    current = session(context, as_json)
    found = current.call(lambda client: client.pool.rules())
    if current.as_json:
        say_json(list(found))
    else:
        show(rules_table(found))


@rule_app.command("remove")
def remove_rule(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The rule's name.")],
    as_json: JsonFlag = False,
) -> None:
    """Forget a rule."""
    current = session(context, as_json)
    current.call(lambda client: client.pool.remove_rule(name))
    if current.as_json:
        say_json({"name": name})
    else:
        say(f"rule {name} is gone")
