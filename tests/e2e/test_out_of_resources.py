"""What happens when a disk or the memory of a host is used up in the middle of a migration.

The farm here is one of its own: its hosts have small disks, which a test can fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.farm import Farm, until
from tests.e2e.memory_group import limit_file, memory_group, used_bytes

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab
from transhume.memory.ram import GuestRam
from transhume.model.errors import StoreFull
from transhume.model.migration import Engine, Migration, MigrationOptions, Outcome, Phase

pytestmark = pytest.mark.timeout(240)

DISK_BYTES = 16 << 20
PACED_BYTES_S = 1 << 20
GUEST_BYTES = 256 << 20
FILLED_BYTES = 160 << 20
ALLOWANCE_BYTES = 128 << 20
"""What a host may use for a VM with so much memory, beyond what its daemon had: too little."""


@pytest.fixture(scope="module")
def running_farm(guest: Guest) -> Iterator[Farm]:
    """Two hosts with a small disk each."""
    disks = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    disks.chmod(0o755)
    try:
        with Lab() as lab, contextlib.ExitStack() as stack:
            for host in lab.hosts:
                stack.enter_context(small_disk(host.state_dir))
            farm = Farm(lab, disks, guest)
            asyncio.run(farm.form())
            yield farm
    finally:
        shutil.rmtree(disks, ignore_errors=True)


@pytest_asyncio.fixture
async def farm(running_farm: Farm) -> AsyncIterator[Farm]:
    """The farm, cleared before and after each test."""
    await running_farm.clear()
    yield running_farm
    await running_farm.clear()


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    options = f"size={DISK_BYTES},mode=0711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        # Lazily: the daemons still have files open there, and end with the lab.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def full(farm: Farm, host: str) -> Iterator[None]:
    """Fill a host's disk to the last byte, and free it again."""
    filler = farm.lab[host].state_dir / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))
        yield
    finally:
        filler.unlink(missing_ok=True)


@asynccontextmanager
async def inside(farm: Farm, host: str, group: Path) -> AsyncIterator[None]:
    """Let a host's daemon, and all that it starts, live in a control group."""
    await stop_daemon(farm, host)
    daemon = farm.lab[host].transhume_command()[:2]
    script = 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"'
    farm.lab[host].start(
        *("sh", "-c", script, "sh", str(group)),
        *(*daemon, "transhume.daemon", "--state-dir", str(farm.lab[host].state_dir)),
        start_new_session=True,
    )
    try:
        await until(lambda: farm._answers(host), f"the daemon of {host} answers")
        yield
    finally:
        # As a service manager would, with more room: what is left is found and ended by the next daemon.
        if await farm._answers(host):
            await stop_daemon(farm, host)
        await farm.start_daemon(host)
        await until(lambda: empty(group), f"nothing of {host} is left in its control group")


async def stop_daemon(farm: Farm, host: str) -> None:
    farm.kill_daemon(host, signal.SIGKILL)
    await farm.daemon_gone(host)


async def empty(group: Path) -> bool:
    return not (group / "cgroup.procs").read_text()


async def until_source_went_on(farm: Farm) -> None:
    """Nothing of the VM is left at the destination; the record may still wait for room."""

    async def alone() -> bool:
        return farm.runs_on("vm") == ["alpha"] and not farm.vm_dir("vm", "beta").exists()

    await until(alone, "the destination has given up")


