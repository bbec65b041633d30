"""The controller, seen from a host or a mover over the network: `ControllerLink` on light connections.

A mover imports this, so it stays away from web frameworks. Reports and the register have a connection
each: the commit of a migration never waits behind a report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from transhume.api.http_connection import HttpConnection, Target, authority
from transhume.api.problem import from_problem
from transhume.host.config import HostConfig
from transhume.model.errors import HostLost, PeerProtocolError
from transhume.model.host import HostInventory
from transhume.model.migration import Migration
from transhume.model.orders import HeartbeatReply, MigrationUpdate, Renewed, SwapReply
from transhume.model.vm import Ownership, VmState
from transhume.trust.credentials import Credentials
from transhume.trust.names import CONTROLLER_NAME

Answer = TypeVar("Answer", bound=BaseModel)

ANSWER_TIMEOUT_S = 10.0


class ControllerClient:
    """Satisfies `ControllerLink`. On a host that carries a controller it uses the local socket.

    With a cluster as the farm's store there are other controllers. When one does not answer, the next request
    goes to the next; the one that was lost is not said again, for it may have been carried out.
    """

    def __init__(self, config: HostConfig, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._timeout_s = answer_timeout_s
        self._config = config
        self._tls = partial(Credentials(config.files).client, CONTROLLER_NAME)
        self._losses = 0
        self._register, self._reports = self._connections()

    @property
    def _peer(self) -> str:
        target = self._target()
        return f"the controller at {target if isinstance(target, Path) else authority(*target)}"

    def _target(self) -> Target:
        """The one whose turn it is."""
        config = self._config
        if not config.carries_controller:
            return (config.controller_address, config.controller_port)
        targets: list[Target] = [config.api_socket, *_others(config)]
        return targets[self._losses % len(targets)]

    def _connections(self) -> tuple[HttpConnection, HttpConnection]:
        target = self._target()
        tls = None if isinstance(target, Path) else self._tls
        return HttpConnection(self._peer, target, tls), HttpConnection(self._peer, target, tls)

    async def _ask_next(self, lost: HttpConnection) -> None:
        """From now on ask another controller, unless that was decided by another request meanwhile."""
        if lost not in (self._register, self._reports) or not self._config.on_cluster:
            return
        self._losses += 1
        before = self._register, self._reports
        self._register, self._reports = self._connections()
        for connection in before:
            if connection is not lost:
                await connection.retire()

    async def ping(self) -> None:
        """Open and warm the connection on which the register is asked. `HostLost` when nobody answers."""
        await self._ask(self._register, "GET", "/ping")

    async def ownership(self, vm: str) -> Ownership:
        return _parse(Ownership, await self._ask(self._register, "GET", f"/ownership/{vm}"), self._peer)

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        body = f'{{"expected":{expected.model_dump_json()},"wanted":{wanted.model_dump_json()}}}'.encode()
        answer = await self._ask(self._register, "POST", f"/ownership/{vm}/swap", body)
        return _parse(SwapReply, answer, self._peer)

    async def migration(self, migration: str) -> Migration:
        return _parse(
            Migration, await self._ask(self._reports, "GET", f"/migrations/{migration}"), self._peer
        )

    async def report(self, update: MigrationUpdate) -> None:
        await self._ask(self._reports, "POST", "/migrations/report", update.model_dump_json().encode())

    async def renew(self, host: str, request_pem: str) -> Renewed:
        body = json.dumps({"request": request_pem}).encode()
        answer = await self._ask(self._reports, "POST", f"/hosts/{host}/certificate", body)
        return _parse(Renewed, answer, self._peer)

    async def heartbeat(
        self,
        host: str,
        inventory: HostInventory,
        vm_states: Mapping[str, VmState],
        vm_epochs: Mapping[str, int] | None = None,
    ) -> HeartbeatReply:
        body = {
            "inventory": inventory.model_dump(mode="json"),
            "vm_states": dict(vm_states),
            "vm_epochs": dict(vm_epochs or {}),
        }
        path = f"/hosts/{host}/heartbeat"
        answer = await self._ask(self._reports, "POST", path, json.dumps(body).encode())
        return _parse(HeartbeatReply, answer, self._peer)

    async def close(self) -> None:
        await self._register.close()
        await self._reports.close()

    async def _ask(
        self, connection: HttpConnection, method: str, path: str, body: bytes | None = None
    ) -> bytes:
        try:
            status, answer = await connection.request(method, f"/controller/v1{path}", body, self._timeout_s)
        except HostLost:
            await self._ask_next(connection)
            raise
        if status >= 400:
            raise from_problem(status, answer, self._peer)
        return answer


def _others(config: HostConfig) -> list[Target]:
    """The farm's other controllers, as the daemon knew them last."""
    if not config.on_cluster:
        return []
    try:
        found = json.loads(config.controllers_file.read_text())
        return [(str(address), int(port)) for address, port in found]
    except (OSError, ValueError, TypeError):
        return []


def _parse(kind: type[Answer], answer: bytes, peer: str) -> Answer:
    try:
        return kind.model_validate_json(answer)
    except ValidationError as error:
        raise PeerProtocolError(
            f"{peer} sent what is no {kind.__name__}; is it of another release?"
        ) from error
