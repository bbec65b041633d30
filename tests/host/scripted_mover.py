"""A mover that does what its job's VM is named: a process with a mover's lock, journal and socket.

    python -m tests.host.scripted_mover FOLDER | --standby

`ends`      completes at once
`fails`     gives up at once
`silent`    dies without a word
`waits`     is prepared, and goes on until it is cancelled
`stubborn`  as `waits`, but as a successor it completes
`late`      is prepared; a cancel finds it completed

It imports nothing of the product, so that it starts fast; what it writes is read by the product.
"""

import fcntl
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

PREPARED = {"address": "192.0.2.2", "port": 4711, "key": "ab" * 32}


def main() -> None:
    path = sys.argv[1] if sys.argv[1] != "--standby" else sys.stdin.readline().strip()
    if not path:
        return  # its daemon has gone
    folder = Path(path)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    job = json.loads((folder / "job.json").read_text())
    if job["migration"]["vm"] == "silent":
        print("it has nothing to say")  # noqa: T201
        sys.exit(1)
    Script(folder, job).run()


class Script:
    """One life of a mover."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self._folder = folder
        self._migration = job["migration"]
        self._vm = self._migration["vm"]
        self._journal = (folder / "journal.jsonl").open("ab", buffering=0)
        self._is_successor = self._journal.tell() > 0

    def run(self) -> None:
        self._note({"state": "at-work"})
        if self._vm in ("waits", "late") or (self._vm == "stubborn" and not self._is_successor):
            self._wait_for_a_cancel()
        elif self._vm == "fails":
            self._end("failed", "the link was lost")
        else:
            self._end("completed")

    def _wait_for_a_cancel(self) -> None:
        path = self._folder / "mover.sock"
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(str(path))
        server.listen()
        (self._folder / "mover.pid").write_text(f"{os.getpid()}\n")
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rwb", buffering=0) as lines:
                lines.write(_line({"update": self._update("prepared")}) + _line({"prepared": PREPARED}))
                for line in lines:
                    if json.loads(line) == {"command": "cancel"}:
                        completed = self._vm == "late"
                        update = self._end("completed" if completed else "cancelled")
                        reply = {"accepted": not completed, "runs_at": update["runs_at"]}
                        lines.write(_line({"update": update}) + _line({"cancelled": reply}))
                        return

    def _end(self, outcome: str, error: str = "") -> dict[str, Any]:
        phase = "done" if outcome == "completed" else "aborted"
        update = self._update(phase, outcome, error)
        self._note({"state": phase})
        self._note({"update": update})
        return update

    def _update(self, phase: str, outcome: str = "running", error: str = "") -> dict[str, Any]:
        return {
            "migration": self._migration["id"],
            "host": self._migration["source"],
            "phase": phase,
            "outcome": outcome,
            "runs_at": "beta" if outcome == "completed" else "alpha",
            "error_code": "host-lost" if error else "",
            "error": error,
        }

    def _note(self, entry: dict[str, Any]) -> None:
        self._journal.write(_line(entry))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


if __name__ == "__main__":
    main()
