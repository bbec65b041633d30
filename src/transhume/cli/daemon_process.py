"""The daemon of this machine as a process: configured, started, waited for, ended. It touches no VM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from transhume.api.client import FarmClient
from transhume.cli.session import words_of
from transhume.host.config import HostConfig
from transhume.model.errors import HostLost, Refused, StoreError, TimedOut, TranshumeError
from transhume.trust.files import IdentityFiles

START_LIMIT_S = 30.0
STOP_LIMIT_S = 20.0
POLL_S = 0.05
"""A starting daemon has no event to wait for: it can only be asked again."""

STATE_DIR_MODE = 0o711
"""QEMU, without privileges, must be able to pass through to its own VM's folder, and read nothing."""


def config_file(state_dir: Path) -> Path:
    return state_dir / "host.json"


def read_config(state_dir: Path) -> HostConfig | None:
    """The configuration in the state folder, or None when it is not set up. `Refused` when it is broken."""
    path = config_file(state_dir)
    try:
        return HostConfig.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise Refused(
            f"{path} is not a host's configuration ({words_of(error)}); repair or remove it"
        ) from error


def make_state_dir(config: HostConfig) -> None:
    config.state_dir.mkdir(mode=STATE_DIR_MODE, parents=True, exist_ok=True)


def write_config(config: HostConfig) -> None:
    """Write `host.json`, so that it is there whole or not at all."""
    make_state_dir(config)
    path = config_file(config.state_dir)
    draft = path.with_suffix(".json.new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(config.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def remove_config(state_dir: Path, folder_was_made: bool) -> None:
    """Undo a set-up that failed: the configuration, and the folder if nothing else was put there."""
    config_file(state_dir).unlink(missing_ok=True)
    IdentityFiles(state_dir).remove()
    if not folder_was_made:
        return
    for name in ("daemon.log", "farm.sqlite", "farm.sqlite-wal", "controllers.json"):
        (state_dir / name).unlink(missing_ok=True)
    for folder in (state_dir / "vms", state_dir / "migrations", state_dir):
        with contextlib.suppress(OSError):
            folder.rmdir()


def command(state_dir: Path) -> list[str]:
    return [sys.executable, "-m", "transhume.daemon", "--state-dir", str(state_dir)]


def start(config: HostConfig) -> int:
    """Start the daemon in a session of its own and wait until it answers. Returns its process id.

    Raises `Refused` with the last line of its log when it ends at once, `TimedOut` when it does not answer;
    it does not run then.
    """
    log_file = config.state_dir / "daemon.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command(config.state_dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    try:
        asyncio.run(_answer(config, process))
    except BaseException:
        process.terminate()
        process.wait(STOP_LIMIT_S)
        raise
    return process.pid


async def _answer(config: HostConfig, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    async with FarmClient(config.api_socket) as client:
        while True:
            if process.poll() is not None:
                raise Refused(
                    f"the daemon ended at once: {_last_line(config)}; see {config.state_dir}/daemon.log"
                )
            try:
                await client.ping()
                return
            except HostLost as error:
                if time.monotonic() > deadline_s:
                    raise TimedOut(
                        f"the daemon did not answer within {START_LIMIT_S:.0f} s ({error.message}); "
                        f"look at {config.state_dir}/daemon.log"
                    ) from error
            await asyncio.sleep(POLL_S)


def running_pid(config: HostConfig) -> int | None:
    """The process that listens at the daemon's local socket, as the kernel knows it, or None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(config.api_socket))
        except OSError:
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, _, _ = struct.unpack("3i", credentials)
        return int(pid)


def stop(config: HostConfig) -> bool:
    """End the daemon and wait for it. False when none ran. `TimedOut` when it does not go."""
    pid = running_pid(config)
    if pid is None:
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], STOP_LIMIT_S)
    except ProcessLookupError:
        return True
    finally:
        os.close(process)
    if not ended:
        raise TimedOut(f"the daemon (process {pid}) did not end within {STOP_LIMIT_S:.0f} s; look at its log")
    return True


def own_name() -> str:
    """This machine's host name as far as it can be a host's name in the farm; perhaps empty."""
    return re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")


def own_address(towards: str, port: int) -> str:
    """The address of this machine that a peer at `towards` sees. Nothing is sent."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise Refused(
            f"no own address was found towards {towards} ({error.strerror}); name one with --address"
        ) from error


def _last_line(config: HostConfig) -> str:
    try:
        lines = (config.state_dir / "daemon.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return "without a word"
    # Of `2026-01-31 12:00:00,000 ERROR transhume.daemon: words` only the words.
    return re.sub(r"^\S+ \S+ [A-Z]+ [\w.]+: ", "", lines[-1]) if lines else "without a word"


async def wait_until_member(config: HostConfig) -> None:
    """Wait until the controller has heard from this host. Raises the last error, or `TimedOut`."""
    deadline_s = time.monotonic() + START_LIMIT_S
    last: TranshumeError = TimedOut(f"the controller has not heard from host {config.name} yet")
    async with FarmClient(config.api_socket) as client:
        while time.monotonic() < deadline_s:
            try:
                if any(host.name == config.name and not host.silent for host in await client.hosts()):
                    return
            except (HostLost, StoreError) as error:
                last = error
            await asyncio.sleep(POLL_S)
    raise last
