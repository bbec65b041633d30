"""QEMU's own post-copy, as the yardstick of ours: two plain QEMU processes, without daemons and without a
register.

The product's engine for QEMU knows pre-copy only, and QEMU refuses post-copy for RAM that is mapped shared,
as ours is. So here the same guest runs in QEMUs with RAM of their own, as root (QEMU makes its userfaultfd
itself), on the same two hosts and the same wire. The gap is seen by the same observer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import QMPClient

from transhume.bench.stage import BOOT_LIMIT_S, MOVE_LIMIT_S, VERIFY_LIMIT_S, PagesWrong
from transhume.demo.guest.build import Guest, Workload
from transhume.demo.lab import Lab, LabHost
from transhume.demo.observer import Observer
from transhume.demo.serial_log import Timeline
from transhume.model.errors import MigrationError, TimedOut

PORT = 45454
_LOOK_S = 0.005


Watch = Callable[[float], float]
"""Told when the move has ended; tells how much of the guest's work it cost, in ms."""


@dataclass(frozen=True)
class QemuMove:
    """What one post-copy by QEMU came to: the guest's longest silence, the time to its end, and the work that
    was lost where somebody watched for it.
    """

    gap_ms: float
    total_ms: float
    lost_ms: float | None = None


def post_copy(
    lab: Lab,
    guest: Guest,
    memory_mib: int,
    workload: Workload,
    folder: Path,
    watch: Callable[[Observer], Watch] | None = None,
) -> QemuMove:
    """Boot the guest on the lab's first host and move it to the second, post-copy from the first byte.

    `watch` is called when the guest works, before it is moved. Raises `MigrationError` when QEMU fails,
    `PagesWrong` when the guest finds a wrong page. Nothing is left.
    """
    source, destination = lab.hosts
    logs = [folder / "source.log", folder / "destination.log"]
    for log in logs:
        log.touch()
    with (
        _qemu(source, guest, memory_mib, workload, folder / "source"),
        _qemu(destination, guest, memory_mib, workload, folder / "destination", destination.address),
        Observer(logs) as observer,
    ):
        observer.wait_until_ready(BOOT_LIMIT_S)
        lost = None if watch is None else watch(observer)
        began_s = time.monotonic()
        asyncio.run(_move(folder, destination.address))
        ended_s = time.monotonic()
        lost_ms = None if lost is None else lost(ended_s)
        observer.wait_for_full_verification(VERIFY_LIMIT_S)
        if observer.ask(Timeline.corrupt_pages):
            raise PagesWrong("pages were wrong after QEMU's post-copy")
        gap_ms = observer.longest_silence_ms(began_s, ended_s)
        return QemuMove(gap_ms, (ended_s - began_s) * 1000, lost_ms)


@contextmanager
def _qemu(
    host: LabHost, guest: Guest, memory_mib: int, workload: Workload, path: Path, incoming: str | None = None
) -> Iterator[None]:
    # fmt: off
    command = [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-nodefaults",
        "-no-user-config", "-display", "none", "-m", f"{memory_mib}M",
        "-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", workload.arguments(),
        "-chardev", f"null,id=serial,logfile={path}.log", "-serial", "chardev:serial",
        "-qmp", f"unix:{path}.qmp,server=on,wait=off",
    ]
    # fmt: on
    if incoming is not None:
        command += ["-incoming", "defer"]
    process = host.start(*command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def _move(folder: Path, address: str) -> None:
    source = await _connect(folder / "source.qmp", "source")
    destination = await _connect(folder / "destination.qmp", "destination")
    try:
        capabilities = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
        for each in (destination, source):
            await each.execute("migrate-set-capabilities", capabilities)
        uri = {"uri": f"tcp:{address}:{PORT}"}
        await destination.execute("migrate-incoming", uri)
        await source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        await source.execute("migrate", uri)
        await _status(source, "active")
        await source.execute("migrate-start-postcopy")
        await _status(source, "completed")
    finally:
        await source.disconnect()
        await destination.disconnect()


async def _status(source: QMPClient, wanted: str) -> None:
    deadline_s = time.monotonic() + MOVE_LIMIT_S
    while time.monotonic() < deadline_s:
        answer = await source.execute("query-migrate")
        assert isinstance(answer, dict)
        if answer.get("status") in (wanted, "completed"):
            return
        if answer.get("status") == "failed":
            raise MigrationError(f"QEMU's post-copy failed: {answer.get('error-desc', 'it says no reason')}")
        await asyncio.sleep(_LOOK_S)
    raise TimedOut(f"QEMU's post-copy did not end within {MOVE_LIMIT_S:g} s")


async def _connect(socket: Path, name: str) -> QMPClient:
    client = QMPClient(name)
    await client.connect(str(socket))
    return client
