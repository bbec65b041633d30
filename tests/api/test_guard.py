"""Who may do what over HTTP, with tokens; what the audit log says of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from tests.api.daemons import ADDRESS, Daemons, two_daemons

from transhume.api.client import FarmClient
from transhume.api.farm_routes import farm_router
from transhume.api.gate import REASON_HEADER
from transhume.api.permissions import NEEDS
from transhume.farm.audit import AuditLog
from transhume.farm.controller import Controller
from transhume.farm.login_limit import MOST_PER_SOURCE
from transhume.farm.records import FarmRecords
from transhume.farm.rights import Grant, Role
from transhume.farm.user_records import AuditRecord
from transhume.host.config import HostConfig
from transhume.model.errors import Conflict
from transhume.sim.scripted_host import ScriptedHost
from transhume.store.memory import MemoryStore
from transhume.trust.credentials import joining
from transhume.trust.names import CONTROLLER_NAME

ADMIN = Grant(role=Role.ADMIN)


@asynccontextmanager
async def person(d: Daemons, token: str) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody with a token and no certificate, elsewhere."""
    tls = joining(d.authority_pem, CONTROLLER_NAME)
    async with httpx.AsyncClient(
        base_url=f"https://{CONTROLLER_NAME}",
        transport=_ToAlpha(d.alpha_config.port, tls.context),
        headers={"Authorization": f"Bearer {token}", REASON_HEADER: "night%20work"},
    ) as client:
        yield client


class _ToAlpha(httpx.AsyncHTTPTransport):
    def __init__(self, port: int, context: object) -> None:
        super().__init__(verify=context)  # type: ignore[arg-type]
        self._port = port

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["sni_hostname"] = CONTROLLER_NAME
        request.url = request.url.copy_with(host=ADDRESS, port=self._port)
        return await super().handle_async_request(request)


def test_every_route_says_what_it_needs() -> None:
    host = ScriptedHost("alpha")
    config = HostConfig(name="alpha", state_dir=Path("/none"), address="192.0.2.1")
    router = farm_router(Controller(MemoryStore(), lambda _host: host, config))
    found = set()
    for route in router.routes:
        if isinstance(route, APIRoute):
            found |= {(verb, route.path) for verb in route.methods or ()}
        elif isinstance(route, APIWebSocketRoute):
            found.add(("WEBSOCKET", route.path))
    assert found == set(NEEDS)
    assert len(found) == len(router.routes)


async def test_a_role_opens_what_it_should_and_the_rest_is_refused_and_noted() -> None:
    async with two_daemons() as d:
        await d.running_vm("web")
        await d.controller.vms.configure("web", ("team-web",), (), None)
        await d.running_vm("db", "beta")
        users = d.controller.users
        token = (await users.add("ann", Grant(role=Role.OPERATOR, on="team-web"))).token
        async with person(d, token) as ann:
            assert [vm["spec"]["name"] for vm in (await ann.get("/v1/vms")).json()] == ["web"]
            assert (await ann.get("/v1/whoami")).json()["name"] == "ann"
            assert (await ann.post("/v1/vms/web/kill")).status_code == 200
            named = {"options": {"mode": "post-copy", "safe_dir": "/etc"}}
            told = await ann.post("/v1/vms/web/dry-run", json=named)
            assert (told.status_code, "root writes to" in told.json()["detail"]) == (403, True)
            for refused in (
                await ann.post("/v1/vms/db/kill"),
                await ann.get("/v1/vms/db"),
                await ann.get("/v1/vms/no-such"),
                await ann.get("/v1/users"),
                await ann.post("/v1/tokens", json={}),
                await ann.get("/v1/hosts"),
                await ann.get("/v1/no-such"),
            ):
                assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
            assert (await ann.get("/host/v1/ping")).status_code == 401
            assert (await ann.get("/controller/v1/ownership/web")).status_code == 401
        assert (d.alpha.calls + d.beta.calls).count("kill_vm") == 1
        noted = await d.controller.audit.list(user="ann")
        assert [(each.what, each.outcome, each.why) for each in noted][:2] == [
            ("POST /v1/vms/web/kill", "done", "night work"),
            ("POST /v1/vms/db/kill", "refused (403)", "night work"),
        ]
        assert {each.source for each in noted} == {ADDRESS}
        mine = await d.controller.audit.list(user="root@alpha")
        assert (mine[0].what, mine[0].source) == ("POST /v1/vms", "local")


