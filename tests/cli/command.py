"""The command as a person or a script runs it: a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 60.0


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def json_lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


async def start(state_dir: Path, *words: str) -> Process:
    """Start `transhume` for the daemon of `state_dir`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSHUME")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "transhume", "--state-dir", str(state_dir), *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env={**environment, "COLUMNS": "200", "NO_COLOR": "1"},
    )


async def finish(process: Process) -> Done:
    """Wait for the end; what does not end in time is killed."""
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def transhume(state_dir: Path, *words: str) -> Done:
    """Run a command to its end."""
    return await finish(await start(state_dir, *words))
