"""A host, seen from the controller over the network: `HostLink` over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from functools import partial

from pydantic import TypeAdapter

from transhume.api.console_client import join_console
from transhume.api.http_calls import HttpCalls
from transhume.api.http_connection import authority
from transhume.api.schemas import LogText, Pong
from transhume.farm.host_link import HostLink
from transhume.model.host import Host, HostInventory
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
from transhume.trust.credentials import Credentials
from transhume.trust.names import server_name

_VM_STATES: TypeAdapter[dict[str, VmState]] = TypeAdapter(dict[str, VmState])

REVIVE_TIMEOUT_S = 75.0
START_TIMEOUT_S = 60.0
"""For what starts a QEMU."""


class HostClient:
    """Satisfies `HostLink`. Whoever answers must show the certificate of this host."""

    def __init__(self, name: str, address: str, port: int, credentials: Credentials) -> None:
        self._target = (address, port)
        self._peer = f"host {name} at {authority(address, port)}"
        self._tls = partial(credentials.client, server_name(name))
        self._calls = HttpCalls(self._peer, self._target, "/host/v1", self._tls)

    async def ping(self) -> Pong:
        return await self._calls.ask("GET", "/ping", Pong, timeout_s=5.0)

    async def inventory(self) -> HostInventory:
        return await self._calls.ask("GET", "/inventory", HostInventory)

    async def resolve_spec(self, spec: VmSpec) -> VmSpec:
        return await self._calls.ask("POST", "/resolve-spec", VmSpec, spec)

    async def start_vm(self, spec: VmSpec) -> None:
        await self._calls.send("POST", "/start-vm", spec, timeout_s=START_TIMEOUT_S)

    async def grow_vm(self, name: str, memory_bytes: int) -> None:
        await self._calls.send("POST", f"/vms/{name}/grow", {"memory_bytes": memory_bytes})

    async def stop_vm(self, name: str, timeout_s: float) -> None:
        await self._calls.send(
            "POST", f"/vms/{name}/stop", {"timeout_s": timeout_s}, timeout_s=timeout_s + 15
        )

    async def kill_vm(self, name: str) -> None:
        await self._calls.send("POST", f"/vms/{name}/kill")

    async def delete_vm(self, name: str) -> None:
        await self._calls.send("DELETE", f"/vms/{name}")

    async def vm_states(self) -> Mapping[str, VmState]:
        return await self._calls.ask("GET", "/vm-states", _VM_STATES)

    async def vm_log(self, name: str, serial: bool, lines: int) -> str:
        params = {"serial": serial, "lines": lines}
        return (await self._calls.ask("GET", f"/vms/{name}/log", LogText, params=params)).text

    def console(self, name: str, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        path = f"/host/v1/vms/{name}/console"
        return join_console(self._peer, self._target, path, self._tls, received)

    async def screendump(self, name: str) -> bytes:
        return await self._calls.send("GET", f"/vms/{name}/screendump")

    async def source_facts(self, vm: str) -> SourceFacts:
        return await self._calls.ask("GET", f"/vms/{vm}/source-facts", SourceFacts)

    async def destination_facts(self, spec: VmSpec) -> DestinationFacts:
        return await self._calls.ask("POST", "/destination-facts", DestinationFacts, spec)

    async def probe_folder(self, order: FolderProbe) -> FolderFacts:
        return await self._calls.ask("POST", "/probe-folder", FolderFacts, order)

    async def sample_dirty_rate(self, vm: str, duration_s: float) -> DirtySample:
        body = {"duration_s": duration_s}
        path = f"/vms/{vm}/sample-dirty-rate"
        return await self._calls.ask("POST", path, DirtySample, body, timeout_s=duration_s + 30)

    async def prepare(self, order: PrepareOrder) -> Prepared:
        return await self._calls.ask(
            "POST", "/migrations/prepare", Prepared, order, timeout_s=START_TIMEOUT_S
        )

    async def begin(self, order: BeginOrder) -> None:
        await self._calls.send("POST", "/migrations/begin", order, timeout_s=START_TIMEOUT_S)

    async def cancel(self, migration: str) -> CancelReply:
        return await self._calls.ask("POST", f"/migrations/{migration}/cancel", CancelReply)

    async def adjust(self, migration: str, adjustment: Adjustment) -> AdjustReply:
        return await self._calls.ask("POST", f"/migrations/{migration}/adjust", AdjustReply, adjustment)

    async def revive(self, migration: str) -> ReviveReply:
        return await self._calls.ask(
            "POST", f"/migrations/{migration}/revive", ReviveReply, timeout_s=REVIVE_TIMEOUT_S
        )

    async def abandon(self, migration: str) -> None:
        await self._calls.send("POST", f"/migrations/{migration}/abandon")

    async def close(self) -> None:
        await self._calls.close()


class HostLinks:
    """The ways to all hosts, for the controller: its own host directly, the others over HTTP, kept open."""

    def __init__(self, own_name: str, own: HostLink, credentials: Credentials) -> None:
        self._own_name = own_name
        self._own = own
        self._credentials = credentials
        self._clients: dict[tuple[str, str, int], HostClient] = {}

    def __call__(self, host: Host) -> HostLink:
        if host.name == self._own_name:
            return self._own
        key = (host.name, host.address, host.port)
        if key not in self._clients:
            self._clients[key] = HostClient(*key, self._credentials)
        return self._clients[key]

    async def close(self) -> None:
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()
