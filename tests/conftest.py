"""What tests of several rooms share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from transhume.demo.guest.build import Guest, ensure_guest


@pytest.fixture(scope="session")
def guest() -> Guest:
    """The guest's kernel and initramfs; making them the first time takes some seconds."""
    return ensure_guest()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder with a path short enough for Unix sockets, which QEMU's user may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
