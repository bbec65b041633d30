"""`doctor` and `baseline`: is this server fit to be a host, and what have all hosts in common?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from transhume.cli import daemon_process
from transhume.cli.examination import Candidate, examine_alone, examine_towards, findings_table
from transhume.cli.farm_commands import split_address
from transhume.cli.session import JsonFlag, plain, say, say_json, session
from transhume.cli.tables import show
from transhume.farm.baseline import FarmBaseline
from transhume.host.config import DEFAULT_PORT, DEFAULT_VM_USER, HostConfig
from transhume.host.doctor.subject import Subject
from transhume.model.finding import Finding, Level
from transhume.trust.token import Token

EXIT_UNFIT = 2


def doctor(
    context: typer.Context,
    controller: Annotated[
        str | None,
        typer.Option("--controller", metavar="ADDRESS[:PORT]", help="Also examine the way to this farm."),
    ] = None,
    token: Annotated[
        str, typer.Option("--token", help="Ask that farm what joining would change; the token stays good.")
    ] = "",
    name: Annotated[str | None, typer.Option("--name", help="The name that it would join under.")] = None,
    address: Annotated[str | None, typer.Option("--address", help="Where the daemon would listen.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Its port.")] = None,
    vm_user: Annotated[str | None, typer.Option("--vm-user", help="The user that VMs run as.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run no guest where VMs would not get KVM anyway.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Examine this server: is it fit to be a host? Changes nothing."""
    current = session(context, as_json)
    known = daemon_process.read_config(current.state_dir)
    target = _target(controller, known)
    subject = Subject(
        state_dir=current.state_dir,
        vm_user=vm_user or (known.vm_user if known else DEFAULT_VM_USER),
        port=port or (known.port if known else DEFAULT_PORT),
        address=address or (known.address if known else ""),
        controller=target,
        daemon_runs=known is not None and daemon_process.running_pid(known) is not None,
        try_kvm=not quick,
    )
    if target is None:
        findings = examine_alone(subject)
    else:
        wanted = known.name if known else name or daemon_process.own_name()
        findings = examine_towards(subject, Candidate(wanted, Token.parse(token) if token else None))
    errors = [finding for finding in findings if finding.level is Level.ERROR]
    if current.as_json:
        say_json({"fit": not errors, "findings": plain(findings)})
    else:
        _tell(findings)
    raise typer.Exit(EXIT_UNFIT if errors else 0)


def baseline(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Show the farm's CPU baseline: the best CPU that every host can show to a guest."""
    current = session(context, as_json)
    found = current.call(lambda client: client.baseline())
    if current.as_json:
        say_json(found)
        return
    show(baseline_table(found))
    for host in found.untold:
        say(
            f"{host} does not tell its CPUs: bring it to this release, and mend what `transhume doctor` finds"
        )


def baseline_table(found: FarmBaseline) -> Table:
    """One row for each accelerator."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("ACCEL", "CPU MODEL", "HOSTS"):
        table.add_column(heading, no_wrap=True)
    table.add_column("FLAGS OF ALL", overflow="fold")
    table.add_column("HELD DOWN BY", overflow="fold")
    for base in found.baselines:
        held = "\n".join(f"{host} lacks {' '.join(flags)}" for host, flags in base.held_down_by.items())
        table.add_row(
            base.accel.value,
            Text(base.model or "none", style="" if base.model else "red"),
            ", ".join(base.hosts),
            " ".join(base.flags),
            held or "-",
        )
    return table


def _target(controller: str | None, known: HostConfig | None) -> tuple[str, int] | None:
    if controller is not None:
        return split_address(controller)
    if known is not None and known.controller_address:
        return known.controller_address, known.controller_port
    return None


def _tell(findings: list[Finding]) -> None:
    show(findings_table(findings))
    counts = {level: sum(1 for finding in findings if finding.level is level) for level in Level}
    if counts[Level.ERROR]:
        say(f"\nnot fit to be a host: errors: {counts[Level.ERROR]}, warnings: {counts[Level.WARNING]}")
    elif counts[Level.WARNING]:
        say(f"\nfit to be a host; warnings: {counts[Level.WARNING]}")
    else:
        say("\nfit to be a host")