@pytest.mark.parametrize("engine", list(Engine))
async def test_the_stores_disk_is_full_at_the_commit(farm: Farm, engine: Engine) -> None:
    """The register refuses the commit, so the VM goes on at the source, whose journal lies there too."""
    await farm.boot("vm")
    newest = await farm.assert_sound("vm", "alpha")
    options = {"bandwidth_bytes_s": PACED_BYTES_S // 2, "max_downtime_ms": 3000.0}
    migration = await farm.begin("vm", "beta", engine=engine, **options)
    await farm.in_phase(migration, Phase.PRECOPY)
    with full(farm, "alpha"):
        await until_source_went_on(farm)
        newest = await farm.assert_sound("vm", "alpha", newest)
        async with farm.client() as client:
            assert (await client.migration(migration)).outcome is Outcome.RUNNING, "it cannot be written yet"
    record = await farm.ended(migration)
    assert record.outcome is Outcome.FAILED
    assert record.error_code == "store-full"
    assert "the disk of the farm's store" in record.error
    assert "is full and nothing was written; make room there" in record.error
    assert record.runs_at == "source host alpha"
    await farm.assert_nothing_left("vm", "beta")
    again = await farm.migrate("vm", "beta", engine=engine)
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", "beta", newest)


async def test_a_disk_that_is_full_for_a_while_during_the_precopy_changes_nothing(farm: Farm) -> None:
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=PACED_BYTES_S // 4)
    await farm.in_phase(migration, Phase.PRECOPY)
    with full(farm, "alpha"), full(farm, "beta"):
        async with farm.client() as client:
            before = await client.migration(migration)

            async def further() -> bool:
                now = (await client.migration(migration)).progress
                assert before.progress is not None
                assert now is not None
                return now.wire_bytes > before.progress.wire_bytes

            await until(further, "the pre-copy goes on and is heard of")
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "alpha")


async def test_no_migration_begins_on_a_full_store(farm: Farm) -> None:
    await farm.boot("vm")
    async with farm.client() as client:
        before = await client.migrations()
        with full(farm, "alpha"), pytest.raises(StoreFull, match="make room there"):
            await client.migrate("vm", "beta", MigrationOptions())
        assert await client.migrations() == before
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")
    assert (await farm.migrate("vm", "beta")).outcome is Outcome.COMPLETED


async def test_the_destinations_disk_is_full_from_the_begin(farm: Farm) -> None:
    await farm.boot("vm")
    with full(farm, "beta"):
        record = await farm.migrate("vm", "beta")
    assert record.outcome is Outcome.FAILED
    assert "No space left on device" in record.error
    assert record.runs_at == "source host alpha"
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")
    assert (await farm.migrate("vm", "beta")).outcome is Outcome.COMPLETED


async def test_the_destination_runs_out_of_memory(farm: Farm) -> None:
    """The kernel ends whatever it chooses of the destination's processes, maybe all: the source goes on."""
    with memory_group(f"transhume-test-{os.getpid()}") as group:
        await farm.boot("vm", memory_bytes=GUEST_BYTES)
        newest = await farm.assert_sound("vm", "alpha")
        fill_guest(farm.qemu_pid("vm", "alpha"))
        async with inside(farm, "beta", group):
            limit_file(group).write_text(str(used_bytes(group) + ALLOWANCE_BYTES))
            record = await ended_at_source(farm, await farm.begin("vm", "beta"))
            assert record.outcome is Outcome.FAILED
            assert record.runs_at == "source host alpha"
            newest = await farm.assert_sound("vm", "alpha", newest)
        await until_source_went_on(farm)
        await farm.assert_nothing_left("vm", "beta")
    again = await farm.migrate("vm", "beta")
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", "beta", newest)


async def ended_at_source(farm: Farm, migration: str) -> Migration:
    """The record when it has ended, whether or not the destination could clean up."""

    async def over() -> Migration | None:
        async with farm.client() as client:
            record = await client.migration(migration)
        return record if record.outcome is not Outcome.RUNNING else None

    record: Migration = await until(over, f"migration {migration} has ended")
    return record


def fill_guest(pid: int) -> None:
    """Give a small guest much memory that must travel."""
    ram = GuestRam.of_process(pid)
    try:
        block = ram.blocks[0]
        for offset_bytes in range(64 << 20, (64 << 20) + FILLED_BYTES, 1 << 20):
            os.pwrite(block.fd, os.urandom(4096) * 256, offset_bytes)
    finally:
        ram.close()
