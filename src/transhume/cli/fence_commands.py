"""Dead hosts: `host show`, `host fence`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from transhume.cli.session import JsonFlag, say, say_json, session
from transhume.cli.tables import clock, plain_table, show
from transhume.farm.fencing import FenceReport
from transhume.model.errors import Refused

EXIT_SOME_LEFT = 3

HostArgument = Annotated[str, typer.Argument(metavar="HOST", help="A member of the farm.")]


def show_host(context: typer.Context, host: HostArgument, as_json: JsonFlag = False) -> None:
    """Show whether a host is lost or fenced, since when, and what that means for each of its VMs."""
    current = session(context, as_json)
    report = current.call(lambda client: client.pool.fence_report(host))
    if current.as_json:
        say_json(report)
    else:
        _tell(report)


def fence(
    context: typer.Context,
    host: HostArgument,
    i_have_powered_it_off: Annotated[
        bool,
        typer.Option("--i-have-powered-it-off", help="Run no fence command: it is switched off already."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Although it is not known to be lost; its VMs die with it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Switch a lost host off for good, and start its marked VMs on other hosts.

    Exit code: 0 fenced and every marked VM runs, 2 refused or not confirmed (not fenced), 3 fenced, but a
    marked VM does not run yet (it is tried again by itself), 5 unknown (the controller was lost).
    """
    current = session(context, as_json)
    before = current.call(lambda client: client.pool.fence_report(host))
    if not yes:
        _confirm(before, i_have_powered_it_off)
    report = current.call(lambda client: client.pool.fence(host, i_have_powered_it_off, force))
    if current.as_json:
        say_json(report)
    else:
        _tell(report)
    if any(vm.restarts and not vm.now_on for vm in report.vms):
        raise typer.Exit(EXIT_SOME_LEFT)


def _confirm(before: FenceReport, powered_off: bool) -> None:
    """Ask twice. Raises `Refused` without two answers."""
    host = before.host
    if not sys.stdin.isatty():
        raise Refused(f"nothing was changed: confirm on a terminal, or with --yes, that {host} is fenced")
    _tell(before)
    if powered_off:
        typer.echo(f"! If {host} has power after all, VMs may run twice, and break their disks.", err=True)
    else:
        typer.echo(f"! {host} is switched off by its fence command. What still runs there dies.", err=True)
    if not typer.confirm(f"Fence {host}?", err=True):
        raise Refused("nothing was changed")
    if typer.prompt(f"Type {host} to fence it", err=True) != host:
        raise Refused("nothing was changed: that is not the host's name")


def _tell(report: FenceReport) -> None:
    host = report.host
    if report.fenced_at_s is not None:
        say(f"host {host} is fenced since {clock(report.fenced_at_s)}: {report.how}")
    elif report.lost_since_s is not None:
        since = clock(report.lost_since_s)
        say(f"host {host} is lost: what it does is unknown since {since}. `transhume host fence {host}`")
    else:
        say(f"host {host} is up")
    if not report.vms:
        return
    table = plain_table("VM", "RESTARTS ELSEWHERE", "WHAT OF IT")
    for vm in report.vms:
        told = f"runs on {vm.now_on}" if vm.now_on else vm.note
        table.add_row(vm.vm, "yes" if vm.restarts else "no", told)
    show(table)
