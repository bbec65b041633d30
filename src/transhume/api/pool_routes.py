"""What a person or a program asks of the farm as a pool: the pool itself, rules, drains. Part of /v1."""

from __future__ import annotations

from fastapi import APIRouter

from transhume.api.controller_routes import Caller
from transhume.api.guard import Asker, demand_folder_right
from transhume.api.schemas import (
    DrainRequest,
    FarmSettingsRequest,
    FenceRequest,
    GrowVmRequest,
    HostSettingsRequest,
    Name,
    UndrainRequest,
    VmSettingsRequest,
)
from transhume.farm.controller import Controller
from transhume.farm.drain_record import Drain
from transhume.farm.fencing import FenceReport
from transhume.farm.overview import FarmView
from transhume.farm.rulebook import RuleView
from transhume.farm.rules import Rule
from transhume.model.errors import Unauthorized
from transhume.model.vm import Vm


def add_pool_routes(router: APIRouter, controller: Controller) -> None:
    """Add them to the router of /v1."""
    _add_settings_routes(router, controller)
    _add_rule_routes(router, controller)
    _add_fence_routes(router, controller)
    _add_drain_routes(router, controller)


def _add_settings_routes(router: APIRouter, controller: Controller) -> None:
    overview = controller.overview

    @router.get("/farm")
    async def farm() -> FarmView:
        return await overview.view()

    @router.post("/farm/settings", status_code=204)
    async def set_farm(body: FarmSettingsRequest, who: Caller) -> None:
        _demand_controllers_root(who, body.fence_command)
        await overview.configure_farm(body.cpu_overcommit, body.fence_command)

    @router.post("/hosts/{name}/settings", status_code=204)
    async def set_host(name: Name, body: HostSettingsRequest, who: Caller) -> None:
        _demand_controllers_root(who, body.fence_command)
        await overview.configure_host(
            name,
            body.reserve_memory_bytes,
            body.cpu_overcommit,
            body.add_labels,
            body.remove_labels,
            body.fence_command,
        )

    @router.post("/vms/{name}/settings")
    async def set_vm(name: Name, body: VmSettingsRequest) -> Vm:
        return await controller.vms.configure(
            name, body.add_labels, body.remove_labels, body.reserve, body.restart_elsewhere, body.strict
        )

    @router.post("/vms/{name}/memory")
    async def grow_vm(name: Name, body: GrowVmRequest) -> Vm:
        """While it runs it can only grow, up to what it was made for."""
        return await controller.vms.set_memory(name, body.memory_bytes)


def _demand_controllers_root(who: str | None, fence_command: str | None) -> None:
    """The command runs as root on the controller's host: nobody sets it who is not root there already."""
    if who is not None and fence_command is not None:
        raise Unauthorized("a fence command is set on the controller's host and nowhere else")


def _add_fence_routes(router: APIRouter, controller: Controller) -> None:
    fencing = controller.fencing

    @router.get("/hosts/{name}/fence")
    async def show_fence(name: Name) -> FenceReport:
        """Since when the host is lost or fenced, and what becomes of its VMs."""
        return await fencing.show(name)

    @router.post("/hosts/{name}/fence")
    async def fence(name: Name, body: FenceRequest) -> FenceReport:
        """Switch a lost host off and start its marked VMs elsewhere; the answer tells what came of each."""
        return await fencing.fence(name, body.powered_off, body.force)


def _add_rule_routes(router: APIRouter, controller: Controller) -> None:
    rules = controller.rules

    @router.get("/rules")
    async def list_rules() -> list[RuleView]:
        """Each with the VMs and hosts that it means now, and what breaks it."""
        return await rules.list()

    @router.post("/rules", status_code=201)
    async def add_rule(rule: Rule) -> RuleView:
        return await rules.add(rule)

    @router.delete("/rules/{name}", status_code=204)
    async def remove_rule(name: Name) -> None:
        await rules.remove(name)


def _add_drain_routes(router: APIRouter, controller: Controller) -> None:
    drains = controller.drains

    @router.post("/hosts/{name}/drain/plan")
    async def plan(name: Name, body: DrainRequest, caller: Asker) -> Drain:
        """How a drain would go; changes nothing."""
        demand_folder_right(caller, body.options.migration)
        return await drains.plan(name, body.options)

    @router.get("/hosts/{name}/drain")
    async def show(name: Name) -> Drain:
        """The latest drain, or the bringing back of its VMs, with the progress of each."""
        return await drains.show(name)

    @router.post("/hosts/{name}/drain", status_code=201)
    async def begin(name: Name, body: DrainRequest, caller: Asker) -> Drain:
        demand_folder_right(caller, body.options.migration)
        return await drains.begin(name, body.options)

    @router.post("/hosts/{name}/drain/pause")
    async def pause(name: Name) -> Drain:
        return await drains.pause(name)

    @router.post("/hosts/{name}/drain/resume")
    async def resume(name: Name) -> Drain:
        return await drains.resume(name)

    @router.delete("/hosts/{name}/drain")
    async def cancel(name: Name, now: bool = False) -> Drain:
        """What has moved stays. With `now` the migrations under way are cancelled too."""
        return await drains.cancel(name, now)

    @router.post("/hosts/{name}/undrain")
    async def undrain(name: Name, body: UndrainRequest, caller: Asker) -> Drain | None:
        """Let VMs be placed there again; with `restore` the answer tells of their way back."""
        demand_folder_right(caller, body.options.migration)
        return await drains.undrain(name, body.restore, body.options)
