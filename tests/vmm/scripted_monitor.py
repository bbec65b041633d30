"""A QEMU made of answers: for peers that misbehave, and for devices that no test machine has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from transhume.vmm.monitor import Monitor

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
GREETING = {"QMP": {"version": VERSION, "capabilities": []}}

Answer = Callable[[dict[str, Any]], Any]


@asynccontextmanager
async def scripted_monitor(path: Path, answers: dict[str, Any]) -> AsyncIterator[Monitor]:
    """A monitor at `path` that answers each command with what `answers` holds for it (a value, or a
    function of the arguments); a command that is not there is refused.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        async for command in _commands(reader):
            writer.write(json.dumps(_answer(answers, command)).encode() + b"\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        monitor = await Monitor.connect(path)
        try:
            yield monitor
        finally:
            await monitor.close()


async def _commands(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The commands of a client, who need not end them with a new line."""
    text = ""
    while received := await reader.read(65536):
        text += received.decode()
        while text := text.lstrip():
            try:
                command, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                break
            text = text[end:]
            yield command


def _answer(answers: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
    name = command["execute"]
    if name == "qmp_capabilities":
        return {"return": {}}
    if name not in answers:
        return {"error": {"class": "CommandNotFound", "desc": f"no {name}"}, "id": command["id"]}
    answer = answers[name]
    value = answer(command.get("arguments", {})) if callable(answer) else answer
    return {"return": value, "id": command["id"]}
