"""The farm's store: `store export`, `store import`, and which one a host uses."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from transhume.cli import daemon_process
from transhume.cli.session import JsonFlag, demand_root, say, say_json, session
from transhume.farm.backup import demand_farm, demand_own, demand_same_farm
from transhume.farm.records import FarmRecords
from transhume.farm.roll import demand_own_or_empty
from transhume.host.config import HostConfig
from transhume.model.errors import Conflict, Refused
from transhume.store.address import EtcdAddress, open_store, parse_address
from transhume.store.durable_file import new_file
from transhume.store.transfer import (
    Transferred,
    demand_whole,
    discard_half_import,
    export_store,
    import_store,
    read_export,
    replace_store,
)

app = typer.Typer(
    name="store", help="The farm's records: backup, restore, move to etcd.", no_args_is_help=True
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Holds secrets: for root alone.")]
IntoOption = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="Another store than this host's: etcd://HOST:PORT[,...]."),
]


async def with_store(config: HostConfig, url: str, *, is_new: bool) -> HostConfig:
    """`config`, with another store, which is opened to see that it can be.

    Raises `Conflict` while the daemon runs, and for a store with a farm that this host is not of, `Refused`
    and `StoreError` for one that cannot be used. Nothing was changed.
    """
    if not isinstance(parse_address(url), EtcdAddress):
        raise Refused(f"{url!r} is not the address of an etcd; write etcd://HOST:PORT, or leave --store out")
    _demand_down(config, "the store is changed")
    store = await open_store(url)
    try:
        records = FarmRecords(store)
        await demand_own_or_empty(records, config)
        if not is_new and not await records.hosts():
            raise Conflict(
                f"the store at {url} is empty, and this host has a farm: bring its records there first, with "
                f"`transhume store export FILE` and `transhume store import FILE --store {url}`"
            )
    finally:
        await store.close()
    return config.model_copy(update={"store": url, "controller_address": ""})


def export(context: typer.Context, file: FileArgument, as_json: JsonFlag = False) -> None:
    """Write all records of the farm to FILE, as they are at one moment; the farm goes on."""
    current = session(context, as_json)
    demand_root()
    config = _demand_config(current.state_dir)
    if file.exists():
        raise Conflict(f"{file} exists already; name another file, or remove it first")
    if daemon_process.running_pid(config) is None:
        done = asyncio.run(_export_directly(config, file))
    else:
        content = current.call(lambda client: client.export_store())
        with new_file(file) as partial:
            partial.write_bytes(content)
            revision, records = read_export(partial)
        done = Transferred(len(records), revision)
    _tell(current.as_json, done, f"{done.records} records of the farm are in {file}, which holds its secrets")


def import_(
    context: typer.Context,
    file: FileArgument,
    store: IntoOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the farm's present records, after an export of them.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard-half-import", help="Empty a store that an import left half full.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bring the records of a farm back from FILE, into an empty store or, with --replace, in place of what
    it has. The farm's controllers must be down; VMs run on.
    """
    current = session(context, as_json)
    demand_root()
    demand_farm(file)
    config = daemon_process.read_config(current.state_dir)
    if config is None and store is None:
        raise Refused(f"{current.state_dir} is not the state folder of a host; name the store with --store")
    if config is not None:
        demand_own(file, config.files)
        if store is None:
            _demand_down(config, "its records are replaced")
    url = store or _own_store(config)
    done = asyncio.run(_import(url, file, current.state_dir, replace, discard))
    _tell(current.as_json, done, f"{done.records} records of the farm are in its store")


app.command("export")(export)
app.command("backup", help="The same as `store export`.")(export)
app.command("import")(import_)
app.command("restore", help="The same as `store import`.")(import_)


async def _export_directly(config: HostConfig, file: Path) -> Transferred:
    store = await open_store(_own_store(config))
    try:
        return await export_store(store, file)
    finally:
        await store.close()


async def _import(url: str, file: Path, state_dir: Path, replace: bool, discard: bool) -> Transferred:
    store = await open_store(url, half_imported=True)
    try:
        if discard:
            await discard_half_import(store)
        await demand_whole(store)
        await demand_same_farm(file, store)
        if not replace or not await store.list(""):
            return await import_store(file, store)
        kept = state_dir / f"replaced-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.jsonl"
        await export_store(store, kept)
        typer.echo(f"what the store had is in {kept}", err=True)
        return await replace_store(file, store)
    finally:
        await store.close()


def _own_store(config: HostConfig | None) -> str:
    if config is None or not config.carries_controller:
        raise Refused("this host has no store: run this on the host that carries the controller")
    return config.store_url


def _demand_config(state_dir: Path) -> HostConfig:
    config = daemon_process.read_config(state_dir)
    if config is None:
        raise Refused(f"{state_dir} is not the state folder of a host; `transhume up` sets one up")
    return config


def _demand_down(config: HostConfig, when: str) -> None:
    if daemon_process.running_pid(config) is not None:
        raise Conflict(f"the daemon of host {config.name} runs: stop it with `transhume down` before {when}")


def _tell(as_json: bool, done: Transferred, words: str) -> None:
    if as_json:
        say_json({"records": done.records, "revision": done.revision})
    else:
        say(words)
