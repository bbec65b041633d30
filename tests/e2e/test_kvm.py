"""The engine under KVM, wherever /dev/kvm opens: a guest of 512 bytes moves there and back, and judges it.

The daemons choose KVM only where a stock guest runs with it, which a host that is a guest itself often cannot
do. The boot sector runs there all the same, in real mode and with a plain CPU model, so these tests drive
both ends of the product's engine directly: without daemons, with a register in memory, as root (whom the
device's mode does not keep out).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.boot_guest import (
    PAGE_COUNT,
    assemble,
    fill_still_pages,
    make_disk,
    read_still_pages,
    read_sweeps,
)
from tests.e2e.farm import until
from tests.trust.identities import credentials, new_authority

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.destination_driver import DestinationDriver
from transhume.migration.driver.job import MoverJob, Role
from transhume.migration.driver.journal import Journal
from transhume.migration.driver.source_driver import SourceDriver
from transhume.model.migration import Engine, Migration, MigrationOptions, Mode, Outcome, Phase, Rest
from transhume.model.orders import MigrationUpdate, Prepared, SwapReply
from transhume.model.vm import PAGE_BYTES, Accel, Disk, Ownership, VmSpec
from transhume.trust.credentials import Credentials
from transhume.vmm.capabilities import KVM_DEVICE, probe_qemu
from transhume.vmm.command_line import ram_blocks
from transhume.vmm.launch import launch
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import find_running

pytestmark = pytest.mark.timeout(240)

ROOT = "root"
PLAIN_CPU = "qemu64"
SLOW_BYTES_S = 256 << 10
PAGING_ORDERS: dict[str, dict[str, Any]] = {
    "post-copy": {"mode": Mode.POST_COPY, "bandwidth_bytes_s": SLOW_BYTES_S},
    "hybrid": {"mode": Mode.HYBRID, "bandwidth_bytes_s": 4 * SLOW_BYTES_S, "max_downtime_ms": 1.0},
    "on demand": {"mode": Mode.POST_COPY, "rest": Rest.ON_DEMAND, "deadline_s": 4.0},
    "in the background": {"mode": Mode.POST_COPY, "rest": Rest.BACKGROUND},
}


@pytest.fixture(autouse=True)
def kvm() -> None:
    """Skip, with the reason, where there is no KVM."""
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"{KVM_DEVICE} does not open here: {error.strerror}")


class Register:
    """One VM's owner and epoch, in memory. A migration that ends without a swap raises the epoch."""

    def __init__(self) -> None:
        self.held = Ownership(owner="alpha", epoch=1)
        self.records: dict[str, Migration] = {}

    async def ownership(self, vm: str) -> Ownership:
        return self.held

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        won = self.held == expected
        if won:
            self.held = wanted
        return SwapReply(won=won, owner=self.held.owner, epoch=self.held.epoch)

    async def migration(self, migration: str) -> Migration:
        return self.records[migration]

    def close(self, migration: Migration) -> None:
        if self.held == Ownership(owner=migration.source, epoch=migration.epoch):
            self.held = Ownership(owner=migration.source, epoch=migration.epoch + 1)


