"""A daemon of a later release adds fields to what it says; this release takes the rest."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from tests.api.daemons import ADDRESS, Daemons, two_daemons

from transhume.api.controller_client import ControllerClient
from transhume.api.http_connection import HttpConnection
from transhume.model.orders import HeartbeatReply
from transhume.trust.names import CONTROLLER_NAME

LATER: dict[str, Any] = {"of_a_later_release": {"nobody": ["knows", 1]}}


async def test_a_heartbeat_with_added_fields_is_taken() -> None:
    async with two_daemons() as d:
        inventory = d.beta.inventory_now.model_copy(update={"memory_available_bytes": 12345 << 12})
        body = {"inventory": {**inventory.model_dump(mode="json"), **LATER}, "vm_states": {}, **LATER}
        status, answer = await _as_beta(d, "POST", "/controller/v1/hosts/beta/heartbeat", body)
        assert status == 200, answer
        async with d.near(d.alpha_config) as client:
            (beta,) = [host for host in await client.hosts() if host.name == "beta"]
        assert beta.inventory == inventory


async def test_what_users_ask_for_is_still_checked_for_misspellings() -> None:
    async with two_daemons() as d:
        status, answer = await _as_beta(d, "POST", "/v1/tokens", {"tll_s": 5})
        assert status >= 400, answer


async def test_replies_with_added_fields_are_taken() -> None:
    """To a heartbeat, and to a ping: a controller of a later release says more than this one knows."""
    reply = json.dumps({"disowned": ["web"], **LATER}).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(reply)}\r\n\r\n"
        writer.write(head.encode() + reply)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with two_daemons() as d:
        # The controller's own host asks over its local socket; here a later release answers there.
        config = d.alpha_config.model_copy(update={"state_dir": d.folder / "later"})
        config.state_dir.mkdir()
        server = await asyncio.start_unix_server(answer, config.api_socket)
        client = ControllerClient(config)
        try:
            given = await client.heartbeat("alpha", d.alpha.inventory_now, {})
            assert given == HeartbeatReply(disowned=("web",))
        finally:
            await client.close()
            server.close()
            await server.wait_closed()


async def _as_beta(d: Daemons, method: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Ask the controller with beta's certificate."""
    tls = partial(d.beta_credentials.client, CONTROLLER_NAME)
    connection = HttpConnection("the controller", (ADDRESS, d.alpha_config.port), tls)
    try:
        return await connection.request(method, path, json.dumps(body).encode(), 10.0)
    finally:
        await connection.close()
