"""The wheel holds everything, and works where only it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tests.install.built import LIMIT_S, ROOT, own_files, run

from transhume import __version__

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    quiet = ("-qq", "--disable-pip-version-check", "--no-input")
    alone = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", *quiet, "wheel", *alone, "--wheel-dir", folder, ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel; it sees the libraries of this one, and not this tree."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    quiet = ("-qq", "--disable-pip-version-check", "--no-input")
    run(sys.executable, "-m", "pip", *quiet, "--python", python, "install", "--no-index", "--no-deps", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A folder named in a .pth file is searched; .pth files in it, as that of an editable tree, are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == own_files()


def test_its_command_runs_from_there(environment: Path) -> None:
    where = run(environment / "bin/python", "-c", "import transhume; print(transhume.__file__)")
    assert Path(where.strip()).is_relative_to(environment)
    command = environment / "bin/transhume"
    assert "migrate" in run(command, "--help")
    assert run(command, "version").strip() == __version__


def test_the_doctor_finds_what_it_needs(environment: Path) -> None:
    """It assembles a guest of its own from a file that must be there. What it finds is this machine's."""
    done = subprocess.run(
        [str(environment / "bin/transhume"), "doctor", "--json", "--quick"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=LIMIT_S,
    )
    assert done.returncode in (0, 2), done.stderr
    assert {each["check"] for each in json.loads(done.stdout)["findings"]} >= {"kernel", "qemu", "storage"}


def test_the_unit_names_the_interpreter_of_the_wheel(environment: Path) -> None:
    unit = run(environment / "bin/transhume", "install-service", "--print")
    assert f"ExecStart={environment}/bin/python -m transhume.daemon " in unit
