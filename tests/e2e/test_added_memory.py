"""A VM that was given memory while it ran moves with it."""

from __future__ import annotations

import os

import pytest
from tests.e2e.farm import Farm

from transhume.demo.observer import Observer
from transhume.memory.ram import GuestRam
from transhume.model.errors import Conflict
from transhume.model.migration import Engine, MigrationOptions, Mode, Outcome
from transhume.model.vm import PAGE_BYTES

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
FIRST_PAGE, PAGES = 5000, 300


def fill(farm: Farm, host: str) -> bytes:
    """Content for pages of the second block, which the guest never touches."""
    content = b"".join(page.to_bytes(8, "little") * (PAGE_BYTES // 8) for page in range(1, PAGES + 1))
    ram = GuestRam.of_process(farm.qemu_pid("vm", host))
    try:
        os.pwrite(ram.blocks[1].fd, content, FIRST_PAGE * PAGE_BYTES)
    finally:
        ram.close()
    return content


def filled(farm: Farm, host: str) -> bytes:
    ram = GuestRam.of_process(farm.qemu_pid("vm", host))
    try:
        return os.pread(ram.blocks[1].fd, PAGES * PAGE_BYTES, FIRST_PAGE * PAGE_BYTES)
    finally:
        ram.close()


async def test_memory_that_was_added_moves_in_each_order(farm: Farm) -> None:
    await farm.boot("vm", max_memory_bytes=512 * MIB)
    async with farm.client() as client:
        grown = await client.pool.set_vm_memory("vm", (48 + 128) * MIB)
        assert grown.spec.memory_bytes == (48 + 128) * MIB
        content = fill(farm, "alpha")
        hops = ((Mode.POST_COPY, "beta"), (Mode.PRE_COPY, "alpha"), (Mode.HYBRID, "beta"))
        for mode, there in hops:
            record = await farm.migrate("vm", there, mode=mode, verify=True)
            assert record.outcome is Outcome.COMPLETED, record.error
            assert filled(farm, there) == content, mode
            await farm.assert_sound("vm", there)
        native = await client.dry_run("vm", "alpha", MigrationOptions(engine=Engine.QEMU))
        assert any("given memory while it ran" in reason for reason in native.reasons)
        begun = await farm.begin("vm", "alpha", bandwidth_bytes_s=128 << 10)
        with pytest.raises(Conflict, match="is moving"):
            await client.pool.set_vm_memory("vm", (48 + 256) * MIB)
        await client.cancel(begun)
        await farm.ended(begun)
        # What it has now, it has from its next start on.
        await client.kill_vm("vm")
        await client.start_vm("vm")
        assert (await client.vm("vm")).spec.memory_bytes == (48 + 128) * MIB


async def test_a_linux_guest_uses_what_it_is_given_and_keeps_it_when_it_moves(farm: Farm) -> None:
    await farm.boot_linux(
        "vm", append="memhp_default_state=online", memory_bytes=256 * MIB, max_memory_bytes=1024 * MIB
    )
    logs = [farm.vm_dir("vm", host) / "serial.log" for host in ("alpha", "beta")]
    with Observer(logs) as observer:
        observer.wait_until_ready(60)

        def seen_mib() -> int:
            return max(
                observer.ask(lambda timeline: [tick.memory_mib for tick in timeline.ticks()]), default=0
            )

        observer.wait_for(lambda timeline: len(timeline.ticks()) > 1, 60)
        before_mib = seen_mib()
        async with farm.client() as client:
            await client.pool.set_vm_memory("vm", (256 + 128) * MIB)
        observer.wait_for(
            lambda timeline: any(tick.memory_mib >= before_mib + 120 for tick in timeline.ticks()), 60
        )
        record = await farm.migrate("vm", "beta", mode=Mode.POST_COPY)
        assert record.outcome is Outcome.COMPLETED, record.error
        observer.wait_for_full_verification(60)
        ticks = observer.ask(lambda timeline: timeline.ticks())
    assert ticks[-1].memory_mib >= before_mib + 120
    assert {tick.corrupt for tick in ticks} == {0}
