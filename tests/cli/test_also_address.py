"""Further addresses of a host on the command line: kept, shown, and refused in words. Needs root and QEMU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.api.daemons import ADDRESS, free_port
from tests.cli.command import transhume

from transhume.trust.token import Token

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a daemon needs root"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="a daemon needs QEMU"),
]


async def test_further_addresses_are_kept_and_shown(short_dir: Path) -> None:
    alpha = short_dir / "a"
    words = ("up", "--name", "alpha", "--address", ADDRESS, "--port", str(free_port()))
    others = ("--also-address", "127.0.0.2", "--also-address", "127.0.0.3")
    try:
        up = await transhume(alpha, *words, *others, "--json")
        assert up.code == 0, up
        assert up.json["other_addresses"] == ["127.0.0.2", "127.0.0.3"]
        assert json.loads((alpha / "host.json").read_text())["other_addresses"] == ["127.0.0.2", "127.0.0.3"]
        [host] = (await transhume(alpha, "hosts", "--json")).json
        assert host["inventory"]["other_addresses"] == ["127.0.0.2", "127.0.0.3"]
        assert (await transhume(alpha, "up", *others, "--json")).code == 0
        other = await transhume(alpha, "up", "--also-address", "127.0.0.9")
        assert other.code == 2
        assert "with the also-address 127.0.0.2, 127.0.0.3; leave out --also-address" in other.err
    finally:
        await transhume(alpha, "down")


TOKEN = str(Token.make(bytes(32)))


@pytest.mark.parametrize("command", [("up",), ("join", "192.0.2.1", "--token", TOKEN)], ids=["up", "join"])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("beta.example", "'beta.example' is not an IP address"),
        ("10.0.0.1", "the address 10.0.0.1 is given twice"),
        ("0.0.0.0", "0.0.0.0 is not the address of one host"),
    ],
)
async def test_what_cannot_lead_to_the_host_is_refused(
    short_dir: Path, command: tuple[str, ...], address: str, words: str
) -> None:
    state_dir = short_dir / "a"
    done = await transhume(
        state_dir, *command, "--name", "beta", "--address", "10.0.0.1", "--also-address", address
    )
    assert done.code == 2, done
    assert done.err == f"transhume: host 'beta' cannot be set up: {words}" + done.err.partition(words)[2]
    assert len(done.err.splitlines()) == 1
    assert not state_dir.exists()
