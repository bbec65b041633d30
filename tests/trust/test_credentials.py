"""Both ends prove who they are; whoever connects names whom it wants, and is told in words what is wrong."""

from __future__ import annotations

import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.trust.identities import credentials, new_authority

from transhume.model.errors import PeerProtocolError, Refused, Unauthorized
from transhume.trust.certificates import (
    BACKDATED_S,
    HOST_LIFETIME_S,
    Authority,
    issue,
    make_request,
    read_held,
)
from transhume.trust.cipher import Cipher
from transhume.trust.credentials import Credentials, refusal
from transhume.trust.files import IdentityFiles
from transhume.trust.names import CONTROLLER_NAME, Peer, server_name
from transhume.trust.token import Token, fingerprint, is_certificate_of

FARM = new_authority("f1")


def meet(caller: Credentials, called: Credentials, name: str) -> tuple[Peer | None, Peer | None]:
    """Both ends' handshake, in memory: whom the caller sees, and whom the other."""
    a, b = Cipher(caller.client(name)), Cipher(called.server())
    for _ in range(4):
        done_a = a.handshake()
        b.feed(memoryview(a.take()))
        done_b = b.handshake()
        a.feed(memoryview(b.take()))
        if done_a and done_b:
            return a.peer, b.peer
    raise AssertionError("the handshake did not end")


def test_each_end_learns_who_the_other_is(tmp_path: Path) -> None:
    alpha = credentials(tmp_path / "a", FARM, "alpha", controller=True)
    beta = credentials(tmp_path / "b", FARM, "beta")
    seen, caller = meet(beta, alpha, CONTROLLER_NAME)
    assert seen is not None
    assert (seen.host, seen.controller) == ("alpha", True)
    assert caller is not None
    assert (caller.host, caller.controller) == ("beta", False)
    assert meet(alpha, beta, server_name("beta"))[1] == seen


@pytest.mark.parametrize("name", [CONTROLLER_NAME, server_name("alpha"), server_name("bet"), "beta"])
def test_a_certificate_stands_for_no_other_name(tmp_path: Path, name: str) -> None:
    beta = credentials(tmp_path, FARM, "beta")
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        meet(beta, beta, name)
    words = refusal(refused.value, "host beta")
    assert isinstance(words, Unauthorized)
    assert words.message.startswith("host beta shows the certificate of another host")


@pytest.mark.parametrize(
    ("signed_s", "words"),
    [
        (BACKDATED_S + 3600, "is not valid yet: is the clock"),
        (-HOST_LIFETIME_S - 60, "has expired: is the"),
    ],
)
def test_a_clock_that_is_days_off_is_named(tmp_path: Path, signed_s: float, words: str) -> None:
    here = credentials(tmp_path / "a", FARM, "alpha")
    there = credentials(tmp_path / "b", FARM, "beta", now_s=time.time() + signed_s)
    with pytest.raises(ssl.SSLCertVerificationError) as refused:
        meet(here, there, server_name("beta"))
    assert words in refusal(refused.value, "host beta").message
    for hours in (-12, 12):
        off = credentials(tmp_path / f"c{hours}", FARM, "beta", now_s=time.time() + hours * 3600)
        assert meet(here, off, server_name("beta"))


def test_a_renewal_is_used_without_a_restart(tmp_path: Path) -> None:
    alpha, beta = credentials(tmp_path / "a", FARM, "alpha"), credentials(tmp_path / "b", FARM, "beta")
    before = meet(alpha, beta, server_name("beta"))
    context = beta.server()
    credentials(tmp_path / "a", FARM, "alpha")
    credentials(tmp_path / "b", FARM, "beta")
    after = meet(alpha, beta, server_name("beta"))
    assert beta.server() is context
    for old, new in zip(before, after, strict=True):
        assert old is not None
        assert new is not None
        assert (old.host, old.serial != new.serial) == (new.host, True)


def test_nothing_but_tls_1_3_is_spoken(tmp_path: Path) -> None:
    mine = credentials(tmp_path, FARM, "alpha")
    for context in (mine.client(CONTROLLER_NAME).context, mine.server()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3


def test_files_are_for_root_and_whole(tmp_path: Path) -> None:
    mine = credentials(tmp_path, FARM, "alpha")
    assert stat.S_IMODE((tmp_path / "identity.pem").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authority.pem", "identity.pem"]
    (tmp_path / "identity.pem").write_text("nonsense")
    with pytest.raises(Refused, match=r"identity\.pem cannot be used .* let it join again"):
        mine.server()
    (tmp_path / "identity.pem").unlink()
    with pytest.raises(Refused, match="No such file"):
        Credentials(IdentityFiles(tmp_path)).client(CONTROLLER_NAME)


def test_a_certificate_is_due_after_two_thirds_of_its_life(tmp_path: Path) -> None:
    _, request = make_request()
    held = read_held(issue(FARM, "alpha", request, 1_000_000.0, controller=False).certificate_pem)
    assert held is not None
    assert held.due_at_s() == 1_000_000.0 + HOST_LIFETIME_S * 2 / 3
    assert read_held("nonsense") is None


def test_a_request_that_was_changed_is_refused() -> None:
    lines = make_request()[1].splitlines()
    lines[1] = lines[1][:-4] + ("AAAA" if lines[1][-4:] != "AAAA" else "BBBB")
    for text in ("\n".join(lines), "", "x" * 100_000, FARM.certificate_pem):
        with pytest.raises(Refused, match="the request for a certificate"):
            issue(FARM, "alpha", text, time.time(), controller=False)


def test_the_authoritys_key_is_not_shown_by_accident() -> None:
    assert "PRIVATE" in FARM.key_pem
    assert "PRIVATE" not in repr(FARM)
    assert repr(Token.make(bytes(32))) == "Token(...)"
    assert isinstance(FARM, Authority)


def test_a_fingerprint_stands_for_one_certificate() -> None:
    token = Token.parse(str(Token.make(fingerprint(FARM.certificate_pem))))
    assert is_certificate_of(FARM.certificate_pem, token.fingerprint)
    assert not is_certificate_of(new_authority("f1").certificate_pem, token.fingerprint)
    with pytest.raises(PeerProtocolError, match="is none"):
        fingerprint("nonsense")


def test_commands_and_movers_do_not_load_what_makes_keys() -> None:
    loaded = "import sys, transhume.cli.commands, transhume.mover; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
