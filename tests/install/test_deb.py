"""The Debian package goes into an empty system, works there, and leaves nothing behind."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tests.install.built import ROOT, own_files, run

from transhume import __version__
from transhume.cli.man_pages import pages

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here: not a Debian"),
    pytest.mark.skipif(
        not Path(sysconfig.get_path("stdlib")).is_relative_to("/usr/lib"),
        reason="this .venv was not made by Debian's own Python, which the package needs",
    ),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deb")
    return Path(run(sys.executable, ROOT / "scripts/deb.py", "--quick", "--into", folder).strip())


def test_it_says_what_it_is_and_needs(package: Path) -> None:
    told = run("dpkg-deb", "--field", package)
    assert f"Version: {__version__}" in told
    needs = run("dpkg-deb", "--field", package, "Depends")
    assert "qemu-system-x86" in needs
    assert f"python3 (>= {sys.version_info.major}.{sys.version_info.minor})" in needs


def test_it_is_installed_runs_and_goes_without_a_trace(package: Path, tmp_path: Path) -> None:
    root = tmp_path / "system"
    _make_empty_system(root)
    before = _files(root)
    _dpkg(root, "--install", str(package))
    python = root / "usr/lib/transhume/bin/python"
    origin = "import transhume, numpy; print(transhume.__file__); print(numpy.__file__)"
    for where in run(python, "-B", "-c", origin).split():
        assert Path(where).is_relative_to(root)
    assert run(python, "-B", "-m", "transhume", "version").strip() == __version__
    packages = next((root / "usr/lib/transhume/lib").glob("python*/site-packages"))
    assert all((packages / name).is_file() for name in own_files())
    assert not list(packages.glob("pytest*"))
    _assert_unit_and_pages(root)
    _dpkg(root, "--remove", "transhume")
    assert _files(root) == before


def test_lintian_finds_no_error(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    # Private libraries are what this package is: see scripts/deb.py.
    done = subprocess.run(
        ["lintian", "--fail-on", "error", "--suppress-tags", "embedded-library", str(package)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def _assert_unit_and_pages(root: Path) -> None:
    unit = (root / "usr/lib/systemd/system/transhume.service").read_text()
    assert "ExecStart=/usr/lib/transhume/bin/python -m transhume.daemon " in unit
    manual = root / "usr/share/man/man1"
    assert {path.name for path in manual.iterdir()} == {f"{name}.gz" for name in pages()}
    assert gzip.decompress((manual / "transhume.1.gz").read_bytes()).decode() == pages()["transhume.1"]


def _make_empty_system(root: Path) -> None:
    database = root / "var/lib/dpkg"
    for folder in ("info", "updates", "triggers"):
        (database / folder).mkdir(parents=True)
    (database / "status").touch()
    (database / "available").touch()


def _dpkg(root: Path, *words: str) -> None:
    """The scripts of the package run on this system, and are told to leave its users and services alone."""
    run("dpkg", f"--root={root}", "--force-script-chrootless", "--force-depends", *words)


def _files(root: Path) -> set[str]:
    """What is there but dpkg's own records."""
    found = {str(path.relative_to(root)) for path in root.rglob("*")}
    return {name for name in found if not name.startswith("var/l")}
