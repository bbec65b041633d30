"""The register over HTTP without a web framework: a VM stands still while its commit is answered.

    GET  /controller/v1/ping                  a mover keeps its connection warm with it
    GET  /controller/v1/ownership/<vm>        read
    POST /controller/v1/ownership/<vm>/swap   compare and swap

Next to a framework's route this saves about two milliseconds of each downtime. Everything else is passed on.
"""

from __future__ import annotations

import re

from pydantic import ValidationError

from transhume.api.gate import CALLER, App, Receive, Scope, Send
from transhume.api.problem import CONTENT_TYPE, encode_problem
from transhume.api.schemas import SwapRequest
from transhume.farm.controller import Controller
from transhume.model.errors import Refused, TranshumeError

_OWNERSHIP = re.compile(r"/controller/v1/ownership/([a-z0-9-]{1,63})(/swap)?")
_PING = "/controller/v1/ping"


class RegisterApp:
    """Answers the three above for `controller`, and gives the rest to `otherwise`."""

    def __init__(self, controller: Controller, otherwise: App) -> None:
        self._controller = controller
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._otherwise(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        if path == _PING and method == "GET":
            await _answer(send, 204, b"")
            return
        found = _OWNERSHIP.fullmatch(path)
        if found is None or method != ("POST" if found[2] else "GET"):
            await self._otherwise(scope, receive, send)
            return
        try:
            if found[2]:
                body = await self._swap(found[1], await _body(receive), scope.get(CALLER))
            else:
                body = (await self._controller.ownership(found[1])).model_dump_json().encode()
        except TranshumeError as error:
            await _answer(send, error.status, encode_problem(error), CONTENT_TYPE)
            return
        await _answer(send, 200, body)

    async def _swap(self, vm: str, body: bytes, caller: str | None) -> bytes:
        try:
            request = SwapRequest.model_validate_json(body)
        except ValidationError as error:
            raise Refused(f"the swap for VM {vm} is not valid ({error.error_count()} faults)") from error
        if caller is not None:
            await self._controller.demand_may_swap(vm, request.expected, request.wanted, caller)
        reply = await self._controller.swap_ownership(vm, request.expected, request.wanted)
        return reply.model_dump_json().encode()


async def _body(receive: Receive) -> bytes:
    """The whole body; the gate has limited it."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused("the caller left before its request was whole")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _answer(send: Send, status: int, body: bytes, kind: str = "application/json") -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers if status != 204 else []})
    await send({"type": "http.response.body", "body": body})
