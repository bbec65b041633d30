"""Real QEMUs for the tests of this room, without KVM, as the user that the product uses too."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.vmm.machines import VM_USER, Machines


@pytest.fixture(scope="session")
def vm_user() -> str:
    """The unprivileged user for QEMU, made if this machine has none yet."""
    try:
        pwd.getpwnam(VM_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", VM_USER]
        subprocess.run(command, check=True)
    return VM_USER


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder with a short name (sockets are in it) that the VM's user may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def machines(root: Path, vm_user: str) -> AsyncIterator[Machines]:
    """Starts QEMUs and ends every one of them after the test."""
    made = Machines(root, vm_user)
    yield made
    await made.end_all()