class Voice(ControlServer):
    """What a mover says, kept for the test instead of sent to a daemon."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "unused.sock")
        self.where: asyncio.Future[Prepared] = asyncio.get_running_loop().create_future()
        self.latest: MigrationUpdate | None = None

    def publish(self, update: MigrationUpdate) -> None:
        self.latest = update

    def prepared(self, prepared: Prepared) -> None:
        self.where.set_result(prepared)


class Move:
    """One migration between two folders that stand for hosts."""

    def __init__(self, hosts: Hosts, source: str, destination: str, options: MigrationOptions) -> None:
        self._hosts = hosts
        self.migration = Migration(
            id=f"m{len(hosts.register.records)}",
            vm="vm",
            source=source,
            destination=destination,
            epoch=hosts.register.held.epoch,
            options=options,
        )
        hosts.register.records[self.migration.id] = self.migration
        self.source: SourceDriver | None = None
        self._said = Voice(hosts.folder)

    async def run(self) -> MigrationUpdate:
        """Both ends, to the end; what the source says last."""
        waiting = Voice(self._hosts.folder)
        destination = DestinationDriver(
            self._job(Role.DESTINATION),
            self._hosts.paths(self.migration.destination),
            self._journal(Role.DESTINATION),
            self._hosts.register,
            waiting,
            "127.0.0.1",
            ROOT,
            self._credentials(self.migration.destination),
        )
        receiving = asyncio.create_task(destination.run())
        prepared = await asyncio.wait_for(waiting.where, 60)
        self.source = SourceDriver(
            self._job(Role.SOURCE, prepared),
            self._hosts.paths(self.migration.source),
            self._journal(Role.SOURCE),
            self._hosts.register,
            self._said,
            self._credentials(self.migration.source),
        )
        await asyncio.wait_for(asyncio.gather(self.source.run(), receiving), 120)
        self._hosts.register.close(self.migration)
        update = self._said.latest
        assert update is not None
        return update

    def _credentials(self, host: str) -> Credentials:
        return credentials(self._hosts.folder / f"identity-{host}", self._hosts.authority, host)

    @property
    def phase(self) -> Phase:
        return self._said.latest.phase if self._said.latest else Phase.REQUESTED

    def _job(self, role: Role, prepared: Prepared | None = None) -> MoverJob:
        spec = self._hosts.spec
        return MoverJob(
            role=role,
            migration=self.migration,
            spec=spec,
            ram_blocks=ram_blocks(spec),
            state_dir=self._hosts.folder,
            prepared=prepared,
        )

    def _journal(self, role: Role) -> Journal:
        return Journal(self._hosts.folder / f"{self.migration.id}-{role.value}.jsonl")


class Hosts:
    """Two folders that stand for hosts, and one VM under KVM that runs on one of them."""

    def __init__(self, folder: Path, spec: VmSpec) -> None:
        self.folder = folder
        self.spec = spec
        self.register = Register()
        self.authority = new_authority()

    def paths(self, host: str) -> VmPaths:
        return VmPaths(self.folder / host / "vm")

    async def boot(self) -> None:
        """Start the guest on alpha and wait until it sweeps."""
        launched = await launch(self.spec, self.paths("alpha"), vm_user=ROOT)
        await launched.monitor.close()
        launched.process.close()

        async def sweeps() -> bool:
            return (await read_sweeps(self.paths("alpha").directory)).newest > 2

        await until(sweeps, "the guest sweeps")

    async def move(self, there: str, **options: object) -> MigrationUpdate:
        here = "beta" if there == "alpha" else "alpha"
        return await Move(self, here, there, MigrationOptions.model_validate(options)).run()

    def runs_on(self) -> list[str]:
        found = []
        for host in ("alpha", "beta"):
            process = find_running(self.paths(host))
            if process is not None:
                process.close()
                found.append(host)
        return found

    def touched_bytes(self, host: str) -> int:
        """How much of the guest's RAM has memory behind it."""
        process = find_running(self.paths(host))
        assert process is not None
        ram = GuestRam.of_process(process.pid)
        try:
            return sum(page_runs.page_count(runs) for runs in ram.populated_runs()) * PAGE_BYTES
        finally:
            ram.close()
            process.close()

    async def assert_sound(self, host: str, at_least: int = 0) -> int:
        """The guest runs there and nowhere else, whole, and goes on. Its newest sweep."""
        assert self.runs_on() == [host]
        assert self.register.held.owner == host
        directory = self.paths(host).directory
        first = await read_sweeps(directory)
        assert first.fault() == ""
        assert first.newest >= at_least

        async def goes_on() -> bool:
            return (await read_sweeps(directory)).newest > first.newest

        await until(goes_on, "the guest goes on")
        last = await read_sweeps(directory)
        assert last.fault() == ""
        return last.newest

    async def end(self) -> None:
        for host in ("alpha", "beta"):
            process = find_running(self.paths(host))
            if process is not None:
                await process.kill()
                process.close()


@pytest.fixture
async def hosts(short_dir: Path) -> AsyncIterator[Hosts]:
    disk = short_dir / "disk.img"
    make_disk(disk, assemble(short_dir), ROOT)
    spec = VmSpec(
        name="vm",
        memory_bytes=48 << 20,
        cpus=1,
        disks=(Disk(path=str(disk)),),
        accel=Accel.KVM,
        machine_type=(await probe_qemu()).default_machine_type,
        cpu_model=PLAIN_CPU,
    )
    made = Hosts(short_dir, spec)
    yield made
    await made.end()


