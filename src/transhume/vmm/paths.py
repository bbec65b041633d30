"""Where a VM's files are: one folder for each VM, made so that a QEMU gone bad can do little in it."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transhume.model.errors import Refused
from transhume.vmm.rights import user_rights

UNIX_PATH_LIMIT_BYTES = 107
"""Longest path of a Unix socket (`sun_path` holds 108 bytes with the final zero)."""


@dataclass(frozen=True)
class VmPaths:
    """The files of one VM under `directory` (`vms/<name>` of the state folder)."""

    directory: Path

    @property
    def spec_file(self) -> Path:
        return self.directory / "spec.json"

    @property
    def run_file(self) -> Path:
        """Which process runs the VM, see `transhume.vmm.process`."""
        return self.directory / "run.json"

    @property
    def epoch_file(self) -> Path:
        """Under which epoch the VM runs here, see `transhume.vmm.epoch`."""
        return self.directory / "epoch"

    @property
    def qmp_socket(self) -> Path:
        """The daemon's monitor."""
        return self.directory / "qmp.sock"

    @property
    def mover_qmp_socket(self) -> Path:
        """The mover's monitor: a second one, since QEMU talks to one client on each."""
        return self.directory / "qmp-mover.sock"

    @property
    def serial_socket(self) -> Path:
        return self.directory / "serial.sock"

    @property
    def serial_log(self) -> Path:
        return self.directory / "serial.log"

    @property
    def vnc_socket(self) -> Path:
        return self.directory / "vnc.sock"

    @property
    def qemu_log(self) -> Path:
        """Everything that QEMU itself said on its standard output and error."""
        return self.directory / "qemu.log"

    def check_lengths(self) -> None:
        """Raise `Refused` when a socket of this folder would not fit into a Unix socket address."""
        longest = max((self.mover_qmp_socket, self.serial_socket), key=lambda path: len(os.fsencode(path)))
        length = len(os.fsencode(longest))
        if length > UNIX_PATH_LIMIT_BYTES:
            raise Refused(
                f"the socket {longest} would have a path of {length} bytes, and Linux allows "
                f"{UNIX_PATH_LIMIT_BYTES}: choose a shorter state folder or VM name"
            )


def make_vm_dir(paths: VmPaths, vm_user: str) -> None:
    """Make the VM's folder (and set its owner and mode right when it exists).

    QEMU, running as `vm_user`, must make sockets and its serial log here, but the daemon (root) trusts
    `run.json` and `spec.json`: so the folder belongs to root and to the group of `vm_user`, which may
    write, and the sticky bit keeps it from replacing files that are not its own.
    """
    paths.check_lengths()
    _, group, _ = user_rights(vm_user)
    paths.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(paths.directory, os.geteuid(), group)
    paths.directory.chmod(stat.S_ISVTX | 0o770)


def replace_file(path: Path, text: str) -> None:
    """Write a file of the daemon's: whole or not at all, also when the machine dies meanwhile, and never
    through a link that QEMU may have made under this name.
    """
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
