"""What an examination of a host found: one thing, how bad it is, in words, and the mend."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Level(StrEnum):
    """How bad a finding is. `OK`: as it should be. `NOTE`: good to know. `WARNING`: something will be slower,
    less safe or impossible. `ERROR`: the host would not work as one.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Finding(BaseModel):
    """One finding. `check` is the stable name of what was looked at; `mend` is empty where nothing is to be
    mended.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    level: Level
    words: str
    mend: str = ""


def ok(check: str, words: str) -> Finding:
    return Finding(check=check, level=Level.OK, words=words)


def note(check: str, words: str, mend: str = "") -> Finding:
    return Finding(check=check, level=Level.NOTE, words=words, mend=mend)


def warning(check: str, words: str, mend: str) -> Finding:
    return Finding(check=check, level=Level.WARNING, words=words, mend=mend)


def error(check: str, words: str, mend: str) -> Finding:
    return Finding(check=check, level=Level.ERROR, words=words, mend=mend)
