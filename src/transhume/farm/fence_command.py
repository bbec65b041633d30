"""The operator's own command that switches a lost host off: a script for IPMI, a power strip, a cloud's API.

It runs on the controller's host, as root, without a shell, and learns from its environment which host is
meant. Exit code 0 means that the power is off; whatever else it does, the host does not count as fenced.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from transhume.model.errors import Conflict, Refused, TimedOut

RunFence = Callable[[str, str, str], Awaitable[None]]
"""Called with the command, the host's name and its address. Raises when the host may still have power."""

FENCE_LIMIT_S = 60.0
_LAST_WORDS_CHARS = 300


def demand_fence_command(text: str) -> None:
    """Raise `Refused` for what cannot be run as a fence command. Empty takes it away."""
    if not text:
        return
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Refused(f"the fence command {text!r} cannot be read: {error}") from None
    if not words or not Path(words[0]).is_absolute() or not os.access(words[0], os.X_OK):
        raise Refused(
            f"the fence command {text!r} does not begin with the absolute path of a program on this host"
        )


async def run_fence_command(command: str, host: str, address: str, limit_s: float = FENCE_LIMIT_S) -> None:
    """Run it with TRANSHUME_HOST and TRANSHUME_HOST_ADDRESS in its environment, and wait.

    Raises `Conflict` when it does not end with 0 and `TimedOut` when it takes longer than `limit_s`; it and
    all that it started are ended then. Whether the host has power is not known after either.
    """
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "TRANSHUME_HOST": host,
        "TRANSHUME_HOST_ADDRESS": address,
    }
    try:
        process = await asyncio.create_subprocess_exec(
            *shlex.split(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise Conflict(
            f"host {host} is not fenced: its fence command cannot be run: {error.strerror}"
        ) from None
    try:
        async with asyncio.timeout(limit_s):
            words, _ = await process.communicate()
    except TimeoutError:
        raise TimedOut(
            f"host {host} is not fenced: its fence command has not ended within {limit_s:g} s"
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        last = words.decode(errors="replace").strip()[-_LAST_WORDS_CHARS:] or "it said nothing"
        raise Conflict(
            f"host {host} is not fenced: its fence command ended with exit code {process.returncode}: {last}"
        )
