"""Names that the shell completes: of VMs, hosts, migrations and operations, as the farm has them now.

A completion has no words for an error: where nothing can be asked it offers nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from transhume.api.client import FarmClient
from transhume.host.config import DEFAULT_STATE_DIR
from transhume.model.errors import TranshumeError

ANSWER_LIMIT_S = 2.0

_Names = Callable[[FarmClient], Awaitable[list[str]]]


def _offer(context: typer.Context, incomplete: str, names: _Names) -> list[str]:
    folder = context.find_root().params.get("state_dir") or os.environ.get("TRANSHUME_STATE_DIR")
    socket = Path(folder or DEFAULT_STATE_DIR) / "api.sock"
    if not os.access(socket, os.W_OK):
        return []

    async def ask() -> list[str]:
        async with asyncio.timeout(ANSWER_LIMIT_S), FarmClient(socket) as client:
            return await names(client)

    try:
        found = asyncio.run(ask())
    except (TranshumeError, TimeoutError):
        return []
    return [name for name in found if name.startswith(incomplete)]


async def _vms(client: FarmClient) -> list[str]:
    return [vm.spec.name for vm in await client.vms()]


async def _hosts(client: FarmClient) -> list[str]:
    return [host.name for host in await client.hosts()]


async def _migrations(client: FarmClient) -> list[str]:
    return [migration.id for migration in reversed(await client.migrations())]


async def _moving(client: FarmClient) -> list[str]:
    return [*await _migrations(client), *await _vms(client)]


async def _operations(client: FarmClient) -> list[str]:
    return [operation.id for operation in reversed(await client.operations.list())]


def vm_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For arguments that name a VM."""
    return _offer(ctx, incomplete, _vms)


def host_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For arguments that name a host."""
    return _offer(ctx, incomplete, _hosts)


def migration_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """For arguments that name a migration, the latest first."""
    return _offer(ctx, incomplete, _migrations)


def migrations_and_vms(ctx: typer.Context, incomplete: str) -> list[str]:
    """For arguments that name a migration by its id or by its VM."""
    return _offer(ctx, incomplete, _moving)


def operation_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """For arguments that name an operation, the latest first."""
    return _offer(ctx, incomplete, _operations)


OperationArgument = Annotated[
    str, typer.Argument(metavar="OPERATION", help="Its id.", autocompletion=operation_ids)
]
