"""`--verify` where pages are owed: every page that the guest has not written is compared when all are there.

A difference is found after the VM has begun to run at the destination, so it cannot be undone: it must be
said, by the record, with the place. What was not compared is never called verified.
"""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest
from tests.e2e.farm import Farm, until

from transhume.demo.observer import Observer
from transhume.memory.ram import GuestRam
from transhume.migration.driver.job import MoverFolder, Role
from transhume.model.migration import Migration, Mode, Outcome, Phase, Rest
from transhume.model.vm import PAGE_BYTES

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 128 << 10
SILENCE_LIMIT_S = 2.0
UNUSED_PAGE = 0x2000
"""The boot-sector guest has no use for it, so neither host has memory behind it."""

ORDERS: list[dict[str, Any]] = [
    {"mode": Mode.POST_COPY},
    {"mode": Mode.POST_COPY, "rest": Rest.BACKGROUND},
    {"mode": Mode.HYBRID},
    {"mode": Mode.PRE_COPY, "iterations": 2, "rest": Rest.ON_DEMAND, "deadline_s": 3.0},
    {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.BOTH},
    {"mode": Mode.PRE_COPY, "iterations": 2, "rest": Rest.BACKGROUND},
]


async def _paging(farm: Farm, **options: Any) -> str:
    await farm.boot("vm")
    fields: dict[str, Any] = {
        "mode": Mode.POST_COPY,
        "verify": True,
        "bandwidth_bytes_s": SLOW_BYTES_S,
        "peer_silence_limit_s": SILENCE_LIMIT_S,
    }
    migration = await farm.begin("vm", "beta", **{**fields, **options})
    await farm.in_phase(migration, Phase.PAGING)
    return migration


def _ram_pages(farm: Farm, vm: str, host: str) -> int:
    ram = GuestRam.of_process(farm.qemu_pid(vm, host))
    try:
        return ram.page_count
    finally:
        ram.close()


def _change_byte(farm: Farm, host: str) -> str:
    """Behind the back of QEMU and guest: no write of theirs is noticed. The block's name."""
    ram = GuestRam.of_process(farm.qemu_pid("vm", host))
    try:
        block = ram.blocks[0]
        assert os.pwrite(block.fd, b"?", UNUSED_PAGE * PAGE_BYTES + 77) == 1
        return block.block.name
    finally:
        ram.close()


def _assert_verified(farm: Farm, record: Migration, there: str) -> None:
    assert record.outcome is Outcome.COMPLETED, record.error
    paging = record.report.paging
    assert paging is not None
    assert paging.verified_pages > paging.written_pages > 0
    assert paging.verified_pages + paging.written_pages == _ram_pages(farm, "vm", there)


async def test_every_order_that_owes_pages_is_verified(farm: Farm) -> None:
    await farm.boot_linux("vm", append="workload.rate_pages_s=2000", cpus=2)
    logs = [farm.vm_dir("vm", host) / "serial.log" for host in ("alpha", "beta")]
    with Observer(logs) as observer:
        observer.wait_until_ready(60)
        for number, options in enumerate(ORDERS):
            there = "alpha" if number % 2 else "beta"
            record = await farm.migrate("vm", there, verify=True, **options)
            _assert_verified(farm, record, there)
            assert record.report.downtime.verify_ms == 0
        observer.wait_for_full_verification(60)
        corrupt = observer.ask(lambda timeline: [tick.corrupt for tick in timeline.ticks()])
    assert set(corrupt) == {0}


async def test_without_verify_nothing_is_claimed(farm: Farm) -> None:
    await farm.boot("vm")
    record = await farm.migrate("vm", "beta", mode=Mode.POST_COPY)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.paging is not None
    assert (record.report.paging.verified_pages, record.report.paging.written_pages) == (0, 0)


@pytest.mark.parametrize("host", ["alpha", "beta"])
async def test_one_byte_that_differs_is_found_and_told(farm: Farm, host: str) -> None:
    """At the destination it is memory that nobody wrote; at the source, memory that never came."""
    migration = await _paging(farm)
    block = _change_byte(farm, host)
    await farm.hurry(migration)
    record = await farm.ended(migration)
    assert (record.outcome, record.error_code) == (Outcome.FAILED, "memory-differs")
    assert "VM vm runs at host beta with memory that differs" in record.error
    found = re.search(rf"pages? (\d+)(?: to (\d+))? of {block}", record.error)
    assert found is not None, record.error
    assert int(found[1]) <= UNUSED_PAGE <= int(found[2] or found[1])
    assert host == "beta" or "is empty there" in record.error
    assert record.runs_at == "destination host beta"
    assert record.report.paging is not None
    assert record.report.paging.verified_pages == 0
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "alpha")
    again = await farm.migrate("vm", "alpha", mode=Mode.POST_COPY, verify=True)
    _assert_verified(farm, again, "alpha")


async def test_a_link_that_drops_while_paging_leaves_all_verified(farm: Farm) -> None:
    migration = await _paging(farm)
    farm.lab.cut()

    async def noticed() -> bool:
        folder = MoverFolder.of(farm.lab["alpha"].state_dir / "migrations", migration, Role.SOURCE)
        lines = folder.journal_file.read_text().splitlines()
        return "reconnecting" in [json.loads(line).get("state") for line in lines]

    await until(noticed, "the source looks for its destination")
    farm.lab.restore()
    await farm.hurry(migration)
    _assert_verified(farm, await farm.ended(migration), "beta")
    await farm.assert_sound("vm", "beta")


@pytest.mark.parametrize("role", list(Role))
async def test_a_mover_that_dies_while_paging_leaves_all_verified(farm: Farm, role: Role) -> None:
    """The kernel has kept what the guest wrote since it runs at the destination."""
    migration = await _paging(farm)
    host = "alpha" if role is Role.SOURCE else "beta"
    victim = farm.mover_pid(migration, host, role)
    os.kill(victim, signal.SIGKILL)

    async def succeeded() -> bool:
        try:
            return farm.mover_pid(migration, host, role) != victim
        except (OSError, ValueError):
            return False

    await until(succeeded, "a successor works")
    await farm.hurry(migration)
    _assert_verified(farm, await farm.ended(migration), "beta")
    await farm.assert_sound("vm", "beta")


async def test_a_source_that_comes_back_when_nothing_is_missing_any_more_still_compares(farm: Farm) -> None:
    """The rest comes out of a safe copy while the link is cut; the source's memory stays the truth."""
    migration = await _paging(farm, safe_dir=str(farm.disks))

    async def copied() -> bool:
        async with farm.client() as client:
            paging = (await client.migration(migration)).report.paging
        return paging is not None and paging.safe_copy_ms is not None

    await until(copied, "the safe copy is complete")
    log = MoverFolder.of(farm.lab["beta"].state_dir / "migrations", migration, Role.DESTINATION).log_file
    farm.lab.cut()

    async def restored() -> bool:
        return "0 pages are missing after that" in log.read_text()

    await until(restored, "all pages have come from the copy")
    farm.lab.restore()
    record = await farm.ended(migration)
    _assert_verified(farm, record, "beta")
    assert record.report.paging is not None
    assert record.report.paging.restored_pages > 0
    await farm.assert_sound("vm", "beta")
