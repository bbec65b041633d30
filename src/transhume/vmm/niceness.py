"""How much a process steps back behind the others on its host."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

USUAL = 0
LEAST_URGENT = 19


def set_niceness(pid: int, niceness: int) -> None:
    """Set it for all threads of a process that has a session of its own; best effort, never raises.

    Where the kernel shares out the CPUs by session (sched_autogroup, as Debian does), the niceness of a
    thread counts only within its session, so the session gets it too.
    """
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))
