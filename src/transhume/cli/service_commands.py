"""`install-service` and `uninstall-service`: systemd starts this server's daemon, also after a reboot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from transhume.cli import daemon_process
from transhume.cli.session import JsonFlag, demand_root, say, say_json, session
from transhume.host.service_unit import MARK, UNIT_NAME, unit_text
from transhume.model.errors import Conflict, NotFound, Refused

UNIT_FOLDER = Path("etc/systemd/system")
SYSTEMD_RUNS = Path("/run/systemd/system")
"""Exists exactly where systemd is the first process, sd_booted(3)."""

SYSTEMCTL_LIMIT_S = 60.0

RootOption = Annotated[
    Path, typer.Option("--root", metavar="DIR", help="The root of an installed system, for making images.")
]


def install(
    context: typer.Context,
    only_print: Annotated[bool, typer.Option("--print", help="Only print the unit.")] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Start it too; a daemon that runs already is handed over.")
    ] = False,
    root: RootOption = Path("/"),
    as_json: JsonFlag = False,
) -> None:
    """Let systemd start this server's daemon at each boot. VMs go on while the daemon is restarted.

    Needs no host yet: the unit waits until `transhume up` or `transhume join` has made one.
    """
    current = session(context, as_json)
    text = unit_text(Path(sys.executable), current.state_dir)
    if only_print:
        say(text.rstrip("\n"))
        return
    demand_root()
    if now:
        _demand_systemd(root)
    path = _unit_path(root)
    _demand_ours(path)
    if shutil.which("systemctl") is None:
        raise Refused("there is no systemctl here; `transhume install-service --print` shows the unit")
    _write(path, text)
    _systemctl(root, "enable", UNIT_NAME)
    if now:
        config = daemon_process.read_config(current.state_dir)
        if config is not None and not _is_active():
            daemon_process.stop(config)
        _systemctl(root, "restart", UNIT_NAME)
    if current.as_json:
        say_json({"unit": str(path), "enabled": True, "started": now})
    else:
        say(f"{path} is enabled: systemd {'runs the daemon, and ' if now else ''}starts it at each boot")


def uninstall(context: typer.Context, root: RootOption = Path("/"), as_json: JsonFlag = False) -> None:
    """Take the unit away again. The daemon stops; VMs, and migrations under way, go on."""
    current = session(context, as_json)
    demand_root()
    path = _unit_path(root)
    if not path.exists():
        raise NotFound(f"there is no {path}; nothing is installed")
    _demand_ours(path)
    stops = _systemd_runs(root)
    _systemctl(root, "disable", *(("--now",) if stops else ()), UNIT_NAME)
    path.unlink()
    if stops:
        _systemctl(root, "daemon-reload")
    if current.as_json:
        say_json({"unit": str(path), "enabled": False, "stopped": stops})
    else:
        say(f"{path} is gone" + ("; the daemon has stopped, `transhume up` starts it" if stops else ""))


def _unit_path(root: Path) -> Path:
    return root.absolute() / UNIT_FOLDER / UNIT_NAME


def _demand_ours(path: Path) -> None:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not text.startswith(MARK):
        raise Conflict(f"{path} was not made by `transhume install-service`; move it away first")


def _write(path: Path, text: str) -> None:
    """The unit is there whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.chmod(0o644)
        draft.rename(path)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from error


def _systemd_runs(root: Path) -> bool:
    return root.absolute() == Path("/") and SYSTEMD_RUNS.is_dir()


def _demand_systemd(root: Path) -> None:
    if not _systemd_runs(root):
        raise Refused("systemd does not run this system, so nothing can be started by it; leave out --now")


def _is_active() -> bool:
    asked = subprocess.run(
        ["systemctl", "is-active", "--quiet", UNIT_NAME], check=False, timeout=SYSTEMCTL_LIMIT_S
    )
    return asked.returncode == 0


def _systemctl(root: Path, *words: str) -> None:
    """Raises `Refused` with systemctl's own words. With another root it works on files alone."""
    where = [] if root.absolute() == Path("/") else [f"--root={root.absolute()}"]
    try:
        done = subprocess.run(
            ["systemctl", *where, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=SYSTEMCTL_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"systemctl {' '.join(words)} failed: {error}") from error
    if done.returncode:
        told = done.stderr.strip() or f"exit code {done.returncode}"
        raise Refused(f"systemctl {' '.join(words)} failed: {told}")