@pytest.mark.parametrize(("engine", "cpus", "nodes"), [(Engine.TRANSHUME, 2, 2), (Engine.QEMU, 1, 1)])
async def test_a_vm_moves_there_and_back_under_kvm(
    hosts: Hosts, engine: Engine, cpus: int, nodes: int
) -> None:
    hosts.spec = hosts.spec.model_copy(update={"cpus": cpus, "numa_nodes": nodes})
    await hosts.boot()
    newest = await hosts.assert_sound("alpha")
    touched_bytes = hosts.touched_bytes("alpha")
    assert touched_bytes < hosts.spec.memory_bytes // 2
    for epoch, there in ((2, "beta"), (3, "alpha")):
        update = await hosts.move(there, engine=engine, post_copy=False, verify=engine is Engine.TRANSHUME)
        assert update.outcome is Outcome.COMPLETED, update.error
        assert update.runs_at == f"destination host {there}"
        assert update.report is not None
        assert update.report.downtime.total_ms > 0
        sent = update.report.iterations[0]
        # QEMU reports all of its passes as one, with the number of the last.
        assert sent.wire_bytes < (touched_bytes + (1 << 20)) * (sent.index + 1), "nothing else travels"
        assert (update.report.downtime.verify_ms > 0) == (engine is Engine.TRANSHUME)
        assert hosts.register.held == Ownership(owner=there, epoch=epoch)
        newest = await hosts.assert_sound(there, newest)


async def test_a_cancel_and_then_many_passes_under_kvm(hosts: Hosts) -> None:
    """The guest writes through second-level page tables: after a cancel too, each pass finds its writes."""
    await hosts.boot()
    newest = await hosts.assert_sound("alpha")
    move = Move(hosts, "alpha", "beta", MigrationOptions(bandwidth_bytes_s=SLOW_BYTES_S))
    running = asyncio.create_task(move.run())

    async def in_precopy() -> bool:
        return move.phase is Phase.PRECOPY

    await until(in_precopy, "the pre-copy")
    assert move.source is not None
    reply = await move.source.cancel()
    update = await running
    assert reply.accepted
    assert update.outcome is Outcome.CANCELLED
    newest = await hosts.assert_sound("alpha", newest)

    update = await hosts.move(
        "beta",
        verify=True,
        post_copy=False,
        bandwidth_bytes_s=1 << 20,
        max_downtime_ms=1.0,
        max_iterations=4,
    )
    assert update.outcome is Outcome.COMPLETED, update.error
    assert update.report is not None
    passes = [each for each in update.report.iterations if not each.suspended]
    assert len(passes) >= 3
    assert all(each.dirty_pages_after >= PAGE_COUNT for each in passes)
    await hosts.assert_sound("beta", newest)


async def test_no_page_is_lost_that_kvm_waits_for(hosts: Hosts) -> None:
    """The vCPU itself stops at each page that has not come, inside the kernel, and goes on with what comes.

    In each order, there and back: the next paging begins on the memory that the one before has filled.
    """
    await hosts.boot()
    still = fill_still_pages(hosts.paths("alpha").directory)
    newest = await hosts.assert_sound("alpha")
    for number, (order, options) in enumerate(PAGING_ORDERS.items()):
        there = "alpha" if number % 2 else "beta"
        update = await hosts.move(there, **options)
        assert update.outcome is Outcome.COMPLETED, f"{order}: {update.error}"
        assert update.report is not None
        paging = update.report.paging
        assert paging is not None
        assert paging.fetched_pages + paging.pushed_pages >= paging.owed_pages > 0, order
        if options.get("rest") is Rest.BACKGROUND:
            assert paging.fetched_pages == 0, "nothing is asked for"
            assert paging.pushed_pages >= paging.owed_pages
        elif options["mode"] is Mode.POST_COPY:
            assert paging.owed_pages > PAGE_COUNT + still.page_count
            # Not all that it writes: the push goes on around what it has fetched.
            assert paging.fetched_pages > 0, f"{order}: the vCPU fetched what it writes"
            assert paging.pushed_pages >= still.page_count, f"{order}: nobody touches those"
        newest = await hosts.assert_sound(there, newest)
        assert read_still_pages(hosts.paths(there).directory, still.page_count) == still.content, order


async def test_paging_under_kvm_is_verified_by_hash(hosts: Hosts) -> None:
    """What the vCPU has not written since its first instruction is the same at both ends."""
    await hosts.boot()
    still = fill_still_pages(hosts.paths("alpha").directory)
    newest = await hosts.assert_sound("alpha")
    # The pace leaves the guest time for its writes before the last page has come.
    update = await hosts.move("beta", mode=Mode.POST_COPY, verify=True, bandwidth_bytes_s=1 << 20)
    assert update.outcome is Outcome.COMPLETED, update.error
    assert update.report is not None
    paging = update.report.paging
    assert paging is not None
    assert paging.verified_pages >= still.page_count
    assert paging.written_pages >= PAGE_COUNT
    await hosts.assert_sound("beta", newest)
    assert read_still_pages(hosts.paths("beta").directory, still.page_count) == still.content
