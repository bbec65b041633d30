"""The unit that systemd gets: what it must say, that systemd takes it, and that it comes and goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.cli.command import Done, transhume
from tests.install.built import run

from transhume.host.service_unit import MARK, UNIT_NAME, unit_text

UNIT = Path("etc/systemd/system") / UNIT_NAME
LINK = Path("etc/systemd/system/multi-user.target.wants") / UNIT_NAME

needs_systemctl = pytest.mark.skipif(shutil.which("systemctl") is None, reason="systemctl is not installed")


def test_vms_and_movers_outlive_the_daemon() -> None:
    lines = unit_text(Path("/usr/bin/python3"), Path("/var/lib/transhume")).splitlines()
    assert {"KillMode=process", "Restart=on-failure", "OOMPolicy=continue"} <= set(lines)
    assert "ConditionPathExists=/var/lib/transhume/host.json" in lines


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("state_dir", ["/var/lib/transhume", "/srv/a 100% $HOME"])
def test_systemd_takes_it(tmp_path: Path, state_dir: str) -> None:
    unit = tmp_path / UNIT_NAME
    unit.write_text(unit_text(Path("/usr/bin/python3"), Path(state_dir)))
    run("systemd-analyze", "verify", "--man=no", unit)


async def test_it_is_printed(tmp_path: Path) -> None:
    done = await transhume(tmp_path / "state", "install-service", "--print")
    assert done.code == 0
    assert done.out.startswith(MARK)
    assert f"--state-dir {tmp_path / 'state'}" in done.out


@needs_systemctl
async def test_it_is_enabled_and_taken_away(tmp_path: Path) -> None:
    root = tmp_path / "system"
    for _ in range(2):  # a second time changes nothing and is no error
        done = await _service(tmp_path, "install-service", root)
        assert done.code == 0, done.err
        assert (root / UNIT).read_text().startswith(MARK)
        assert (root / LINK).is_symlink()
    done = await _service(tmp_path, "uninstall-service", root)
    assert done.code == 0, done.err
    assert not (root / UNIT).exists()
    assert not (root / LINK).is_symlink()


@needs_systemctl
async def test_what_is_not_there_is_not_taken_away(tmp_path: Path) -> None:
    done = await _service(tmp_path, "uninstall-service", tmp_path)
    assert done.code == 2
    assert "nothing is installed" in done.err


@pytest.mark.parametrize("command", ["install-service", "uninstall-service"])
async def test_a_unit_of_somebody_else_is_not_touched(tmp_path: Path, command: str) -> None:
    unit = tmp_path / UNIT
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    done = await _service(tmp_path, command, tmp_path)
    assert done.code == 2
    assert "was not made by" in done.err
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"


async def test_nothing_is_started_in_a_system_that_does_not_run(tmp_path: Path) -> None:
    done = await transhume(tmp_path, "install-service", "--now", "--root", str(tmp_path))
    assert done.code == 2
    assert "--now" in done.err
    assert not (tmp_path / UNIT).exists()


async def _service(tmp_path: Path, command: str, root: Path) -> Done:
    return await transhume(tmp_path / "state", command, "--root", str(root))
