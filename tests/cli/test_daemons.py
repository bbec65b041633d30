"""Real daemons, set up, started, joined and stopped by the command. Needs root and QEMU."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.api.daemons import ADDRESS, free_port
from tests.cli.command import transhume

from transhume.trust.token import Token

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a daemon needs root"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="a daemon needs QEMU"),
]


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    """A folder for state folders; every daemon that was set up in it is stopped at the end."""
    made = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    made.chmod(0o711)  # QEMU's user must get to its VMs' folders
    yield made
    for state_dir in made.iterdir():
        if (state_dir / "host.json").exists():
            await transhume(state_dir, "down")
    shutil.rmtree(made)


def up_words(name: str, port: int) -> tuple[str, ...]:
    return ("up", "--name", name, "--address", ADDRESS, "--port", str(port), "--json")


async def test_two_hosts_are_set_up_started_stopped_and_started_again(folder: Path) -> None:
    alpha, beta, port = folder / "a", folder / "b", free_port()
    up = await transhume(alpha, *up_words("alpha", port))
    assert up.code == 0, up
    assert stat.S_IMODE((alpha / "host.json").stat().st_mode) == 0o600
    words = up.json["join_command"].split()
    assert words[:3] == ["transhume", "join", f"{ADDRESS}:{port}"]
    own = ("--name", "beta", "--address", ADDRESS, "--port", str(free_port()))
    joined = await transhume(beta, *words[1:], *own)
    assert joined.code == 0, joined
    hosts = await transhume(beta, "hosts", "--json")
    assert [(host["name"], host["silent"]) for host in hosts.json] == [("alpha", False), ("beta", False)]
    for name in ("identity.pem", "farm.sqlite"):
        assert stat.S_IMODE((alpha / name).stat().st_mode) == 0o600
    used = await transhume(folder / "c", *words[1:], "--name", "gamma", "--address", ADDRESS)
    assert used.code == 2
    assert "was used already, by host beta" in used.err
    down = await transhume(alpha, "down")
    assert down.code == 0, down
    assert down.out == "the daemon of host alpha has stopped; its VMs go on\n"
    lost = await transhume(beta, "hosts")
    assert lost.code == 5
    assert f"the controller at {ADDRESS}:{port} does not answer" in lost.err
    again = await transhume(alpha, "up", "--json")
    assert again.code == 0, again
    assert again.json["name"] == "alpha"
    assert (await transhume(alpha, "up", "--name", "gamma")).code == 2


async def test_a_set_up_that_fails_leaves_nothing(folder: Path) -> None:
    alpha, port = folder / "a", free_port()
    assert (await transhume(alpha, *up_words("alpha", port))).code == 0
    taken = await transhume(folder / "b", *up_words("beta", port))
    assert taken.code == 2
    assert (
        f"the daemon cannot listen at {ADDRESS} port {port}: Address already in use" in taken.json["message"]
    )
    own = ("--name", "beta", "--address", ADDRESS, "--port", str(free_port()))
    wrong = await transhume(folder / "b", "join", f"{ADDRESS}:{port}", "--token", "wrong", *own)
    assert wrong.code == 2
    assert "this is not a whole token" in wrong.err
    token = (await transhume(alpha, "token", "--json")).json["token"]
    nobody = await transhume(folder / "b", "join", f"{ADDRESS}:{free_port()}", "--token", token, *own)
    assert nobody.code == 5
    secret = Token.parse(token).secret
    elsewhere = str(Token(secret, bytes(32)))
    impostor = await transhume(folder / "b", "join", f"{ADDRESS}:{port}", "--token", elsewhere, *own)
    assert impostor.code == 2
    assert "is not of the farm that the token is from" in impostor.err
    clash = ("--name", "beta", "--address", ADDRESS, "--port", str(port))
    busy = await transhume(folder / "b", "join", f"{ADDRESS}:{port}", "--token", token, *clash)
    assert busy.code == 2
    assert "another daemon?" in busy.err
    assert not (folder / "b").exists()
    hosts = await transhume(alpha, "hosts", "--json")
    assert [host["name"] for host in hosts.json] == ["alpha"]


async def test_a_member_gets_a_new_key_and_a_removed_one_is_out(folder: Path) -> None:
    alpha, beta, port = folder / "a", folder / "b", free_port()
    up = await transhume(alpha, *up_words("alpha", port))
    own = ("--name", "beta", "--address", ADDRESS, "--port", str(free_port()))
    assert (await transhume(beta, *up.json["join_command"].split()[1:], *own)).code == 0
    before = (beta / "identity.pem").read_text()
    strange = (await transhume(alpha, "token", "--json")).json["token"]
    taken = await transhume(beta, "join", f"{ADDRESS}:{port}", "--token", strange)
    assert taken.code == 2
    assert "transhume token --host beta" in taken.err
    again = (await transhume(alpha, "token", "--host", "beta", "--json")).json["token"]
    assert (await transhume(beta, "join", f"{ADDRESS}:{port}", "--token", again)).code == 0
    assert (beta / "identity.pem").read_text() != before
    assert len((await transhume(beta, "hosts", "--json")).json) == 2
    removed = await transhume(alpha, "host", "remove", "beta")
    assert removed.out == "host beta is no longer a member of the farm\n"
    out = await transhume(beta, "hosts")
    assert out.code == 2
    assert "a host that was removed must join again" in out.err
    for log in (alpha / "daemon.log", beta / "daemon.log"):
        text = log.read_text()
        assert "PRIVATE" not in text
        assert Token.parse(again).secret not in text
