"""Who is let in, and what is refused before it is read."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

import httpx
import pytest
from tests.api.daemons import ADDRESS, free_port, serving, two_daemons

from transhume.api.controller_client import ControllerClient
from transhume.api.gate import MAX_BODY_BYTES
from transhume.api.host_client import HostClient
from transhume.model.errors import Conflict, NotFound, Refused, Unauthorized


async def test_the_local_socket_is_roots_and_needs_no_proof() -> None:
    async with two_daemons() as d:
        for config in (d.alpha_config, d.beta_config):
            assert stat.S_IMODE(config.api_socket.stat().st_mode) == 0o600
            async with d.near(config) as client:
                assert (await client.ping()).host == config.name
                assert [host.name for host in await client.hosts()] == ["alpha", "beta"]


async def test_over_tcp_a_member_proves_itself() -> None:
    async with two_daemons() as d:
        async with d.far(d.alpha_config, d.beta_credentials) as client:
            assert len(await client.hosts()) == 2
        async with d.stranger(d.alpha_config) as nobody:
            with pytest.raises(Unauthorized, match="demands a certificate of its farm, and none was shown"):
                await nobody.hosts()


async def test_a_console_needs_the_same_proof() -> None:
    async with two_daemons() as d, d.far(d.alpha_config, d.beta_credentials) as client:
        await d.controller.members.remove("beta")

        async def nothing() -> AsyncIterator[bytes]:
            yield b""

        with pytest.raises(Unauthorized):
            await anext(client.console("web", nothing()))
        assert "console" not in d.alpha.calls


async def test_a_member_obeys_the_controller_and_nobody_else() -> None:
    async with two_daemons() as d:
        as_controller = HostClient("beta", ADDRESS, d.beta_config.port, d.alpha_credentials)
        assert (await as_controller.inventory()) == d.beta.inventory_now
        await as_controller.close()
        # A member's certificate opens neither the controller's own host nor another member.
        for name, port, words in (
            ("alpha", d.alpha_config.port, "only the controller may ask this"),
            ("beta", d.beta_config.port, "is not one of a controller"),
        ):
            member = HostClient(name, ADDRESS, port, d.beta_credentials)
            with pytest.raises(Unauthorized, match=words):
                await member.kill_vm("web")
            await member.close()
        # Nor does anybody take one host for another.
        mistaken = HostClient("alpha", ADDRESS, d.beta_config.port, d.alpha_credentials)
        with pytest.raises(Unauthorized, match="shows the certificate of another host"):
            await mistaken.kill_vm("web")
        await mistaken.close()
        assert "kill_vm" not in d.alpha.calls + d.beta.calls


async def test_a_host_speaks_for_itself_only() -> None:
    async with two_daemons() as d:
        client = ControllerClient(d.beta_config)
        with pytest.raises(Unauthorized, match="in the name of host alpha"):
            await client.heartbeat("alpha", d.alpha.inventory_now, {})
        await client.close()


async def test_bodies_over_the_limit_are_refused_unread() -> None:
    async with (
        two_daemons() as d,
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(d.alpha_config.api_socket)), base_url="http://local"
        ) as client,
    ):
        answer = await client.post("/v1/vms", content=b" " * (MAX_BODY_BYTES + 1))
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"

        async def chunks() -> object:
            yield b"{}"

        answer = await client.post("/v1/vms", content=chunks())  # type: ignore[arg-type]
        assert answer.status_code == 411


async def test_what_is_not_known_and_what_is_not_valid_are_problems_in_words() -> None:
    async with (
        two_daemons() as d,
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(d.alpha_config.api_socket)), base_url="http://local"
        ) as client,
    ):
        answer = await client.get("/v2/everything")
        assert (answer.status_code, answer.json()["code"]) == (404, NotFound.code)
        answer = await client.post(
            "/v1/vms", json={"spec": {"name": "Bad Name", "memory_bytes": 5, "cpus": 0}}
        )
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (400, Refused.code)
        for word in ("spec.name", "spec.memory_bytes", "spec.cpus"):
            assert word in problem["detail"]
        answer = await client.post("/v1/vms/web/migrate", json={"options": {"max_downtme_ms": 5}})
        assert "max_downtme_ms" in answer.json()["detail"]
        answer = await client.get("/v1/vms/..%2f..%2fetc")
        assert answer.status_code in (400, 404)


async def test_a_bug_is_reported_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        two_daemons() as d,
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(d.alpha_config.api_socket)), base_url="http://local"
        ) as client,
    ):

        async def broken() -> None:
            raise ZeroDivisionError("the inner secret")

        monkeypatch.setattr(d.controller.members, "hosts", broken)
        answer = await client.get("/v1/hosts")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "inner secret" not in answer.text
        assert "Traceback" not in answer.text


async def test_a_second_daemon_at_the_same_place_is_refused() -> None:
    async with two_daemons() as d:
        with pytest.raises(Conflict, match="is another daemon running"):
            async with serving(
                d.alpha_config.model_copy(update={"state_dir": d.folder / "beta"}),
                d.alpha,
                None,
                d.alpha_credentials,
            ):
                raise AssertionError("served")
        elsewhere = d.alpha_config.model_copy(update={"port": free_port()})
        with pytest.raises(Conflict, match="another daemon answers"):
            async with serving(elsewhere, d.alpha, None, d.alpha_credentials):
                raise AssertionError("served")
        far_away = elsewhere.model_copy(update={"address": "192.0.2.77"})
        with pytest.raises(Refused):
            async with serving(far_away, d.alpha, None, d.alpha_credentials):
                raise AssertionError("served")
        # The daemon that was there first still answers.
        async with d.near(d.alpha_config) as client:
            assert (await client.ping()).host == "alpha"
