"""The farm as a pool, seen from a program: `FarmClient.pool`."""

from __future__ import annotations

from pydantic import TypeAdapter

from transhume.api.http_calls import HttpCalls, part
from transhume.farm.drain_record import Drain, DrainOptions
from transhume.farm.fencing import FenceReport
from transhume.farm.overview import FarmView
from transhume.farm.rulebook import RuleView
from transhume.farm.rules import Rule
from transhume.model.vm import Vm

_RULES: TypeAdapter[list[RuleView]] = TypeAdapter(list[RuleView])
_MAYBE_DRAIN: TypeAdapter[Drain | None] = TypeAdapter(Drain | None)

PLAN_TIMEOUT_S = 120.0
"""A plan asks every VM's host, and the hosts that it may go to."""

FENCE_TIMEOUT_S = 600.0
"""The fence command has a limit of its own; after it every marked VM is started."""


class PoolClient:
    """The verbs of the pool. Raises the errors of `transhume.model.errors`."""

    def __init__(self, calls: HttpCalls) -> None:
        self._calls = calls

    async def view(self) -> FarmView:
        """What the farm has, what is promised, and whether it could lose a host."""
        return await self._calls.ask("GET", "/v1/farm", FarmView)

    async def set_farm(self, cpu_overcommit: float | None = None, fence_command: str | None = None) -> None:
        """What is None stays as it is."""
        body: dict[str, object] = {"cpu_overcommit": cpu_overcommit}
        if fence_command is not None:
            body["fence_command"] = fence_command
        await self._calls.send("POST", "/v1/farm/settings", body)

    async def fence_report(self, host: str) -> FenceReport:
        """Since when a host is lost or fenced, and what becomes of its VMs."""
        return await self._calls.ask("GET", f"/v1/hosts/{part(host)}/fence", FenceReport)

    async def fence(self, host: str, powered_off: bool = False, force: bool = False) -> FenceReport:
        """Switch a lost host off, or say that it is, and start its marked VMs elsewhere."""
        body = {"powered_off": powered_off, "force": force}
        path = f"/v1/hosts/{part(host)}/fence"
        return await self._calls.ask("POST", path, FenceReport, body, timeout_s=FENCE_TIMEOUT_S)

    async def set_host(
        self,
        name: str,
        reserve_memory_bytes: int | None = None,
        cpu_overcommit: float | None = None,
        add_labels: tuple[str, ...] = (),
        remove_labels: tuple[str, ...] = (),
        fence_command: str | None = None,
    ) -> None:
        """What is None stays as it is."""
        body: dict[str, object] = {
            "reserve_memory_bytes": reserve_memory_bytes,
            "cpu_overcommit": cpu_overcommit,
            "add_labels": add_labels,
            "remove_labels": remove_labels,
        }
        if fence_command is not None:
            body["fence_command"] = fence_command
        await self._calls.send("POST", f"/v1/hosts/{part(name)}/settings", body)

    async def set_vm(
        self,
        name: str,
        add_labels: tuple[str, ...] = (),
        remove_labels: tuple[str, ...] = (),
        reserve: bool | None = None,
        restart_elsewhere: bool | None = None,
        strict: bool | None = None,
    ) -> Vm:
        """What is None stays as it is."""
        body: dict[str, object] = {
            "add_labels": add_labels,
            "remove_labels": remove_labels,
            "reserve": reserve,
        }
        if restart_elsewhere is not None:
            body["restart_elsewhere"] = restart_elsewhere
        if strict is not None:
            body["strict"] = strict
        return await self._calls.ask("POST", f"/v1/vms/{part(name)}/settings", Vm, body)

    async def set_vm_memory(self, name: str, memory_bytes: int) -> Vm:
        """All the RAM that a VM shall have. While it runs it can only grow, up to what it was made for."""
        body = {"memory_bytes": memory_bytes}
        return await self._calls.ask("POST", f"/v1/vms/{part(name)}/memory", Vm, body)

    async def rules(self) -> list[RuleView]:
        return await self._calls.ask("GET", "/v1/rules", _RULES)

    async def add_rule(self, rule: Rule) -> RuleView:
        """Raises `PreflightFailed` when nothing could ever satisfy it, with the reasons."""
        return await self._calls.ask("POST", "/v1/rules", RuleView, rule)

    async def remove_rule(self, name: str) -> None:
        await self._calls.send("DELETE", f"/v1/rules/{part(name)}")

    async def plan_drain(self, host: str, options: DrainOptions) -> Drain:
        """How a drain would go; changes nothing."""
        return await self._drain("POST", host, "/plan", options)

    async def begin_drain(self, host: str, options: DrainOptions) -> Drain:
        return await self._drain("POST", host, "", options)

    async def drain(self, host: str) -> Drain:
        """The latest one of a host, or the bringing back of its VMs."""
        return await self._calls.ask("GET", f"/v1/hosts/{part(host)}/drain", Drain)

    async def pause_drain(self, host: str) -> Drain:
        return await self._calls.ask("POST", f"/v1/hosts/{part(host)}/drain/pause", Drain)

    async def resume_drain(self, host: str) -> Drain:
        return await self._calls.ask("POST", f"/v1/hosts/{part(host)}/drain/resume", Drain)

    async def cancel_drain(self, host: str, now: bool = False) -> Drain:
        """What has moved stays; with `now` the migrations under way are cancelled too."""
        path = f"/v1/hosts/{part(host)}/drain"
        return await self._calls.ask("DELETE", path, Drain, params={"now": now}, timeout_s=PLAN_TIMEOUT_S)

    async def undrain(self, host: str, restore: bool, options: DrainOptions) -> Drain | None:
        """Let VMs be placed on the host again; with `restore` their way back, else None."""
        body = {"restore": restore, "options": options.model_dump(mode="json")}
        path = f"/v1/hosts/{part(host)}/undrain"
        return await self._calls.ask("POST", path, _MAYBE_DRAIN, body, timeout_s=PLAN_TIMEOUT_S)

    async def _drain(self, method: str, host: str, verb: str, options: DrainOptions) -> Drain:
        body = {"options": options.model_dump(mode="json")}
        path = f"/v1/hosts/{part(host)}/drain{verb}"
        return await self._calls.ask(method, path, Drain, body, timeout_s=PLAN_TIMEOUT_S)
