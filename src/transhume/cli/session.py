"""What every command needs: where the daemon is, how to answer, and how errors are told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from transhume.api.client import FarmClient
from transhume.model.errors import HostLost, PreflightFailed, Refused, StoreError, TranshumeError

Answer = TypeVar("Answer")

EXIT_UNKNOWN = 5
"""The daemon or the controller was lost: what became of the request is not known."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Answer in JSON, for programs.")]


@dataclass(frozen=True)
class Session:
    """The global options. One session lasts for one command."""

    state_dir: Path
    as_json: bool = False
    reason: str = ""

    @property
    def api_socket(self) -> Path:
        return self.state_dir / "api.sock"

    def call(self, work: Callable[[FarmClient], Awaitable[Answer]]) -> Answer:
        """Run `work` with a client of this machine's daemon."""
        demand_root()
        if not self.api_socket.exists():
            raise HostLost(f"no daemon answers at {self.api_socket}; start it with `transhume up`")

        async def run() -> Answer:
            async with FarmClient(self.api_socket, reason=self.reason) as client:
                return await work(client)

        return asyncio.run(run())


def session(context: typer.Context, as_json: bool = False) -> Session:
    """The session of a command, with its own --json or the one before the command's name."""
    base: Session = context.obj
    return Session(base.state_dir, base.as_json or as_json, base.reason)


def demand_root() -> None:
    """Raise `Refused`, in one line, for anybody but root."""
    if os.geteuid() != 0:
        raise Refused(
            "transhume needs root: it writes into the memory of other processes and makes network devices; "
            "run it with sudo"
        )


def say(text: str) -> None:
    typer.echo(text)


def say_json(value: BaseModel | list[Any] | dict[str, Any]) -> None:
    """One JSON document on one line."""
    typer.echo(json.dumps(plain(value)))


def plain(value: Any) -> Any:
    """A model, or a list of models, as JSON's own types."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def tell_error(error: TranshumeError, as_json: bool) -> None:
    """One error, for a person on stderr, for a program as a line of JSON on stdout."""
    reasons = list(error.reasons) if isinstance(error, PreflightFailed) else []
    if as_json:
        line: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message}
        say_json({**line, "reasons": reasons} if reasons else line)
        return
    typer.echo(f"transhume: {error.message}", err=True)
    for reason in reasons:
        typer.echo(f"  - {reason}", err=True)


def exit_code_of(error: TranshumeError) -> int:
    return EXIT_UNKNOWN if isinstance(error, HostLost | StoreError) else error.exit_code


def words_of(error: ValidationError) -> str:
    """What is wrong with the values that somebody typed."""
    words = []
    for fault in error.errors():
        # Our own validators' words come with a prefix of the library's.
        said = fault["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in fault["loc"])
        words.append(f"{where}: {said}" if where else said)
    return "; ".join(words)


def on_terminal() -> bool:
    return sys.stdout.isatty()
