"""Make a Debian package of this tree: `make deb`.

The package brings its libraries with it, in a virtual environment of its own below /usr/lib/transhume,
because Debian's are older than what Transhume needs. They are those of .venv, which `make setup` installed
from requirements.lock by their hashes, so nothing is fetched here. What only tests need stays out.
"""

from __future__ import annotations

import argparse
import compileall
import gzip
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from transhume import __version__
from transhume.cli.man_pages import pages
from transhume.host.config import DEFAULT_STATE_DIR, DEFAULT_VM_USER
from transhume.host.service_unit import MARK, UNIT_NAME, unit_text

ROOT = Path(__file__).parents[1]
HOME = Path("usr/lib/transhume")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
NEXT_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor + 1}"

CONTROL = f"""\
Package: transhume
Version: {__version__}
Architecture: {{architecture}}
Maintainer: The Transhume developers <transhume@localhost>
Installed-Size: {{size_kib}}
Depends: python3 (>= {PYTHON}), python3 (<< {NEXT_PYTHON}~), libc6 (>= 2.34), libstdc++6, passwd,
 qemu-system-x86, qemu-utils
Suggests: chrony, etcd-server
Section: admin
Priority: optional
Description: live migration of running virtual machines between Linux servers
 Transhume moves a running QEMU virtual machine from one server to another
 without stopping it, and manages a farm of such servers: hosts join with one
 command, are emptied for maintenance, and never run a machine twice.
"""

# With DPKG_ROOT set, dpkg works on another system's files: its users and services are not touched.
POSTINST = f"""\
#!/bin/sh
set -e
if [ "$1" = configure ] && [ -z "$DPKG_ROOT" ]; then
    getent passwd {DEFAULT_VM_USER} >/dev/null ||
        useradd --system --no-create-home --shell /usr/sbin/nologin {DEFAULT_VM_USER}
    # Where another unit of this name was made by hand, that one counts.
    if command -v systemctl >/dev/null; then
        [ -n "$2" ] || systemctl -q enable {UNIT_NAME}
        if [ -d /run/systemd/system ]; then
            systemctl daemon-reload
            # VMs and migrations under way outlive the daemon; the unit does nothing before this is a host.
            systemctl -q try-restart {UNIT_NAME} || true
        fi
    fi
fi
"""

PRERM = f"""\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -z "$DPKG_ROOT" ] && command -v systemctl >/dev/null; then
    [ ! -d /run/systemd/system ] || systemctl stop {UNIT_NAME}
    systemctl -q disable {UNIT_NAME} || true
fi
"""

POSTRM = """\
#!/bin/sh
set -e
# The farm's records, keys and the VMs' settings in /var/lib/transhume stay, even on a purge.
if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
"""


def main() -> None:
    """Write the package into a folder and print its path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "build", metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="neither byte code nor compression, for a test")
    options = parser.parse_args()
    into: Path = options.into.absolute()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deb-", dir=into) as work:
        tree = Path(work) / "tree"
        _fill(tree, Path(work))
        if not options.quick:
            compileall.compile_dir(tree, quiet=2, stripdir=str(tree), prependdir="/", workers=1)
        for path in tree.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        architecture = _output("dpkg", "--print-architecture")
        target = into / f"transhume_{__version__}_{architecture}.deb"
        _write_control(tree, architecture)
        packing = ("-Znone",) if options.quick else ("-Zxz", "-z1")
        _output("dpkg-deb", "--root-owner-group", *packing, "--build", str(tree), str(target))
    sys.stdout.write(f"{target}\n")


def _fill(tree: Path, work: Path) -> None:
    tree.mkdir(mode=0o755)
    home = tree / HOME
    packages = home / "lib" / f"python{PYTHON}" / "site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    # What makes a folder a virtual environment, venv's own script would write this machine's paths too.
    (home / "bin" / "python").symlink_to("/usr/bin/python3")
    (home / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    for found in sorted(_needed("transhume"), key=lambda each: each.name):
        if found.name != "transhume":
            _copy(found, packages)
    _add_own(packages, work)
    start = tree / "usr/bin/transhume"
    start.parent.mkdir(parents=True)
    start.write_text(f'#!/bin/sh\nexec /{HOME}/bin/python -m transhume "$@"\n')
    start.chmod(0o755)
    unit = tree / "usr/lib/systemd/system" / UNIT_NAME
    unit.parent.mkdir(parents=True)
    text = unit_text(Path("/") / HOME / "bin/python", DEFAULT_STATE_DIR)
    unit.write_text(text.removeprefix(f"{MARK}\n"))
    _add_documents(tree)


def _needed(name: str, extras: frozenset[str] = frozenset()) -> set[Distribution]:
    """A distribution of this environment and everything that it needs to run, each once."""
    found: dict[str, Distribution] = {}
    asked = [(name, extras)]
    seen = set()
    while asked:
        here = asked.pop()
        if here in seen:
            continue
        seen.add(here)
        one = distribution(here[0])
        found[one.name.lower()] = one
        for text in one.requires or []:
            needs = Requirement(text)
            wanted = [{"extra": extra} for extra in here[1]] or [{"extra": ""}]
            if needs.marker is None or any(needs.marker.evaluate(each) for each in wanted):
                asked.append((needs.name, frozenset(needs.extras)))
    return set(found.values())


def _copy(found: Distribution, packages: Path) -> None:
    """The files of a distribution; its commands and what it has elsewhere stay out."""
    for file in found.files or []:
        if ".." in file.parts or file.suffix == ".pyc" or file.name in ("direct_url.json", "INSTALLER"):
            continue
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), target)


def _add_own(packages: Path, work: Path) -> None:
    """This tree as its own wheel has it."""
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input"]
    no_index = ["--no-deps", "--no-build-isolation", "--no-index"]
    _output(*pip, "wheel", *no_index, "--wheel-dir", str(work), str(ROOT))
    (wheel,) = work.glob("transhume-*.whl")
    shutil.unpack_archive(wheel, packages, "zip")


def _add_documents(tree: Path) -> None:
    manual = tree / "usr/share/man/man1"
    manual.mkdir(parents=True)
    for name, text in pages().items():
        (manual / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    documents = tree / "usr/share/doc/transhume"
    documents.mkdir(parents=True)
    shutil.copyfile(ROOT / "LICENSE", documents / "copyright")
    changes = (ROOT / "CHANGELOG.md").read_bytes()
    (documents / "changelog.gz").write_bytes(gzip.compress(changes, mtime=0))


def _write_control(tree: Path, architecture: str) -> None:
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    control = tree / "DEBIAN"
    control.mkdir(mode=0o755)
    (control / "control").write_text(CONTROL.format(architecture=architecture, size_kib=size // 1024))
    for name, text in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        (control / name).write_text(text)
        (control / name).chmod(0o755)


def _output(*command: str) -> str:
    """What a program printed; its own complaint, and the end, when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"deb: {command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    if Path(sysconfig.get_path("stdlib")) != Path(f"/usr/lib/python{PYTHON}"):
        sys.exit("deb: .venv was not made by Debian's own Python, whose version the package must name")
    main()
