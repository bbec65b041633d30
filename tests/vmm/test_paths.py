"""The VM's folder: QEMU may make files in it, and change none of the daemon's."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from transhume.vmm.paths import VmPaths, make_vm_dir


def test_qemu_cannot_replace_what_the_daemon_trusts(root: Path, vm_user: str) -> None:
    paths = VmPaths(root / "vm")
    make_vm_dir(paths, vm_user)
    paths.run_file.write_text("{}")
    entry = pwd.getpwnam(vm_user)

    def as_qemu(*command: str) -> int:
        return subprocess.run(
            command,
            user=entry.pw_uid,
            group=entry.pw_gid,
            extra_groups=[],
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode

    assert as_qemu("touch", str(paths.directory / "new")) == 0
    assert as_qemu("mv", str(paths.directory / "new"), str(paths.run_file)) != 0
    assert as_qemu("rm", "-f", str(paths.run_file)) != 0
    assert paths.run_file.read_text() == "{}"


def test_an_existing_folder_is_set_right(root: Path, vm_user: str) -> None:
    paths = VmPaths(root / "vm")
    paths.directory.mkdir(mode=0o755)
    make_vm_dir(paths, vm_user)
    found = paths.directory.stat()
    assert found.st_mode & 0o7777 == 0o1770
    assert (found.st_uid, found.st_gid) == (os.geteuid(), pwd.getpwnam(vm_user).pw_gid)
