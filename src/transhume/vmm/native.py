"""QEMU's own migration engine, guest RAM included: the fall-back, and the yardstick.

Both ends get a connected socket from us, so that who connects to whom is decided in one place for both
engines, and the stream can be encrypted on its way. The destination is started with `incoming` and stays
paused when it has loaded: who runs is decided by the register, not by QEMU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transhume.model.errors import VmmError
from transhume.vmm.device_state import LONGEST_DOWNTIME_LIMIT_MS, UNLIMITED_BYTES_S
from transhume.vmm.migrate_command import QemuMigration, set_capabilities
from transhume.vmm.monitor import Monitor


@dataclass(frozen=True)
class NativeOptions:
    """`max_bandwidth_bytes_s` None means as fast as possible. `downtime_limit_ms` is QEMU's promise."""

    downtime_limit_ms: int = 300
    max_bandwidth_bytes_s: int | None = None


@dataclass(frozen=True)
class NativeProgress:
    """QEMU's own numbers (`query-migrate`). Times that QEMU does not know yet are None."""

    status: str
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    dirty_pages_s: int = 0
    rate_bytes_s: float = 0.0
    iteration: int = 0
    expected_downtime_ms: int | None = None
    downtime_ms: int | None = None
    setup_ms: int | None = None
    total_ms: int | None = None
    error: str = ""


class NativeOutgoing:
    """The source of a migration by QEMU. QEMU stops the VM by itself when little enough is left."""

    def __init__(self, migration: QemuMigration) -> None:
        self._migration = migration

    @classmethod
    async def begin(cls, monitor: Monitor, socket_fd: int, options: NativeOptions) -> NativeOutgoing:
        """Start to send through the connected socket, of which QEMU gets a duplicate.

        QEMU chooses whether the socket blocks, for all duplicates: do not use it any more, only close it.
        Raises `VmmError` when QEMU refuses; the VM is as before then.
        """
        await set_capabilities(monitor, "events")
        await monitor.qmp.execute(
            "migrate-set-parameters",
            max_bandwidth=options.max_bandwidth_bytes_s or UNLIMITED_BYTES_S,
            downtime_limit=min(options.downtime_limit_ms, LONGEST_DOWNTIME_LIMIT_MS),
        )
        migration = QemuMigration(monitor)
        try:
            await migration.lend_channel(socket_fd)
            await migration.start("migrate")
        except BaseException:
            migration.close()
            raise
        return cls(migration)

    async def progress(self) -> NativeProgress:
        return _progress(await self._migration.query())

    async def wait_stopped(self, timeout_s: float | None = None) -> float:
        """Return when QEMU has stopped the VM: the moment, on this host's monotonic clock, in seconds."""
        return await self._migration.wait_stopped(timeout_s)

    async def finish(self, timeout_s: float | None = None) -> NativeProgress:
        """Wait until all was written. The VM is paused here then.

        Raises `VmmError` with QEMU's reason when it failed or was cancelled: QEMU lets a VM that ran
        before go on by itself in that case. `TimedOut` changes nothing: the migration goes on.
        """
        status = await self._migration.wait_ended(timeout_s)
        if status != "completed":
            raise VmmError(f"QEMU's own migration {status}: {await self._migration.reason()}")
        return await self.progress()

    async def cancel(self) -> bool:
        """Give up; returns when QEMU has: whether it did. The VM runs then if it ran before.

        False means that everything had been written already: the VM is paused here.
        """
        return await self._migration.cancel() != "completed"

    def close(self) -> None:
        """Stop listening to QEMU; what it does goes on. Safe to call at any time."""
        self._migration.close()


class NativeIncoming:
    """The destination of a migration by QEMU."""

    def __init__(self, migration: QemuMigration) -> None:
        self._migration = migration

    @classmethod
    async def begin(cls, monitor: Monitor, socket_fd: int) -> NativeIncoming:
        """Let QEMU read from the connected socket, of which it gets a duplicate."""
        await set_capabilities(monitor, "events", "late-block-activate")
        await monitor.qmp.execute("migrate-set-parameters", announce_rounds=0)
        migration = QemuMigration(monitor)
        try:
            await migration.lend_channel(socket_fd)
            await migration.start("migrate-incoming")
        except BaseException:
            migration.close()
            raise
        return cls(migration)

    async def finish(self, timeout_s: float | None = None) -> None:
        """Wait until everything is loaded; the VM is paused then, its disks untouched.

        Raises `VmmError` when the stream was broken; that QEMU is of no use any more.
        """
        try:
            status = await self._migration.wait_ended(timeout_s)
        except VmmError as error:
            raise VmmError(f"QEMU did not load the VM: {await self._migration.reason()}") from error
        if status != "completed":
            raise VmmError(f"QEMU did not load the VM: {await self._migration.reason()}")

    def close(self) -> None:
        """Stop listening to QEMU. Safe to call at any time."""
        self._migration.close()


def _progress(answer: dict[str, Any]) -> NativeProgress:
    ram: dict[str, Any] = answer.get("ram", {})
    return NativeProgress(
        status=str(answer.get("status", "none")),
        transferred_bytes=ram.get("transferred", 0),
        remaining_bytes=ram.get("remaining", 0),
        total_bytes=ram.get("total", 0),
        normal_pages=ram.get("normal", 0),
        zero_pages=ram.get("duplicate", 0),
        dirty_pages_s=ram.get("dirty-pages-rate", 0),
        rate_bytes_s=ram.get("mbps", 0.0) * 1e6 / 8,
        iteration=ram.get("dirty-sync-count", 0),
        expected_downtime_ms=answer.get("expected-downtime"),
        downtime_ms=answer.get("downtime"),
        setup_ms=answer.get("setup-time"),
        total_ms=answer.get("total-time"),
        error=str(answer.get("error-desc", "")),
    )
