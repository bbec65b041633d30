"""What the running kernel can do is tried, and told in sentences."""

from __future__ import annotations

import os

import pytest
from tests.memory.processes import needs_tracking

from transhume.memory import kernel, pagemap, userfaultfd
from transhume.memory.kernel import tracking_obstacles


@needs_tracking
def test_nothing_is_left_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    assert tracking_obstacles() == ()
    assert sorted(os.listdir("/proc/self/fd")) == before


@needs_tracking
@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        (userfaultfd, "DEVICE", "/dev/no-such-device", "6.1"),
        (userfaultfd, "FEATURES", 1 << 60, "6.7"),
        (pagemap, "_PAGEMAP_SCAN", 0xC0606699, "PAGEMAP_SCAN"),
        (kernel, "_CAP_SYS_PTRACE", 63, "CAP_SYS_PTRACE"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object, words: str
) -> None:
    monkeypatch.setattr(module, name, value)
    before = sorted(os.listdir("/proc/self/fd"))
    (obstacle,) = tracking_obstacles()
    assert words in obstacle
    assert sorted(os.listdir("/proc/self/fd")) == before
