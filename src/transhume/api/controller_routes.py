"""What hosts and movers ask of the controller, as HTTP, but for the register (`register_app`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from transhume.api.gate import CALLER, PEER
from transhume.api.schemas import HeartbeatRequest, MigrationId, Name, RenewRequest
from transhume.farm.controller import Controller
from transhume.model.errors import Unauthorized
from transhume.model.migration import Migration
from transhume.model.orders import HeartbeatReply, MigrationUpdate, Renewed
from transhume.trust.names import Peer


def caller(request: Request) -> str | None:
    """The host that proved itself, or None for whoever came through the controller's local socket."""
    name: str | None = request.scope[CALLER]
    return name


Caller = Annotated[str | None, Depends(caller)]


def controller_router(controller: Controller) -> APIRouter:
    """Routes under /controller/v1."""
    router = APIRouter(prefix="/controller/v1")

    @router.get("/migrations/{migration}")
    async def migration(migration: MigrationId) -> Migration:
        return await controller.migration(migration)

    @router.post("/migrations/report", status_code=204)
    async def report(update: MigrationUpdate, who: Caller) -> None:
        _demand_own_word(who, update.host)
        await controller.report(update)

    @router.post("/hosts/{host}/heartbeat")
    async def heartbeat(host: Name, body: HeartbeatRequest, who: Caller) -> HeartbeatReply:
        _demand_own_word(who, host)
        return await controller.heartbeat(host, body.inventory, body.vm_states, body.vm_epochs)

    @router.post("/hosts/{host}/certificate")
    async def renew(host: Name, body: RenewRequest, who: Caller, request: Request) -> Renewed:
        """The host's next certificate, long before the one that it shows here ends."""
        _demand_own_word(who, host)
        peer: Peer | None = request.scope.get(PEER)
        return await controller.renew(host, body.request, peer.serial if peer else "")

    return router


def _demand_own_word(who: str | None, speaks_for: str) -> None:
    if who is not None and who != speaks_for:
        raise Unauthorized(f"host {who} may not report in the name of host {speaks_for}")