async def test_tokens_that_are_not_good_open_nothing_and_are_limited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with two_daemons() as d:
        users = d.controller.users
        old = (await users.add("ann", ADMIN)).token
        new = (await users.token("ann", 60.0)).token
        stored = json.dumps([entry.value.decode() for entry in await d.store.list("")])
        assert new.partition(".")[2] not in stored
        async with person(d, new) as ann:
            assert (await ann.get("/v1/users")).status_code == 200
        d.later_s = 61.0
        good = (await users.token("ann", keep=True)).token
        stolen = f"bob.{good.partition('.')[2]}"
        wrong = [old, new, stolen, "x", "ann", "../ann.x"]
        for token in (wrong * 3)[:MOST_PER_SOURCE]:
            async with person(d, token) as nobody:
                assert (await nobody.get("/v1/vms")).status_code == 401
        async with person(d, good) as ann:
            late = await ann.get("/v1/vms")
            assert (late.status_code, late.json()["code"]) == (429, "too-many-attempts")
        noted = json.dumps([each.model_dump() for each in await d.controller.audit.list()])
        for token in (old, new, good):
            assert token.partition(".")[2] not in noted + caplog.text


async def test_why_a_change_was_made_is_noted_also_by_way_of_a_member() -> None:
    async with two_daemons() as d:
        async with FarmClient(d.beta_config.api_socket, reason="Lüfter, laut") as client:
            issued = await client.users.add("ann", ADMIN, 60.0)
            await client.users.change_grant("ann", Grant(role=Role.VIEWER), revoke=False)
            noted = await client.users.audit("root@beta", 0.0)
        assert [each.what for each in noted] == ["POST /v1/users", "POST /v1/users/ann/grants"]
        assert {(each.why, each.outcome) for each in noted} == {("Lüfter, laut", "done")}
        assert issued.token not in repr(noted)


async def test_the_last_admin_stays_and_a_removed_user_is_out() -> None:
    async with two_daemons() as d:
        users = d.controller.users
        token = (await users.add("ann", ADMIN)).token
        with pytest.raises(Conflict, match="last admin"):
            await users.remove("ann")
        with pytest.raises(Conflict, match="last admin"):
            await users.revoke("ann", ADMIN)
        await users.add("bob", ADMIN)
        await users.remove("ann")
        async with person(d, token) as ann:
            assert (await ann.get("/v1/whoami")).status_code == 401
        assert [user.name for user in await users.everybody()] == ["bob"]


@pytest.mark.parametrize(
    "path", ["/v1/vms/..%2f..%2fetc/kill", "/v1/vms/../users", "/v1//users", "/v1/users/"]
)
async def test_tricks_with_paths_open_nothing(path: str) -> None:
    async with two_daemons() as d:
        token = (await d.controller.users.add("ann", Grant(role=Role.OPERATOR, on="web"))).token
        async with person(d, token) as ann:
            assert (await ann.get(path)).status_code == 403


async def test_malformed_json_is_refused_in_words() -> None:
    async with two_daemons() as d:
        token = (await d.controller.users.add("ann", ADMIN)).token
        async with person(d, token) as ann:
            answer = await ann.post(
                "/v1/users", content=b'{"name": ', headers={"Content-Type": "application/json"}
            )
            assert (answer.status_code, answer.json()["code"]) == (400, "refused")
            large = await ann.post("/v1/users", content=b" " * (2 << 20))
            assert large.status_code == 413


async def test_the_log_is_bounded_and_refusals_push_no_change_out() -> None:
    log = AuditLog(FarmRecords(MemoryStore()), most=3, most_refusals=2)
    for number in range(6):
        record = AuditRecord(at_s=float(number), who="ann", source="local", what=f"change {number}")
        await log.begin(record)
        await log.refused(record.model_copy(update={"what": f"refusal {number}"}))
    kept = [each.what for each in await log.list()]
    assert sorted(kept) == ["change 3", "change 4", "change 5", "refusal 4", "refusal 5"]
