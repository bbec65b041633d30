"""`transhume doctor` and `baseline` as commands, and what `up` and `join` do with the findings."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.daemons import ADDRESS, Daemons, free_port, two_daemons
from tests.cli.command import transhume

from transhume.cli.examination import demand_fit, findings_table
from transhume.cli.tables import show
from transhume.model.errors import Refused
from transhume.model.finding import error, note, ok, warning
from transhume.model.host import GuestCpus, ModelRank
from transhume.sim.scripted_host import INVENTORY
from transhume.trust.token import Token

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the doctor needs root"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="the doctor needs QEMU"),
]

FINDINGS = [
    ok("root", "root, on x86-64"),
    note("kvm", "KVM is not used", "TCG is slower"),
    warning("clock", "no time service keeps the clock", "install one"),
    error("ports", "port 7461 is taken", "choose another"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def own_words(port: int | None = None) -> tuple[str, ...]:
    return ("--name", "gamma", "--address", ADDRESS, "--port", str(port or free_port()))


async def test_this_machine_is_fit_and_nothing_is_changed(folder: Path) -> None:
    found = await transhume(folder / "s", "doctor", "--quick", *own_words(), "--json")
    assert found.code == 0, found
    assert found.json["fit"] is True
    levels = {finding["level"] for finding in found.json["findings"]}
    assert "error" not in levels
    assert all(finding["mend"] for finding in found.json["findings"] if finding["level"] == "warning")
    assert not (folder / "s").exists()


async def test_an_error_ends_with_2_and_a_table_with_the_mend(folder: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as taken:
        found = await transhume(folder, "doctor", "--quick", *own_words(taken.getsockname()[1]))
    assert found.code == 2
    assert "Address already in use" in found.out
    assert "mend: end what listens there" in found.out
    assert "not fit to be a host: errors: 1" in found.out


async def test_an_error_refuses_the_join_and_changes_nothing(folder: Path) -> None:
    async with two_daemons() as d:
        token = (await d.controller.members.invite()).token
        port = d.alpha_config.port
        with socket.create_server((ADDRESS, 0)) as taken:
            words = own_words(taken.getsockname()[1])
            refused = await transhume(folder / "s", "join", f"{ADDRESS}:{port}", "--token", token, *words)
        assert refused.code == 2, refused
        assert "this server is not fit to join the farm: the daemon cannot listen at" in refused.err
        assert "--despite-findings" in refused.err
        assert not (folder / "s").exists()
        assert [host.name for host in await d.controller.members.hosts()] == ["alpha", "beta"]
        await d.controller.members.valid_token(Token.parse(token).secret, "gamma")
        same_name = ("--name", "beta", *own_words()[2:])
        clash = await transhume(folder / "s", "join", f"{ADDRESS}:{port}", "--token", token, *same_name)
        assert clash.code == 2
        assert "the farm has a host beta already" in clash.err
        wrong = await transhume(folder / "s", "join", f"{ADDRESS}:{port}", "--token", "x", *own_words())
        assert (wrong.code, "not a whole token" in wrong.err) == (2, True)


async def test_despite_findings_goes_on_as_far_as_it_goes(folder: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as taken:
        words = own_words(taken.getsockname()[1])
        went_on = await transhume(folder / "s", "up", *words, "--despite-findings")
    assert went_on.code == 2
    assert "error: the daemon cannot listen at" in went_on.err
    assert f"the daemon ended at once: cannot listen at {ADDRESS}" in went_on.err
    assert not (folder / "s").exists()


async def test_a_farm_is_asked_what_joining_would_change(folder: Path) -> None:
    async with two_daemons() as d:
        await _with_baseline(d)
        token = (await d.controller.members.invite()).token
        where = ("--controller", f"{ADDRESS}:{d.alpha_config.port}")
        found = await transhume(folder, "doctor", "--quick", *where, "--token", token, *own_words(), "--json")
        assert found.code == 0, found
        words = [each["words"] for each in found.json["findings"]]
        assert any(said.endswith("joining gamma would lower it by no-such-flag") for said in words), words
        assert "this clock agrees with the controller's" in words
        assert any(said.startswith("large packets reach the controller through lo") for said in words)
        nobody = await transhume(folder, "doctor", "--quick", "--controller", f"{ADDRESS}:{free_port()}")
        assert nobody.code == 2
        assert "cannot be reached: Connection refused" in nobody.out


async def test_the_baseline_is_shown() -> None:
    async with two_daemons() as d:
        await _with_baseline(d)
        alpha = d.alpha_config.state_dir
        shown = await transhume(alpha, "baseline")
        assert shown.code == 0, shown
        assert shown.out.splitlines()[1].split()[:4] == ["tcg", "qemu64-v1", "alpha,", "beta"]
        as_json = await transhume(alpha, "baseline", "--json")
        assert as_json.json["baselines"][0]["model"] == "qemu64-v1"
        made = await transhume(
            alpha, "vm", "create", "web", "--memory", "256M", "--cpu", "baseline", "--json"
        )
        assert made.json["spec"]["cpu_model"] == "qemu64-v1"


def test_findings_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show(findings_table(FINDINGS))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].split() == ["ok", "root", "root,", "on", "x86-64"]
    assert any(line.strip() == "mend: choose another" for line in lines)


def test_errors_refuse_and_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match=r"port 7461 is taken \(mend: choose another\)") as refused:
        demand_fit(FINDINGS, False, "be a host")
    assert "clock" not in refused.value.message
    demand_fit(FINDINGS, True, "be a host")
    assert capsys.readouterr().err.splitlines() == [
        "warning: no time service keeps the clock (mend: install one)",
        "error: port 7461 is taken (mend: choose another)",
    ]
    demand_fit(FINDINGS[:2], False, "be a host")
    assert capsys.readouterr().err == ""
    assert json.loads(FINDINGS[3].model_dump_json())["level"] == "error"


async def _with_baseline(d: Daemons) -> None:
    """Two hosts with a model that every QEMU has, and a flag that this machine lacks."""
    cpus = GuestCpus(
        models={"qemu64-v1": ModelRank(1, 28)},
        features=("no-such-flag", "sse2"),
    )
    told = INVENTORY.model_copy(update={"cpus_of": {"tcg": cpus}, "kvm_obstacle": "there is none"})
    d.alpha.inventory_now = d.beta.inventory_now = told
    await d.beat()
