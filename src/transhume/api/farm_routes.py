"""What a person or a program asks of the farm: the routes under /v1, answered by the controller."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, WebSocket
from fastapi.responses import Response, StreamingResponse

from transhume.api.baseline_routes import add_baseline_routes
from transhume.api.beats import with_beats
from transhume.api.console import serve_console
from transhume.api.gate import CALLER, PEER
from transhume.api.guard import Asker, Sight, demand_folder_right
from transhume.api.operation_routes import add_operation_routes
from transhume.api.pool_routes import add_pool_routes
from transhume.api.problem import PROBLEM
from transhume.api.schemas import (
    AuthorityText,
    CreateVmRequest,
    InviteRequest,
    JoinRequest,
    Lines,
    LogText,
    MigrateRequest,
    MigrationId,
    Name,
    ReviveRequest,
    StopVmRequest,
)
from transhume.api.user_routes import add_user_routes
from transhume.farm.controller import Controller
from transhume.farm.events import MigrationEvent
from transhume.farm.members import HostStatus, Invitation, Joined
from transhume.farm.revival import Revival
from transhume.model.errors import Unauthorized
from transhume.model.migration import DryRun, Migration
from transhume.model.orders import Adjustment, CancelReply, ReviveReply
from transhume.model.vm import Vm
from transhume.store.transfer import export_store
from transhume.trust.names import Peer


def farm_router(controller: Controller) -> APIRouter:
    """Routes under /v1."""
    router = APIRouter(prefix="/v1", responses={"default": PROBLEM})
    _add_host_routes(router, controller)
    _add_vm_routes(router, controller)
    _add_vm_io_routes(router, controller)
    _add_migration_routes(router, controller)
    _add_revival_routes(router, controller)
    add_baseline_routes(router, controller)
    add_pool_routes(router, controller)
    add_operation_routes(router, controller)
    add_user_routes(router, controller)
    return router


def _add_host_routes(router: APIRouter, controller: Controller) -> None:
    members = controller.members

    @router.get("/hosts")
    async def hosts() -> list[HostStatus]:
        return await members.hosts()

    @router.post("/tokens")
    async def invite(body: InviteRequest) -> Invitation:
        return await members.invite(body.ttl_s, body.only_for or "")

    @router.get("/authority")
    async def authority() -> AuthorityText:
        """For whoever joins, before it trusts anybody; compared with the token, it needs no proof."""
        return AuthorityText(certificate=members.authority.certificate_pem)

    @router.post("/join")
    async def join(body: JoinRequest) -> Joined:
        return await members.join(body.secret, body.name, body.address, body.port, body.request)

    @router.get("/store")
    async def export(request: Request) -> Response:
        """The farm's records with its secrets: for root on a host that carries a controller, which can read
        them from the store in any case.
        """
        peer: Peer | None = request.scope.get(PEER)
        if request.scope[CALLER] is not None and not (peer is not None and peer.controller):
            raise Unauthorized("the farm's records are for root on a host that carries a controller")
        with tempfile.TemporaryDirectory(prefix="transhume-export-") as folder:
            target = Path(folder) / "farm.jsonl"
            await export_store(controller.store, target)
            content = await asyncio.to_thread(target.read_bytes)
        return Response(content, media_type="application/x-ndjson")

    @router.delete("/hosts/{name}", status_code=204)
    async def remove(name: Name) -> None:
        await members.remove(name)


def _add_vm_routes(router: APIRouter, controller: Controller) -> None:
    vms = controller.vms

    @router.get("/vms")
    async def list_vms(sees: Sight) -> list[Vm]:
        return [vm for vm in await vms.list() if sees(vm.labels)]

    @router.post("/vms", status_code=201)
    async def create_vm(body: CreateVmRequest) -> Vm:
        return await vms.create(
            body.spec, body.host, body.labels, body.reserve, body.restart_elsewhere, body.strict
        )

    @router.get("/vms/{name}")
    async def show_vm(name: Name) -> Vm:
        return await vms.show(name)

    @router.delete("/vms/{name}", status_code=204)
    async def delete_vm(name: Name) -> None:
        await vms.delete(name)

    @router.post("/vms/{name}/start")
    async def start_vm(name: Name, ignore_rules: bool = False) -> Vm:
        return await vms.start(name, ignore_rules)

    @router.post("/vms/{name}/stop")
    async def stop_vm(name: Name, body: StopVmRequest) -> Vm:
        return await vms.stop(name, body.timeout_s)

    @router.post("/vms/{name}/kill")
    async def kill_vm(name: Name) -> Vm:
        return await vms.kill(name)


def _add_vm_io_routes(router: APIRouter, controller: Controller) -> None:
    vms = controller.vms

    @router.get("/vms/{name}/log")
    async def vm_log(name: Name, serial: bool = False, lines: Lines = 100) -> LogText:
        return LogText(text=await vms.log(name, serial, lines))

    @router.get("/vms/{name}/screendump")
    async def screendump(name: Name) -> Response:
        return Response(await vms.screendump(name), media_type="image/png")

    @router.websocket("/vms/{name}/console")
    async def console(websocket: WebSocket, name: Name) -> None:
        await serve_console(websocket, lambda received: vms.console(name, received))


def _add_migration_routes(router: APIRouter, controller: Controller) -> None:
    migrations = controller.migrations

    @router.post("/vms/{name}/migrate", status_code=201)
    async def migrate(name: Name, body: MigrateRequest, caller: Asker) -> Migration:
        demand_folder_right(caller, body.options)
        return await migrations.request(name, body.to, body.options)

    @router.post("/vms/{name}/dry-run")
    async def dry_run(name: Name, body: MigrateRequest, caller: Asker) -> DryRun:
        demand_folder_right(caller, body.options)
        return await migrations.dry_run(name, body.to, body.options)

    @router.get("/migrations")
    async def list_migrations(limit: Annotated[int, Query(ge=1, le=500)] = 100) -> list[Migration]:
        """The latest ones, the oldest of those first."""
        return await migrations.list(limit)

    @router.get("/migrations/{migration}")
    async def show_migration(migration: MigrationId) -> Migration:
        return await migrations.get(migration)

    @router.get("/migrations/{migration}/events")
    async def events(migration: MigrationId, after: Annotated[int, Query(ge=0)] = 0) -> StreamingResponse:
        """One JSON object a line, the last with the outcome; `after` goes on behind a number seen before."""
        await migrations.get(migration)
        return StreamingResponse(
            _lines(migrations.follow(migration, after)), media_type="application/x-ndjson"
        )

    @router.post("/migrations/{reference}/adjust", status_code=204)
    async def adjust(reference: MigrationId, adjustment: Adjustment) -> None:
        """Other limits for a migration under way, or the switch to post-copy. `reference` as below."""
        await migrations.adjust(reference, adjustment)

    @router.post("/migrations/{reference}/cancel")
    async def cancel(reference: MigrationId) -> CancelReply:
        """`reference` is a migration's id or the name of its VM."""
        return await migrations.cancel(reference)


def _add_revival_routes(router: APIRouter, controller: Controller) -> None:
    @router.get("/vms/{name}/revival")
    async def offer_revival(name: Name) -> Revival:
        """What it would mean to take a VM back from a destination that is lost."""
        return await controller.revivals.offer(name, await controller.migrations.of_vm(name))

    @router.post("/vms/{name}/revival")
    async def revive(name: Name, body: ReviveRequest) -> ReviveReply:
        """Take it back, as it was suspended."""
        record = await controller.migrations.of_vm(name)
        return await controller.revivals.carry_out(name, record, body.despite_disks)


async def _lines(events: AsyncIterator[MigrationEvent]) -> AsyncIterator[bytes]:
    async with aclosing(with_beats(events)) as beating:
        async for event in beating:
            yield b"\n" if event is None else event.model_dump_json().encode() + b"\n"
