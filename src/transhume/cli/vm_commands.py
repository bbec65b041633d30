"""VMs: `vm create|start|stop|kill|delete|show|list|log|console|screendump`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from transhume.cli.completion import vm_names
from transhume.cli.output import Output, OutputOption
from transhume.cli.pool_commands import LabelOption, UnlabelOption
from transhume.cli.quantities import parse_size_bytes, parse_time_s
from transhume.cli.session import JsonFlag, Session, plain, say, say_json, session, words_of
from transhume.cli.tables import show, vm_details, vms_table
from transhume.farm.revival import Revival
from transhume.model.errors import Refused
from transhume.model.vm import Accel, Disk, Display, Vm, VmSpec

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The VM's name.", autocompletion=vm_names)]

app = typer.Typer(name="vm", help="Make, start, stop and look at VMs.", no_args_is_help=True)


@app.command("create")
def create(
    context: typer.Context,
    name: NameArgument,
    memory: Annotated[str, typer.Option("--memory", help="Its RAM, such as 512M or 1G (powers of 1024).")],
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="How far its RAM may grow while it runs.")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", help="Its vCPUs.")] = 1,
    numa_nodes: Annotated[
        int, typer.Option("--numa-nodes", help="How many blocks its RAM is split into.")
    ] = 1,
    kernel: Annotated[Path | None, typer.Option("--kernel", help="A Linux kernel to boot.")] = None,
    initrd: Annotated[Path | None, typer.Option("--initrd", help="An initial ramdisk.")] = None,
    append: Annotated[str, typer.Option("--append", help="The kernel's command line.")] = "",
    disk: Annotated[
        list[str] | None,
        typer.Option(
            "--disk",
            help="PATH[,format=raw|qcow2][,cache=direct][,readonly]; reachable on every host. May repeat.",
        ),
    ] = None,
    display: Annotated[Display, typer.Option("--display", help="What the guest draws on.")] = Display.NONE,
    accel: Annotated[Accel, typer.Option("--accel", help="Who executes the guest.")] = Accel.AUTO,
    machine: Annotated[
        str, typer.Option("--machine", help="A versioned QEMU machine, such as pc-q35-7.2.")
    ] = "",
    cpu: Annotated[
        str, typer.Option("--cpu", help="A QEMU CPU model, or `baseline`: one that all hosts have.")
    ] = "",
    host: Annotated[
        str | None, typer.Option("--host", help="Who shall own it; default: where there is most room.")
    ] = None,
    label: LabelOption = None,
    reserve: Annotated[
        bool, typer.Option("--reserve", help="Keep its share of its host while it is stopped too.")
    ] = False,
    restart_elsewhere: Annotated[
        bool, typer.Option("--restart-elsewhere", help="Start it on another host when its own was fenced.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Pause it while its host cannot reach the register.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a VM; nothing runs yet."""
    try:
        spec = VmSpec(
            name=name,
            memory_bytes=parse_size_bytes(memory),
            max_memory_bytes=parse_size_bytes(max_memory) if max_memory else 0,
            cpus=cpus,
            numa_nodes=numa_nodes,
            kernel=_absolute(kernel),
            initrd=_absolute(initrd),
            append=append,
            disks=tuple(parse_disk(text) for text in disk or []),
            display=display,
            accel=accel,
            machine_type=machine,
            cpu_model=cpu,
        )
    except ValidationError as error:
        raise Refused(f"VM {name} cannot be made: {words_of(error)}") from error
    current = session(context, as_json)
    labels = tuple(label or ())
    made = current.call(
        lambda client: client.create_vm(spec, host, labels, reserve, restart_elsewhere, strict)
    )
    _tell(
        current, made, f"VM {name} is made on {made.ownership.owner}; `transhume vm start {name}` starts it"
    )


