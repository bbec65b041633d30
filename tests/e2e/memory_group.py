"""A control group that bounds the memory of a few processes, of whichever version the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CGROUPS = Path("/sys/fs/cgroup")
_VERSION_1 = CGROUPS / "memory"


@contextmanager
def memory_group(name: str) -> Iterator[Path]:
    """A control group for memory; it must be empty at the end.

    Skips, with the reason, where none can be made.
    """
    folder = _root() / name
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made at {folder}: {error.strerror}")
    try:
        if not limit_file(folder).exists():
            pytest.skip(f"control groups at {CGROUPS} have no memory controller")
        yield folder
    finally:
        folder.rmdir()


def limit_file(group: Path) -> Path:
    """Where the most that the group may use is written, in bytes."""
    return group / ("memory.limit_in_bytes" if _VERSION_1.is_dir() else "memory.max")


def used_bytes(group: Path) -> int:
    """What the group uses now."""
    names = ("memory.usage_in_bytes", "memory.current")
    return next(int((group / name).read_text()) for name in names if (group / name).exists())


def let_wait_for_memory(group: Path) -> None:
    """Let nobody be ended when the limit is reached: system calls are refused, first touches wait.

    Skips where the kernel has no such choice, which is version 2.
    """
    choice = group / "memory.oom_control"
    if not choice.exists():
        pytest.skip("control groups of version 2 always end a process that is out of memory")
    choice.write_text("1")


def release(group: Path) -> None:
    """Let the processes that are left in the group go on outside it."""
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(OSError):
            (_root() / "cgroup.procs").write_text(pid)


def _root() -> Path:
    return _VERSION_1 if _VERSION_1.is_dir() else CGROUPS
