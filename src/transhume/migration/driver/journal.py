"""What a mover leaves for its successor and for the daemon: one file, one line an entry.

The state is written before the commands of a transition are carried out, so a successor never takes
less for done than was done. Entries survive the death of the process, which is all that they are for:
when the whole host dies, the register alone decides.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transhume.model.orders import MigrationUpdate


class Journal:
    """The file `journal.jsonl` of one migration at one end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def state(self, state: str) -> None:
        """Note that the machine is going to be in `state`."""
        self._append({"state": state})

    def update(self, update: MigrationUpdate) -> None:
        """Note what the controller is to be told."""
        self._append({"update": update.model_dump(mode="json")})

    def note(self, text: str) -> None:
        """Note something for a person who reads the file."""
        self._append({"note": text})

    def last_state(self) -> str | None:
        """The latest state noted, by whichever mover; None when there is none."""
        states = [entry["state"] for entry in self._entries() if "state" in entry]
        return states[-1] if states else None

    def last_update(self) -> MigrationUpdate | None:
        """The latest word for the controller."""
        updates = [entry["update"] for entry in self._entries() if "update" in entry]
        return MigrationUpdate.model_validate(updates[-1]) if updates else None

    def close(self) -> None:
        """Close the file; writing opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, entry: dict[str, Any]) -> None:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(self._fd, json.dumps(entry).encode() + b"\n")

    def _entries(self) -> list[dict[str, Any]]:
        """All whole entries: the last line may have been cut by the death of its writer."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        entries: list[dict[str, Any]] = []
        for line in lines:
            if not line:
                continue
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries
