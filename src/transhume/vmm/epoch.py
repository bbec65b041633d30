"""The epoch under which a VM runs on this host, in its folder: what its host can prove to the register.

The register's epochs only rise, unless somebody brings an old copy of the store back. Then the host that runs
a VM knows better than the register, and must not end the VM on its word. The file goes with the QEMU that it
is about: `transhume.vmm.process.forget` removes it.
"""

from __future__ import annotations

import os

from transhume.vmm.paths import VmPaths, replace_file

UNKNOWN = 0
"""Nobody has noted it yet; real epochs begin above."""


def note_epoch(paths: VmPaths, epoch: int) -> None:
    """Write it down, durably. Raises `OSError` when the disk does not take it."""
    replace_file(paths.epoch_file, f"{epoch}\n")


def read_epoch(paths: VmPaths) -> int:
    """What was noted, or `UNKNOWN`: also for a file that QEMU has made, which proves nothing."""
    try:
        descriptor = os.open(paths.epoch_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return UNKNOWN
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return UNKNOWN
        text = file.read(32).strip()
    return int(text) if text.isdigit() else UNKNOWN
