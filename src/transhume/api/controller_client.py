"""The controller, seen from a host or a mover over the network: `ControllerLink` on light connections.

A mover imports this, so it stays away from web frameworks. Reports and the register have a connection
each: the commit of a migration never waits behind a report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from transhume.api.http_connection import HttpConnection, Target, authority
from transhume.api.problem import from_problem
from transhume.host.config import HostConfig
from transhume.model.errors import PeerProtocolError
from transhume.model.host import HostInventory
from transhume.model.migration import Migration
from transhume.model.orders import HeartbeatReply, MigrationUpdate, Renewed, SwapReply
from transhume.model.vm import Ownership, VmState
from transhume.trust.credentials import Credentials
from transhume.trust.names import CONTROLLER_NAME

Answer = TypeVar("Answer", bound=BaseModel)

ANSWER_TIMEOUT_S = 10.0


class ControllerClient:
    """Satisfies `ControllerLink`. On the controller's own host it uses the local socket."""

    def __init__(self, config: HostConfig, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._timeout_s = answer_timeout_s
        target: Target
        if config.carries_controller:
            target, where = config.api_socket, str(config.api_socket)
        else:
            target = (config.controller_address, config.controller_port)
            where = authority(*target)
        self._peer = f"the controller at {where}"
        tls = (
            None if config.carries_controller else partial(Credentials(config.files).client, CONTROLLER_NAME)
        )
        self._register = HttpConnection(self._peer, target, tls)
        self._reports = HttpConnection(self._peer, target, tls)

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
        self, host: str, inventory: HostInventory, vm_states: Mapping[str, VmState]
    ) -> HeartbeatReply:
        body = {"inventory": inventory.model_dump(mode="json"), "vm_states": vm_states}
        path = f"/hosts/{host}/heartbeat"
        answer = await self._ask(self._reports, "POST", path, json.dumps(body).encode())
        return _parse(HeartbeatReply, answer, self._peer)

    async def close(self) -> None:
        await self._register.close()
        await self._reports.close()

    async def _ask(
        self, connection: HttpConnection, method: str, path: str, body: bytes | None = None
    ) -> bytes:
        status, answer = await connection.request(method, f"/controller/v1{path}", body, self._timeout_s)
        if status >= 400:
            raise from_problem(status, answer, self._peer)
        return answer


def _parse(kind: type[Answer], answer: bytes, peer: str) -> Answer:
    try:
        return kind.model_validate_json(answer)
    except ValidationError as error:
        raise PeerProtocolError(
            f"{peer} sent what is no {kind.__name__}; is it of another release?"
        ) from error
