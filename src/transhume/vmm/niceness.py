"""How much a process steps back behind the others on its host, or a thread before them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

USUAL = 0
LEAST_URGENT = 19
STEP_BACK = 10


def put_this_thread_first() -> None:
    """Let the calling thread run as soon as it can; best effort, never raises.

    For a thread that mostly waits and on which a vCPU waits in turn: on a busy host the usual scheduler would
    let it wait for milliseconds each time.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def put_this_thread_back() -> None:
    """Let the calling thread give way to the process's others; best effort, never raises."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, STEP_BACK)  # for Linux a thread, and 0 the calling one


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
