"""Hosts: `up`, `join`, `down`, `token`, `hosts`, `host remove`, `status`."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from transhume.api.client import FarmClient
from transhume.api.http_connection import authority
from transhume.cli import daemon_process
from transhume.cli.completion import host_names
from transhume.cli.examination import Candidate, demand_fit, examine_alone, examine_towards
from transhume.cli.output import Output, OutputOption
from transhume.cli.session import JsonFlag, Session, demand_root, say, say_json, session, words_of
from transhume.cli.store_commands import with_store
from transhume.cli.tables import hosts_table, show
from transhume.farm.members import Invitation
from transhume.host.config import DEFAULT_PORT, DEFAULT_VM_USER, HostConfig
from transhume.host.doctor.subject import Subject
from transhume.model.errors import Conflict, NotFound, Refused, TranshumeError, Unauthorized
from transhume.trust.credentials import Credentials, unproven
from transhume.trust.names import CONTROLLER_NAME
from transhume.trust.token import Token

host_app = typer.Typer(name="host", help="One host of the farm.", no_args_is_help=True)

NameOption = Annotated[str | None, typer.Option("--name", help="This host's name; default: its host name.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Where the other hosts reach this one; default: looked up.")
]
AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--also-address",
        help="A further IP address of this host, for migrations whose link breaks. May be repeated.",
    ),
]
PortOption = Annotated[int, typer.Option("--port", help="Where its daemon listens.", min=1, max=65535)]
UserOption = Annotated[str, typer.Option("--vm-user", help="The unprivileged user that VMs run as.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where the farm's records lie: etcd://HOST:PORT[,...]; default: a file of this host.",
    ),
]
DespiteFlag = Annotated[
    bool, typer.Option("--despite-findings", help="Go on although `transhume doctor` finds errors.")
]
ForegroundFlag = Annotated[bool, typer.Option("--foreground", help="Do not detach; for service managers.")]


def up(
    context: typer.Context,
    name: NameOption = None,
    address: AddressOption = None,
    also_address: AlsoOption = None,
    port: PortOption = DEFAULT_PORT,
    vm_user: UserOption = DEFAULT_VM_USER,
    store: StoreOption = None,
    foreground: ForegroundFlag = False,
    despite_findings: DespiteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Make this server a host: start its daemon. The first host of a farm carries the controller."""
    current = session(context, as_json)
    demand_root()
    known = daemon_process.read_config(current.state_dir)
    _demand_same(known, name, address, also_address)
    folder_was_made = not current.state_dir.exists()
    config = known or _new_config(current.state_dir, name, address, port, vm_user, also_address)
    if store is not None and store != config.store_url:
        config = asyncio.run(with_store(config, store, is_new=known is None))
    if known is None:
        demand_fit(examine_alone(_subject(config, None)), despite_findings, "be a host")
    if config != known:
        daemon_process.write_config(config)
    if foreground:
        os.execv(daemon_process.command(config.state_dir)[0], daemon_process.command(config.state_dir))
    pid = daemon_process.running_pid(config)
    if pid is None:
        try:
            pid = daemon_process.start(config)
            if config.carries_controller:
                # A member comes up without its controller too; here the next command needs the heartbeat.
                asyncio.run(daemon_process.wait_until_member(config))
        except BaseException:
            if known is None:
                daemon_process.stop(config)
                daemon_process.remove_config(config.state_dir, folder_was_made)
            raise
    invitation = current.call(lambda client: client.invite()) if config.carries_controller else None
    _tell_up(current, config, pid, invitation)


