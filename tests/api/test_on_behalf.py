"""Whose word a request is, that one controller passes on to another."""

from __future__ import annotations

import pytest

from transhume.api.gate import CALLER, LOCAL, ON_BEHALF, PEER, Gate, Receive, Scope, Send, on_behalf
from transhume.trust.names import Peer

BETA = Peer("beta", False, "b1")
GAMMA = Peer("gamma", True, "c1")


async def passed(peer: Peer | None, header: str | None) -> Scope:
    """What the application behind the gate sees of a request."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    headers = [] if header is None else [(ON_BEHALF.encode(), header.encode())]
    scope: Scope = {"type": "http", "path": "/v1/vms", "headers": headers, PEER: peer, LOCAL: peer is None}
    await Gate(app, "alpha", lambda _: True)(scope, nothing, nothing)  # type: ignore[arg-type]
    return seen[0]


@pytest.mark.parametrize(
    ("peer", "header", "caller", "serial"),
    [
        (GAMMA, "beta b1", "beta", "b1"),
        (GAMMA, None, "gamma", "c1"),
        (BETA, "gamma c1", "beta", "b1"),
    ],
)
async def test_only_a_controller_speaks_for_others(
    peer: Peer, header: str | None, caller: str, serial: str
) -> None:
    scope = await passed(peer, header)
    assert (scope[CALLER], scope[PEER].serial) == (caller, serial)
    assert on_behalf(scope) == {ON_BEHALF: f"{caller} {serial}"}


async def test_root_on_its_own_host_speaks_for_that_host() -> None:
    scope = await passed(None, "beta b1")
    assert scope[CALLER] is None
    assert on_behalf(scope) == {}
