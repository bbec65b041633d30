"""Whether an image is open for writing, by the lock that QEMU holds; with QEMU: tests/e2e/test_revival.py."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from transhume.vmm.image_lock import WRITER_BYTE, has_writer

F_OFD_SETLK = 37


@pytest.mark.parametrize(("byte", "writes"), [(WRITER_BYTE, True), (WRITER_BYTE - 1, False)])
def test_only_the_byte_of_writers_counts(tmp_path: Path, byte: int, writes: bool) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    assert not has_writer(str(image))
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        assert has_writer(str(image)) is writes
    finally:
        os.close(fd)
    assert not has_writer(str(image))


def test_an_image_that_cannot_be_opened_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        has_writer(str(tmp_path / "none.img"))
