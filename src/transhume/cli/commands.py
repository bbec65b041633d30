"""The commands of `transhume` and its global options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transhume import __version__
from transhume.cli import (
    doctor_commands,
    drain_commands,
    farm_commands,
    fence_commands,
    migrate_commands,
    operation_commands,
    pool_commands,
    service_commands,
    store_commands,
    user_commands,
    vm_commands,
)
from transhume.cli.session import JsonFlag, Session, say, say_json, session
from transhume.host.config import DEFAULT_STATE_DIR

app = typer.Typer(
    name="transhume",
    help="Move running QEMU VMs between plain Linux hosts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    context: typer.Context,
    state_dir: Annotated[
        Path, typer.Option("--state-dir", envvar="TRANSHUME_STATE_DIR", help="The daemon's state folder.")
    ] = DEFAULT_STATE_DIR,
    reason: Annotated[str, typer.Option("--reason", help="Why; noted in the audit log.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Move running QEMU VMs between plain Linux hosts."""
    context.obj = Session(state_dir.absolute(), as_json, reason)


app.command("up")(farm_commands.up)
app.command("join")(farm_commands.join)
app.command("doctor")(doctor_commands.doctor)
app.command("baseline")(doctor_commands.baseline)
app.command("down")(farm_commands.down)
app.command("install-service")(service_commands.install)
app.command("uninstall-service")(service_commands.uninstall)
app.command("token")(farm_commands.token)
app.command("hosts")(farm_commands.hosts)
app.command("forget", hidden=True)(farm_commands.remove)  # its older name
app.add_typer(farm_commands.host_app)
app.command("status")(farm_commands.status)
app.add_typer(vm_commands.app)
app.add_typer(user_commands.user_app)
app.command("audit")(user_commands.audit)
app.command("farm")(pool_commands.farm)
farm_commands.host_app.command("set")(pool_commands.set_host)
farm_commands.host_app.command("show")(fence_commands.show_host)
farm_commands.host_app.command("fence")(fence_commands.fence)
app.add_typer(pool_commands.rule_app)
app.add_typer(store_commands.app)
app.command("drain")(drain_commands.drain)
app.command("undrain")(drain_commands.undrain)
app.command("migrate")(migrate_commands.migrate)
app.command("cancel")(migrate_commands.cancel)
app.command("migrations")(migrate_commands.migrations)
app.command("migration")(migrate_commands.migration)
app.command("events")(operation_commands.events)
app.command("operations")(operation_commands.operations)
app.command("operation")(operation_commands.operation)


@app.command("demo")
def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the measurements there.")
    ] = None,
) -> None:
    """Make two hosts on this machine and move a working Linux guest between them, by both engines."""
    # Loaded here: it builds kernels, makes networks and concerns no other command.
    from transhume.demo.run import run_demo

    raise typer.Exit(run_demo(json_file))


@app.command("version")
def version(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Print the version of this command."""
    if session(context, as_json).as_json:
        say_json({"version": __version__})
    else:
        say(__version__)
