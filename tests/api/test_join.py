"""How a server becomes a host, and every way in which it must not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
import ssl
import stat
import time
from pathlib import Path

import pytest
from tests.api.daemons import ADDRESS, Daemons, two_daemons
from tests.trust.identities import credentials, new_authority, serial_of

from transhume.api.controller_client import ControllerClient
from transhume.api.host_client import HostClient
from transhume.host.certificate import CertificateKeeper
from transhume.host.config import HostConfig
from transhume.model.errors import Conflict, PeerProtocolError, Refused, Unauthorized
from transhume.trust.certificates import BACKDATED_S, HOST_LIFETIME_S
from transhume.trust.credentials import Credentials
from transhume.trust.token import Token


def untouched(config: HostConfig) -> bool:
    return not config.files.identity.exists() and not config.files.authority.exists()


async def test_a_token_lets_one_host_in_once() -> None:
    async with two_daemons() as d:
        gamma, delta = d.config("gamma"), d.config("delta")
        token = (await d.controller.members.invite()).token
        with pytest.raises(Conflict, match="the farm has a host beta already"):
            await d.join(d.beta_config.model_copy(update={"state_dir": gamma.state_dir}), token)
        joined = await d.join(gamma, token)
        assert joined.controller == "alpha"
        assert stat.S_IMODE(gamma.files.identity.stat().st_mode) == 0o600
        async with d.far(d.alpha_config, Credentials(gamma.files)) as client:
            assert [host.name for host in await client.hosts()] == ["alpha", "beta"]
        with pytest.raises(Unauthorized, match="was used already, by host gamma") as replayed:
            await d.join(delta, token)
        assert "transhume host remove gamma" in replayed.value.message
        assert untouched(delta)


async def test_tokens_that_are_wrong_or_expired_are_refused_in_words() -> None:
    async with two_daemons() as d:
        gamma = d.config("gamma")
        fingerprint = d.controller.members.authority.fingerprint
        with pytest.raises(Unauthorized, match="does not know this token; `transhume token` on alpha"):
            await d.join(gamma, str(Token.make(fingerprint)))
        invitation = await d.controller.members.invite()
        d.later_s = 3601.0
        with pytest.raises(Unauthorized, match="the token has expired"):
            await d.join(gamma, invitation.token)
        for part in (invitation.token[:-2], invitation.token[4:], "", "th1..", f"th1.{'x' * 32}.%%"):
            with pytest.raises(Refused, match="not a whole token"):
                Token.parse(part)
        assert untouched(gamma)


async def test_a_controller_of_another_farm_never_hears_the_secret() -> None:
    async with two_daemons() as d:
        seen: list[str] = []
        invitation = await d.controller.members.invite()
        secret = Token.parse(invitation.token).secret
        elsewhere = Token(secret, b"\0" * 32)
        original = d.controller.members.join

        async def overheard(*arguments: object) -> object:
            seen.append(str(arguments))
            return await original(*arguments)  # type: ignore[arg-type]

        d.controller.members.join = overheard  # type: ignore[assignment,method-assign]
        gamma = d.config("gamma")
        with pytest.raises(Unauthorized, match=r"another fingerprint.*the token was not sent"):
            await d.join(gamma, str(elsewhere))
        assert not seen
        await d.join(gamma, invitation.token)
        assert secret in seen[0]


async def test_a_member_that_plays_the_controller_never_hears_the_secret(tmp_path: Path) -> None:
    """It can show the right authority, which is no secret, and a certificate of it; but no controller's."""
    async with two_daemons() as d:
        heard = bytearray()

        async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                heard.extend(await reader.readuntil(b"\r\n\r\n"))
            except (EOFError, OSError):
                return
            body = json.dumps({"certificate": d.authority_pem}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            writer.transport.abort()

        server = await asyncio.start_server(play, ADDRESS, 0, ssl=d.beta_credentials.server())
        async with server:
            gamma = d.config("gamma")
            token = (await d.controller.members.invite()).token
            played = d.alpha_config.model_copy(update={"port": server.sockets[0].getsockname()[1]})
            d.alpha_config = played
            with pytest.raises(Unauthorized, match="shows the certificate of another host"):
                await d.join(gamma, token)
        assert Token.parse(token).secret.encode() not in heard
        assert heard.startswith(b"GET /v1/authority")


async def test_a_removed_hosts_certificate_opens_nothing_at_once() -> None:
    async with two_daemons() as d, d.far(d.alpha_config, d.beta_credentials) as client:
        assert len(await client.hosts()) == 2
        await d.controller.members.remove("beta")
        # Also on the connection that was open already.
        with pytest.raises(Unauthorized, match="was revoked"):
            await client.hosts()
        link = ControllerClient(d.beta_config)
        with pytest.raises(Unauthorized, match="a host that was removed must join again"):
            await link.heartbeat("beta", d.beta.inventory_now, {})
        with pytest.raises(Unauthorized):
            await link.renew("beta", "")
        await link.close()
        # Under the same name it is a new host: what the old one had stays revoked.
        again = d.config("again").model_copy(update={"name": "beta"})
        await d.join(again)
        with pytest.raises(Unauthorized, match="was revoked"):
            await client.hosts()
        async with d.far(d.alpha_config, Credentials(again.files)) as renewed:
            assert await renewed.hosts()


async def test_a_certificate_of_another_farm_is_refused_by_both_ends(tmp_path: Path) -> None:
    async with two_daemons() as d:
        ours = new_authority("f2")
        ours_of_that_farm = type(ours)("", d.authority_pem)
        foreign = credentials(tmp_path / "1", ours, "beta", trusting=ours_of_that_farm)
        async with d.far(d.alpha_config, foreign) as client:
            with pytest.raises(Unauthorized, match="does not take this host's certificate: it is of another"):
                await client.hosts()
        whole = credentials(tmp_path / "2", ours, "beta")
        async with d.far(d.alpha_config, whole) as client:
            with pytest.raises(Unauthorized, match="a certificate that is not of this farm"):
                await client.hosts()


@pytest.mark.parametrize(
    ("clock_s", "words"),
    [
        (BACKDATED_S + 3600, "it is not valid yet by that host's clock"),
        (-HOST_LIFETIME_S - 60, "it has expired by that host's clock; compare the clocks"),
    ],
)
async def test_clocks_that_are_days_off_are_told(clock_s: float, words: str) -> None:
    async with two_daemons() as d:
        d.later_s = clock_s
        gamma = d.config("gamma")
        await d.join(gamma)  # signed by that clock, and not sound by this one
        async with d.far(d.alpha_config, Credentials(gamma.files)) as client:
            with pytest.raises(Unauthorized, match=words):
                await client.hosts()


async def test_clocks_that_are_hours_off_disturb_nothing() -> None:
    for off_s in (-12 * 3600.0, 12 * 3600.0):
        async with two_daemons() as d:
            d.later_s = off_s
            gamma = d.config("gamma")
            await d.join(gamma)
            async with d.far(d.alpha_config, Credentials(gamma.files)) as client:
                assert len(await client.hosts()) == 2


async def test_plain_text_and_older_tls_get_nothing() -> None:
    async with two_daemons() as d:
        where = (ADDRESS, d.alpha_config.port)
        for said in (b"GET /v1/hosts HTTP/1.1\r\nHost: farm\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70000)):
            assert b"HTTP" not in await asyncio.to_thread(_answer_to, where, said)
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            await asyncio.to_thread(_speak_older_tls, where)
        async with d.far(d.alpha_config, d.beta_credentials) as client:
            assert len(await client.hosts()) == 2


def _answer_to(where: tuple[str, int], said: bytes) -> bytes:
    """What a daemon answers: at most an alert of TLS."""
    with socket.create_connection(where, timeout=20) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(said)
        return sock.recv(4096)
    return b""


def _speak_older_tls(where: tuple[str, int]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(where, timeout=20) as sock:
        context.wrap_socket(sock).close()


async def test_a_daemon_that_speaks_no_tls_is_told(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, ADDRESS, 0) as server:
        mine = credentials(tmp_path, new_authority(), "alpha", controller=True)
        client = HostClient("beta", ADDRESS, server.sockets[0].getsockname()[1], mine)
        with pytest.raises(PeerProtocolError, match=r"does not speak TLS 1\.3"):
            await client.inventory()
        await client.close()


async def test_a_certificate_renews_itself_and_the_old_one_holds_on() -> None:
    async with two_daemons() as d:
        keeper = CertificateKeeper(d.beta_config.files, "beta", controller=False)
        link = ControllerClient(d.beta_config)
        before = d.beta_config.files.identity.read_text()
        assert not await keeper.look(link, time.time() + HOST_LIFETIME_S * 2 / 3 - 60)
        assert d.beta_config.files.identity.read_text() == before
        assert await keeper.look(link, time.time() + HOST_LIFETIME_S * 2 / 3 + 60)
        after = d.beta_config.files.identity.read_text()
        assert after != before
        assert after.split("-----END PRIVATE KEY-----")[0] != before.split("-----END PRIVATE KEY-----")[0]
        # The connection that was open, with the old one, and a new one with the new one.
        await link.ping()
        await link.heartbeat("beta", d.beta.inventory_now, {})
        await link.close()
        await link.heartbeat("beta", d.beta.inventory_now, {})
        for text in (before, after):
            certificate = text[text.index("-----BEGIN CERT") :]
            assert d.controller.members.admits("beta", serial_of(certificate))
        await link.close()


async def test_answers_to_renewals_may_be_lost_again_and_again() -> None:
    async with two_daemons() as d:
        keeper = CertificateKeeper(d.beta_config.files, "beta", controller=False)
        link = ControllerClient(d.beta_config)
        before = d.beta_config.files.identity.read_text()
        for _ in range(6):
            assert await keeper.look(link, time.time() + HOST_LIFETIME_S)
            key, _, rest = before.partition("-----BEGIN CERT")
            d.beta_config.files.write(key, f"-----BEGIN CERT{rest}", d.authority_pem)
        await link.close()
        await link.heartbeat("beta", d.beta.inventory_now, {})
        await link.close()


async def test_a_host_renews_for_itself_only_and_a_broken_request_is_refused() -> None:
    async with two_daemons() as d:
        link = ControllerClient(d.beta_config)
        with pytest.raises(Unauthorized, match="in the name of host alpha"):
            await link.renew("alpha", "")
        for request in ("", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
            with pytest.raises(Refused, match="the request for a certificate"):
                await link.renew("beta", request)
        await link.close()


async def test_a_member_may_join_once_more_with_a_token_of_its_own() -> None:
    """After a long absence, or when its key was seen by others."""
    async with two_daemons() as d, d.far(d.alpha_config, d.beta_credentials) as before:
        assert await before.hosts()
        members = d.controller.members
        token = (await members.invite(only_for="beta")).token
        with pytest.raises(Unauthorized, match="is for host beta and no other"):
            await d.join(d.config("gamma"), token)
        stolen = credentials_copy(d)
        await d.join(d.beta_config, token)
        beta = next(host for host in await members.hosts() if host.name == "beta")
        assert beta.inventory == d.beta.inventory_now
        async with d.far(d.alpha_config, stolen) as client:
            with pytest.raises(Unauthorized, match="was revoked"):
                await client.hosts()
        async with d.far(d.alpha_config, d.beta_credentials) as client:
            assert len(await client.hosts()) == 2
        with pytest.raises(Refused, match="the farm has no host nobody"):
            await members.invite(only_for="nobody")


def credentials_copy(d: Daemons) -> Credentials:
    """Beta's files as they are now, elsewhere."""
    elsewhere = d.config("elsewhere")
    for name in ("identity.pem", "authority.pem"):
        (elsewhere.state_dir / name).write_bytes((d.beta_config.state_dir / name).read_bytes())
    return Credentials(elsewhere.files)


async def test_no_key_and_no_secret_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with two_daemons() as d:
        token = (await d.controller.members.invite()).token
        gamma = d.config("gamma")
        await d.join(gamma, token)
        async with d.far(d.alpha_config, d.beta_credentials) as client:
            told = [await client._calls.send("GET", path) for path in ("/v1/hosts", "/v1/authority")]
        kept = [entry.value for entry in await d.store.list("")]
        body = _body_of(gamma)
        farm_key = (await d.controller.members._records.authority()).record.key_pem  # type: ignore[union-attr]
        for text in [*told, caplog.text.encode()]:
            assert b"PRIVATE" not in text
            assert body not in text
        assert Token.parse(token).secret.encode() not in caplog.text.encode() + b"".join(kept)
        assert body not in b"".join(kept)
        assert farm_key not in repr(await d.controller.members._records.authority())


def _body_of(config: HostConfig) -> bytes:
    lines = config.files.identity.read_text().splitlines()
    assert lines[0] == "-----BEGIN PRIVATE KEY-----"
    assert base64.b64decode(lines[1])
    return lines[1].encode()
