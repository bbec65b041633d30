"""The initramfs archive, read back by a program that others wrote."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from transhume.demo.guest import cpio

BUSYBOX = Path("/bin/busybox")

needs_busybox = pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox is not installed")


@needs_busybox
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 4096])
def test_content_comes_out_as_it_went_in(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * 16
    entries = [
        cpio.directory("bin"),
        cpio.program("bin/first", content[:size]),
        cpio.plain_file("second", b"last"),
    ]
    subprocess.run([BUSYBOX, "cpio", "-i"], input=cpio.archive(entries), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/first").read_bytes() == content[:size]
    assert stat.S_IMODE((tmp_path / "bin/first").stat().st_mode) == 0o755
    assert (tmp_path / "second").read_bytes() == b"last"


@needs_busybox
@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes need root")
def test_a_device_node_keeps_its_numbers(tmp_path: Path) -> None:
    archive = cpio.archive([cpio.character_device("console", 5, 1)])
    subprocess.run([BUSYBOX, "cpio", "-i"], input=archive, cwd=tmp_path, check=True)
    node = (tmp_path / "console").stat()
    assert stat.S_ISCHR(node.st_mode)
    assert (os.major(node.st_rdev), os.minor(node.st_rdev)) == (5, 1)


def test_the_same_content_gives_the_same_bytes() -> None:
    assert cpio.archive([cpio.plain_file("a", b"x")]) == cpio.archive([cpio.plain_file("a", b"x")])