@app.command("start")
def start(
    context: typer.Context,
    name: NameArgument,
    ignore_rules: Annotated[
        bool, typer.Option("--ignore-rules", help="Also where a rule would not have it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Start a VM on the host that owns it, or where there is room when that has none."""
    current = session(context, as_json)
    vm = current.call(lambda client: client.start_vm(name, ignore_rules))
    _tell(current, vm, f"VM {name} runs on {vm.ownership.owner}")


@app.command("stop")
def stop(
    context: typer.Context,
    name: NameArgument,
    timeout: Annotated[
        str, typer.Option("--timeout", help="How long the guest may take, such as 30s.")
    ] = "60s",
    as_json: JsonFlag = False,
) -> None:
    """Ask the guest to power down, and wait."""
    current = session(context, as_json)
    timeout_s = parse_time_s(timeout)
    vm = current.call(lambda client: client.stop_vm(name, timeout_s))
    _tell(current, vm, f"VM {name} has stopped")


@app.command("kill")
def kill(context: typer.Context, name: NameArgument, as_json: JsonFlag = False) -> None:
    """End a VM at once, as pulling the plug does."""
    current = session(context, as_json)
    vm = current.call(lambda client: client.kill_vm(name))
    _tell(current, vm, f"VM {name} was ended")


@app.command("revive")
def revive(
    context: typer.Context,
    name: NameArgument,
    from_switchover: Annotated[
        bool, typer.Option("--from-switchover", help="As it was when it was suspended for its migration.")
    ] = False,
    with_changed_disks: Annotated[
        bool, typer.Option("--with-changed-disks", help="Even though it went on writing its disks.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="The lost host is switched off; do not ask again.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Take a VM back from a destination host that was lost before all of its memory was there.

    Exit code: 0 it runs at its source again, 2 refused or not confirmed (nothing changed).
    """
    if not from_switchover:
        raise Refused(
            "a VM can be revived as it was at the switchover and in no other way: say --from-switchover"
        )
    current = session(context, as_json)
    offer = current.call(lambda client: client.revival(name))
    if not yes:
        _confirm(offer)
    reply = current.call(lambda client: client.revive(name, with_changed_disks))
    if current.as_json:
        say_json({"offer": plain(offer), "reply": plain(reply)})
    else:
        say(f"VM {name} runs on {offer.source} again, as it was suspended")


def _confirm(offer: Revival) -> None:
    """Show what would be lost, and have the VM's name typed. Raises `Refused` without it."""
    for warning in offer.warnings:
        typer.echo(f"! {warning}", err=True)
    if not sys.stdin.isatty():
        raise Refused(
            f"nothing was changed: confirm on a terminal, or with --yes, that VM {offer.vm} goes back"
        )
    if typer.prompt(f"Type {offer.vm} to take it back to {offer.source}", err=True) != offer.vm:
        raise Refused("nothing was changed: that is not the VM's name")


@app.command("set")
def set_vm(
    context: typer.Context,
    name: NameArgument,
    label: LabelOption = None,
    unlabel: UnlabelOption = None,
    reserve: Annotated[
        bool | None,
        typer.Option("--reserve/--no-reserve", help="Whether to keep its share while it is stopped too."),
    ] = None,
    restart_elsewhere: Annotated[
        bool | None,
        typer.Option(
            "--restart-elsewhere/--no-restart-elsewhere",
            help="Whether to start it on another host when its own was fenced.",
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict", help="Whether to pause it while its host cannot reach the register."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="All of its RAM. While it runs it can grow up to its --max-memory."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Set a VM's RAM and labels, whether its share is kept, and what happens when its host is lost."""
    current = session(context, as_json)
    add, remove = tuple(label or ()), tuple(unlabel or ())
    settings = (reserve, restart_elsewhere, strict, memory)
    if not add and not remove and all(value is None for value in settings):
        raise Refused(
            "say what to set: --memory, --label, --unlabel, --reserve, --restart-elsewhere, --strict, or "
            "--no-reserve, --no-restart-elsewhere, --no-strict"
        )
    if memory is not None:
        memory_bytes = parse_size_bytes(memory)
        current.call(lambda client: client.pool.set_vm_memory(name, memory_bytes))
    vm = current.call(
        lambda client: client.pool.set_vm(name, add, remove, reserve, restart_elsewhere, strict)
    )
    kept = "its share is kept for it" if vm.reserve else "it has a share while it runs"
    lost = "; it starts elsewhere when its host was fenced" if vm.restart_elsewhere else ""
    lost += "; it stands still while its host is cut off" if vm.strict else ""
    labels = ", ".join(vm.labels) or "-"
    _tell(current, vm, f"VM {name} has {_size_of(vm)} and the labels {labels}; {kept}{lost}")


def _size_of(vm: Vm) -> str:
    most = f" (at most {vm.spec.max_memory_bytes >> 20})" if vm.spec.max_memory_bytes else ""
    return f"{vm.spec.memory_bytes >> 20} MiB{most}"


@app.command("delete")
def delete(context: typer.Context, name: NameArgument, as_json: JsonFlag = False) -> None:
    """Forget a stopped VM. Its disks stay."""
    current = session(context, as_json)
    current.call(lambda client: client.delete_vm(name))
    if current.as_json:
        say_json({"name": name})
    else:
        say(f"VM {name} is deleted")


@app.command("show")
def show_vm(context: typer.Context, name: NameArgument, as_json: JsonFlag = False) -> None:
    """Show one VM."""
    current = session(context, as_json)
    vm = current.call(lambda client: client.vm(name))
    if current.as_json:
        say_json(vm)
    else:
        show(vm_details(vm))


@app.command("list")
def list_vms(context: typer.Context, output: OutputOption = Output.TABLE, as_json: JsonFlag = False) -> None:
    """List the VMs of the farm."""
    current = session(context, as_json or output is Output.JSON)
    vms = current.call(lambda client: client.vms())
    if current.as_json:
        say_json(list(vms))
    else:
        show(vms_table(vms, output is Output.WIDE))


@app.command("log")
def log(
    context: typer.Context,
    name: NameArgument,
    serial: Annotated[
        bool, typer.Option("--serial", help="What the guest printed, not what QEMU said.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=10_000)] = 100,
    as_json: JsonFlag = False,
) -> None:
    """Print the last lines of a VM's log."""
    current = session(context, as_json)
    text = current.call(lambda client: client.vm_log(name, serial, lines))
    if current.as_json:
        say_json({"name": name, "text": text})
    else:
        typer.echo(text, nl=not text.endswith("\n"))


@app.command("console")
def console(context: typer.Context, name: NameArgument) -> None:
    """Join a VM's serial console. Ctrl-] leaves it."""
    # Loaded here: the library behind it would slow every other command down.
    from transhume.cli.console import talk

    session(context).call(lambda client: talk(client, name))


@app.command("screendump")
def screendump(
    context: typer.Context,
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the PNG goes.")],
    as_json: JsonFlag = False,
) -> None:
    """Save the guest's screen as a PNG."""
    current = session(context, as_json)
    picture = current.call(lambda client: client.screendump(name))
    try:
        file.write_bytes(picture)
    except OSError as error:
        raise Refused(f"{file} cannot be written: {error.strerror}") from error
    if current.as_json:
        say_json({"name": name, "file": str(file), "bytes": len(picture)})
    else:
        say(f"{file} shows the screen of VM {name}")


def parse_disk(text: str) -> Disk:
    """`PATH[,format=raw|qcow2][,cache=direct][,readonly]`. Raises `Refused`."""
    path, *options = text.split(",")
    values: dict[str, object] = {"path": _absolute(Path(path)), "format": "raw"}
    for option in options:
        match option.split("=", 1):
            case ["format", "raw" | "qcow2" as kind]:
                values["format"] = kind
            case ["cache", "direct"]:
                values["cache_direct"] = True
            case ["readonly"]:
                values["read_only"] = True
            case _:
                raise Refused(
                    f"the disk's option {option!r} is not known; there are format=raw, format=qcow2, "
                    "cache=direct and readonly"
                )
    if not path:
        raise Refused("a disk needs the path of its image; try --disk /srv/images/web.qcow2,format=qcow2")
    return Disk.model_validate(values)


def _absolute(path: Path | None) -> str:
    return "" if path is None else str(path.absolute())


def _tell(current: Session, vm: Vm, sentence: str) -> None:
    if current.as_json:
        say_json(vm)
    else:
        say(sentence)
