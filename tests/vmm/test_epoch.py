"""The epoch in a VM's folder: kept until its QEMU is forgotten, and only from whom it may come."""

from __future__ import annotations

import os
from pathlib import Path

from transhume.vmm.epoch import UNKNOWN, note_epoch, read_epoch
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import forget


def test_it_goes_with_its_qemu(tmp_path: Path) -> None:
    paths = VmPaths(tmp_path)
    assert read_epoch(paths) == UNKNOWN
    note_epoch(paths, 7)
    note_epoch(paths, 8)
    assert read_epoch(paths) == 8
    forget(paths)
    assert read_epoch(paths) == UNKNOWN


def test_what_qemu_wrote_there_proves_nothing(tmp_path: Path) -> None:
    paths = VmPaths(tmp_path)
    paths.epoch_file.write_text("99\n")
    os.chown(paths.epoch_file, 65534, 65534)
    assert read_epoch(paths) == UNKNOWN
    note_epoch(paths, 3)
    assert read_epoch(paths) == 3
    paths.epoch_file.unlink()
    paths.epoch_file.symlink_to("/etc/hostname")
    assert read_epoch(paths) == UNKNOWN
