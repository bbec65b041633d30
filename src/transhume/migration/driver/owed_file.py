"""What a mover leaves for its successor about pages that are owed: which they are, and where it listened."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transhume.memory.runs import Runs
from transhume.model.errors import VmmError


@dataclass(frozen=True)
class Listening:
    """Where a destination's mover is found, and the key that proves who it is."""

    port: int
    key: bytes
    addresses: tuple[str, ...]


class OwedFile:
    """The files `owed.npz` and `listening.json` in a mover's folder.

    They survive the death of the process, which is all that they are for (see `Journal`).
    """

    def __init__(self, folder: Path) -> None:
        self._owed = folder / "owed.npz"
        self._listening = folder / "listening.json"

    def write(self, owed: Sequence[Runs]) -> None:
        """Note the owed pages of each block, whole or not at all. Raises `VmmError` without room."""
        draft = self._owed.with_suffix(".draft")
        try:
            with draft.open("wb") as file:
                np.savez(file, *owed)
            draft.rename(self._owed)
        except OSError as error:
            raise VmmError(f"what is owed cannot be noted in {self._owed}: {error.strerror}") from error

    def read(self) -> list[Runs] | None:
        """What was noted; None when nothing is owed.

        Raises `VmmError` for a file that is damaged: what is owed is then not known, which is not nothing.
        """
        try:
            with self._owed.open("rb") as file, np.load(file) as arrays:
                return [arrays[f"arr_{index}"] for index in range(len(arrays.files))]
        except FileNotFoundError:
            return None
        except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as error:
            raise VmmError(f"{self._owed} is damaged: {error}") from error

    def written_at_s(self) -> float | None:
        """When it was noted, which is when the VM stood still; None when nothing is owed."""
        try:
            return self._owed.stat().st_mtime
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        """Nothing is owed any more."""
        self._owed.unlink(missing_ok=True)

    def write_listening(self, listening: Listening) -> None:
        """Note where the source finds this end, so that a successor can be found at the same place."""
        draft = self._listening.with_suffix(".draft")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            noted = {"port": listening.port, "key": listening.key.hex(), "addresses": listening.addresses}
            json.dump(noted, file)
        draft.rename(self._listening)

    def read_listening(self) -> Listening | None:
        """The predecessor's port, key and addresses."""
        try:
            noted = json.loads(self._listening.read_text())
        except (FileNotFoundError, ValueError):
            return None
        addresses = tuple(noted.get("addresses", ()))  # a release that knew of one address noted none
        return Listening(noted["port"], bytes.fromhex(noted["key"]), addresses)