def join(
    context: typer.Context,
    controller: Annotated[str, typer.Argument(metavar="ADDRESS[:PORT]", help="The controller's host.")],
    token: Annotated[
        str, typer.Option("--token", help="What `up` or `token` printed there; `-`: read it from stdin.")
    ],
    name: NameOption = None,
    address: AddressOption = None,
    also_address: AlsoOption = None,
    port: PortOption = DEFAULT_PORT,
    vm_user: UserOption = DEFAULT_VM_USER,
    despite_findings: DespiteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Make this server a host of the farm whose controller is at ADDRESS.

    On a host of that farm, with a token of `token --host`: give it a new key and certificate.
    """
    current = session(context, as_json)
    demand_root()
    given = Token.parse(sys.stdin.readline().strip() if token == "-" else token)
    target = split_address(controller)
    known = daemon_process.read_config(current.state_dir)
    if known is not None:
        _demand_same(known, name, address, also_address)
        asyncio.run(_enter_again(known, target, given))
        _tell_joined(current, known, target)
        return
    folder_was_made = not current.state_dir.exists()
    own = address or daemon_process.own_address(*target)
    draft = _new_config(current.state_dir, name, own, port, vm_user, also_address)
    asyncio.run(_demand_controller(target))
    candidate = Candidate(draft.name, given)
    demand_fit(examine_towards(_subject(draft, target), candidate), despite_findings, "join the farm")
    asyncio.run(_enter(draft, target, given, folder_was_made))
    _tell_joined(current, draft, target)


def _tell_joined(current: Session, config: HostConfig, target: tuple[str, int]) -> None:
    if current.as_json:
        answer = {"name": config.name, "address": config.address, "port": config.port}
        say_json({**answer, "controller": authority(*target)})
    else:
        say(f"host {config.name} has joined the farm of the controller at {authority(*target)}")


async def _demand_controller(target: tuple[str, int]) -> None:
    """Raise `HostLost` at once when nobody answers: then there is nothing to examine this server for."""
    async with FarmClient(target, unproven) as controller:
        try:
            await controller.clock_s()
        except (NotFound, Unauthorized):
            return  # an older release, which has no such route


def _subject(config: HostConfig, controller: tuple[str, int] | None) -> Subject:
    return Subject(
        state_dir=config.state_dir,
        vm_user=config.vm_user,
        port=config.port,
        address=config.address,
        controller=controller,
    )


async def _enter_again(known: HostConfig, target: tuple[str, int], token: Token) -> None:
    """A host of the farm gets a new key and certificate; its VMs and movers are not touched."""
    from transhume.api.joining import join_farm

    set_up = f"this server is set up as host {known.name} already"
    if known.carries_controller and not known.on_cluster:
        raise Conflict(f"{set_up}, and carries the controller; another --state-dir makes a second host")
    if not known.files.is_of(token.fingerprint):
        raise Conflict(f"{set_up}, of another farm; another --state-dir makes a second host")
    config = known.model_copy(update={"controller_address": target[0], "controller_port": target[1]})
    await join_farm(target, token, config)
    lasting = known if known.on_cluster else config
    daemon_process.write_config(lasting)
    await asyncio.to_thread(daemon_process.stop, lasting)
    await asyncio.to_thread(daemon_process.start, lasting)
    await daemon_process.wait_until_member(lasting)


async def _enter(draft: HostConfig, target: tuple[str, int], token: Token, folder_was_made: bool) -> None:
    """Join, start the daemon, and wait until the controller has heard from it; or leave nothing behind."""
    # Loaded here: making a key takes a library that no other command needs.
    from transhume.api.joining import join_farm

    config = draft.model_copy(update={"controller_address": target[0], "controller_port": target[1]})
    try:
        daemon_process.make_state_dir(config)
        joined = await join_farm(target, token, config)
    except BaseException:
        daemon_process.remove_config(config.state_dir, folder_was_made)
        raise
    try:
        lasting = await with_store(config, joined.store, is_new=False) if joined.store else config
        daemon_process.write_config(lasting)
        await asyncio.to_thread(daemon_process.start, lasting)
        await daemon_process.wait_until_member(lasting)
    except BaseException:
        await asyncio.shield(_leave(config, folder_was_made))
        raise


async def _leave(config: HostConfig, folder_was_made: bool) -> None:
    await asyncio.to_thread(daemon_process.stop, config)
    tls = partial(Credentials(config.files).client, CONTROLLER_NAME)
    async with FarmClient((config.controller_address, config.controller_port), tls) as client:
        # If it fails, the controller keeps a member that never reported, until one joins under its name.
        with suppress(TranshumeError):
            await client.remove_host(config.name)
    daemon_process.remove_config(config.state_dir, folder_was_made)


def down(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Stop this server's daemon. Its VMs, and migrations under way, go on."""
    current = session(context, as_json)
    demand_root()
    config = daemon_process.read_config(current.state_dir)
    if config is None:
        raise Refused(f"{current.state_dir} is not the state folder of a host; `transhume up` sets one up")
    ran = daemon_process.stop(config)
    if current.as_json:
        say_json({"name": config.name, "stopped": ran})
    else:
        say(f"the daemon of host {config.name} {'has stopped; its VMs go on' if ran else 'was not running'}")


def token(
    context: typer.Context,
    host: Annotated[
        str | None,
        typer.Option("--host", help="For this host of the farm to join once more, with a new key."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print a new token with which one more host may join."""
    current = session(context, as_json)
    invitation = current.call(lambda client: client.invite(only_for=host))
    config = daemon_process.read_config(current.state_dir)
    if current.as_json or config is None:
        say_json(invitation)
    else:
        say(_join_command(config, invitation))


def hosts(context: typer.Context, output: OutputOption = Output.TABLE, as_json: JsonFlag = False) -> None:
    """List the hosts of the farm with their resources."""
    current = session(context, as_json or output is Output.JSON)
    found = current.call(lambda client: client.hosts())
    if current.as_json:
        say_json(list(found))
    else:
        show(hosts_table(found, time.time(), output is Output.WIDE))


def remove(
    context: typer.Context,
    host: Annotated[str, typer.Argument(help="A host that owns no VM.", autocompletion=host_names)],
    as_json: JsonFlag = False,
) -> None:
    """Remove a host from the farm. From then on its certificate opens nothing."""
    current = session(context, as_json)
    current.call(lambda client: client.remove_host(host))
    if current.as_json:
        say_json({"name": host})
    else:
        say(f"host {host} is no longer a member of the farm")


host_app.command("remove")(remove)


def status(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Say whether this server's daemon answers, and who carries the controller."""
    current = session(context, as_json)
    pong = current.call(lambda client: client.ping())
    config = daemon_process.read_config(current.state_dir)
    if current.as_json:
        say_json(pong)
        return
    where = "this host" if pong.carries_controller or config is None else config.controller_address
    say(f"host {pong.host} runs Transhume {pong.version}; the controller is on {where}")


def split_address(text: str) -> tuple[str, int]:
    """`10.0.0.1`, `10.0.0.1:7461`, `[fd00::1]:7461` or a bare IPv6 address. Raises `Refused`."""
    found = re.fullmatch(
        r"\[(?P<six>[0-9a-fA-F:]+)\](?::(?P<port6>\d+))?|(?P<host>[^:\s]+)(?::(?P<port>\d+))?", text
    )
    if found is None:
        if re.fullmatch(r"[0-9a-fA-F:]+", text):
            return text, DEFAULT_PORT
        raise Refused(f"{text!r} is not an address; try 10.0.0.1 or 10.0.0.1:{DEFAULT_PORT}")
    port = int(found["port6"] or found["port"] or DEFAULT_PORT)
    if not 1 <= port <= 65535:
        raise Refused(f"{port} is not a port; try {DEFAULT_PORT}")
    return found["six"] or found["host"], port


def _new_config(
    state_dir: Path,
    name: str | None,
    address: str | None,
    port: int,
    vm_user: str,
    also_address: list[str] | None,
) -> HostConfig:
    wanted = name or daemon_process.own_name()
    try:
        return HostConfig(
            name=wanted,
            state_dir=state_dir,
            # Towards a documentation address: nothing is sent, the kernel only names the interface.
            address=address or daemon_process.own_address("192.0.2.1", port),
            port=port,
            vm_user=vm_user,
            other_addresses=tuple(also_address or ()),
        )
    except ValidationError as error:
        raise Refused(f"host {wanted!r} cannot be set up: {words_of(error)}") from error


def _demand_same(
    known: HostConfig | None, name: str | None, address: str | None, also_address: list[str] | None
) -> None:
    if known is None:
        return
    others = None if also_address is None else ", ".join(also_address)
    for what, held, wanted in (
        ("name", known.name, name),
        ("address", known.address, address),
        ("also-address", ", ".join(known.other_addresses) or "(none)", others),
    ):
        if wanted is not None and wanted != held:
            raise Conflict(
                f"this server is set up already, as host {known.name} with the {what} {held}; "
                f"leave out --{what}, or edit {daemon_process.config_file(known.state_dir)} while it is down"
            )


def _join_command(config: HostConfig, invitation: Invitation) -> str:
    address, port = config.address, config.port
    if not config.carries_controller:
        address, port = config.controller_address, config.controller_port
    where = address if port == DEFAULT_PORT else authority(address, port)
    return shlex.join(["transhume", "join", where, "--token", invitation.token])


def _tell_up(current: Session, config: HostConfig, pid: int, invitation: Invitation | None) -> None:
    if current.as_json:
        answer: dict[str, object] = {
            "name": config.name,
            "address": config.address,
            "port": config.port,
            "other_addresses": list(config.other_addresses),
            "state_dir": str(config.state_dir),
            "pid": pid,
        }
        if invitation is not None:
            answer |= {
                "token": invitation.token,
                "token_expires_at_s": invitation.expires_at_s,
                "join_command": _join_command(config, invitation),
            }
        say_json(answer)
        return
    say(f"host {config.name} is up at {authority(config.address, config.port)} (process {pid})")
    if invitation is not None:
        say(f"let another server join within an hour, once:\n  {_join_command(config, invitation)}")
