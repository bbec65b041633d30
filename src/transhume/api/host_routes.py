"""What the controller asks of this host, as HTTP: `HostLink`, method by method."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket
from fastapi.responses import Response

from transhume import __version__
from transhume.api.console import serve_console
from transhume.api.schemas import (
    GrowVmRequest,
    Lines,
    LogText,
    MigrationId,
    Name,
    Pong,
    SampleRequest,
    StopVmRequest,
)
from transhume.farm.host_link import HostLink
from transhume.host.config import HostConfig
from transhume.model.host import HostInventory
from transhume.model.orders import (
    Adjustment,
    AdjustReply,
    BeginOrder,
    CancelReply,
    DestinationFacts,
    DirtySample,
    FolderFacts,
    FolderProbe,
    Prepared,
    PrepareOrder,
    ReviveReply,
    SourceFacts,
)
from transhume.model.vm import VmSpec, VmState


def host_router(config: HostConfig, host: HostLink) -> APIRouter:
    """Routes under /host/v1."""
    router = APIRouter(prefix="/host/v1")

    @router.get("/ping")
    async def ping() -> Pong:
        return Pong(host=config.name, carries_controller=config.carries_controller, version=__version__)

    @router.get("/inventory")
    async def inventory() -> HostInventory:
        return await host.inventory()

    _add_vm_routes(router, host)
    _add_migration_routes(router, host)
    return router


def _add_vm_routes(router: APIRouter, host: HostLink) -> None:
    @router.get("/vm-states")
    async def vm_states() -> dict[str, VmState]:
        return dict(await host.vm_states())

    @router.post("/resolve-spec")
    async def resolve_spec(spec: VmSpec) -> VmSpec:
        return await host.resolve_spec(spec)

    @router.post("/start-vm", status_code=204)
    async def start_vm(spec: VmSpec) -> None:
        await host.start_vm(spec)

    @router.post("/vms/{name}/grow", status_code=204)
    async def grow_vm(name: Name, body: GrowVmRequest) -> None:
        await host.grow_vm(name, body.memory_bytes)

    @router.post("/vms/{name}/stop", status_code=204)
    async def stop_vm(name: Name, body: StopVmRequest) -> None:
        await host.stop_vm(name, body.timeout_s)

    @router.post("/vms/{name}/kill", status_code=204)
    async def kill_vm(name: Name) -> None:
        await host.kill_vm(name)

    @router.delete("/vms/{name}", status_code=204)
    async def delete_vm(name: Name) -> None:
        await host.delete_vm(name)

    @router.get("/vms/{name}/log")
    async def vm_log(name: Name, serial: bool = False, lines: Lines = 100) -> LogText:
        return LogText(text=await host.vm_log(name, serial, lines))

    @router.get("/vms/{name}/screendump")
    async def screendump(name: Name) -> Response:
        return Response(await host.screendump(name), media_type="image/png")

    @router.websocket("/vms/{name}/console")
    async def console(websocket: WebSocket, name: Name) -> None:
        await serve_console(websocket, lambda received: host.console(name, received))


def _add_migration_routes(router: APIRouter, host: HostLink) -> None:
    @router.get("/vms/{name}/source-facts")
    async def source_facts(name: Name) -> SourceFacts:
        return await host.source_facts(name)

    @router.post("/destination-facts")
    async def destination_facts(spec: VmSpec) -> DestinationFacts:
        return await host.destination_facts(spec)

    @router.post("/probe-folder")
    async def probe_folder(order: FolderProbe) -> FolderFacts:
        return await host.probe_folder(order)

    @router.post("/vms/{name}/sample-dirty-rate")
    async def sample_dirty_rate(name: Name, body: SampleRequest) -> DirtySample:
        return await host.sample_dirty_rate(name, body.duration_s)

    @router.post("/migrations/prepare")
    async def prepare(order: PrepareOrder) -> Prepared:
        return await host.prepare(order)

    @router.post("/migrations/begin", status_code=204)
    async def begin(order: BeginOrder) -> None:
        await host.begin(order)

    @router.post("/migrations/{migration}/cancel")
    async def cancel(migration: MigrationId) -> CancelReply:
        return await host.cancel(migration)

    @router.post("/migrations/{migration}/adjust")
    async def adjust(migration: MigrationId, adjustment: Adjustment) -> AdjustReply:
        return await host.adjust(migration, adjustment)

    @router.post("/migrations/{migration}/revive")
    async def revive(migration: MigrationId) -> ReviveReply:
        return await host.revive(migration)

    @router.post("/migrations/{migration}/abandon", status_code=204)
    async def abandon(migration: MigrationId) -> None:
        await host.abandon(migration)
