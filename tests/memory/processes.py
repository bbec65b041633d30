"""Processes to look into: a Python child that does as it is told, and a QEMU without privileges."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from transhume.memory.kernel import tracking_obstacles

needs_tracking = pytest.mark.skipif(bool(tracking_obstacles()), reason=" ".join(tracking_obstacles()))


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Ask again and again; fail when the condition does not come true in time."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.002)


def make_memfd(size_bytes: int, index: int = 0) -> int:
    """A memfd named as guest RAM is, inherited by children that are given it."""
    fd = os.memfd_create(f"transhume-ram{index}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd


@dataclass
class Child:
    """A Python process that talks lines over its standard input and output."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def python_child(code: str, *arguments: object, fds: tuple[int, ...] = ()) -> Iterator[Child]:
    """Run code in another Python until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", code, *(str(each) for each in arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
    )
    try:
        yield Child(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


# Increments the first word of 128 pages from 64 KiB on, for ever, in real mode, as a BIOS of its own:
#   mov ax, 0x1000 / loop: mov ds, ax / inc word [0] / add ax, 0x100 / cmp ax, 0x9000 / jb loop / jmp start
_FIRMWARE_CODE = bytes.fromhex("b80010 8ed8 ff060000 050001 3d0090 72f2 ebed")
_FIRMWARE = (_FIRMWARE_CODE.ljust(0xFFF0, b"\x90") + bytes.fromhex("ea000000f0")).ljust(0x10000, b"\x90")
DIRTIED_PAGES = range(16, 144)
"""The pages of its RAM block 0 that the firmware increments."""


class Qemu:
    """A sandboxed QEMU of the user nobody, with RAM in memfds, and its monitor."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: socket.socket) -> None:
        self.process = process
        self._monitor = monitor
        self._lines = monitor.makefile("r")
        json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    @property
    def pid(self) -> int:
        return self.process.pid

    def execute(
        self, command: str, arguments: dict[str, object] | None = None, fds: tuple[int, ...] = ()
    ) -> dict[str, object]:
        text = json.dumps({"execute": command, "arguments": arguments or {}}).encode()
        socket.send_fds(self._monitor, [text], fds) if fds else self._monitor.sendall(text)
        while True:
            answer = json.loads(self._lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                result: dict[str, object] = answer["return"]
                return result

    @contextlib.contextmanager
    def holding(self, fd: int) -> Iterator[int]:
        """Lend a descriptor to QEMU; gives its number there."""
        answer = self.execute("add-fd", fds=(fd,))
        try:
            yield int(str(answer["fd"]))
        finally:
            self.execute("remove-fd", {"fdset-id": answer["fdset-id"]})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._monitor.close()


@contextlib.contextmanager
def qemu(memfds: tuple[int, ...], size_bytes: int, run: bool = False) -> Iterator[Qemu]:
    """Start QEMU with RAM blocks of that size; with `run`, its vCPU dirties `DIRTIED_PAGES` for ever."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    folder = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    os.chmod(folder, 0o755)
    (folder / "bios.bin").write_bytes(_FIRMWARE)
    os.chmod(folder / "bios.bin", 0o644)
    ours, theirs = socket.socketpair()
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    for index, fd in enumerate(memfds):
        backend = f"memory-backend-file,id=ram{index},size={size_bytes},share=on,mem-path=/proc/self/fd/{fd}"
        command += ["-object", backend]
    if run:
        command += [
            "-M",
            "pc,memory-backend=ram0",
            "-m",
            f"{size_bytes >> 20}",
            "-bios",
            f"{folder}/bios.bin",
        ]
    else:
        command += ["-M", "none"]
    command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=(*memfds, theirs.fileno()),
        user="nobody",
        group="nogroup",
        extra_groups=[],
        cwd="/",
    )
    theirs.close()
    machine: Qemu | None = None
    try:
        machine = Qemu(process, ours)
        yield machine
    finally:
        if machine is not None:
            machine.close()
        else:
            process.kill()
            process.wait()
            ours.close()
        shutil.rmtree(folder)
