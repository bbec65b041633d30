"""Every order of transfer moves a running VM and loses nothing; what breaks while pages are owed is mended.

While paging the VM runs at the destination and part of its memory is still at the source. Whatever dies or is
cut meanwhile: no page is ever read as zeros in its place, the VM goes on, and the source lets go only at the
end.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from tests.e2e.farm import Farm, until

from transhume.demo.observer import Observer
from transhume.migration.driver.job import MoverFolder, Role
from transhume.model.errors import Conflict
from transhume.model.migration import Migration, Mode, Outcome, Phase, Rest
from transhume.model.orders import Adjustment

pytestmark = pytest.mark.timeout(240)

SLOW_BYTES_S = 128 << 10
"""A push so slow that the pages nobody asks for are owed for many seconds."""

SILENCE_LIMIT_S = 2.0

ORDERS: list[dict[str, Any]] = [
    {"mode": Mode.POST_COPY},
    {"mode": Mode.POST_COPY, "rest": Rest.BACKGROUND},
    {"mode": Mode.HYBRID},
    {"mode": Mode.HYBRID, "threshold_fraction": 0.5},
    {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.BEFORE_STATE, "verify": True},
    {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.AFTER_STATE, "verify": True},
    {"mode": Mode.PRE_COPY, "iterations": 2, "rest": Rest.ON_DEMAND, "deadline_s": 3.0},
    {"mode": Mode.PRE_COPY, "iterations": 2, "rest": Rest.BACKGROUND},
    {"mode": Mode.PRE_COPY, "iterations": 1, "rest": Rest.BOTH},
    {"mode": Mode.AUTO, "post_copy": False},
]


async def _paging(farm: Farm, **options: Any) -> str:
    """A migration that has switched over and will owe pages for a while."""
    await farm.boot("vm")
    migration = await farm.begin(
        "vm",
        "beta",
        mode=Mode.POST_COPY,
        bandwidth_bytes_s=SLOW_BYTES_S,
        peer_silence_limit_s=SILENCE_LIMIT_S,
        **options,
    )
    await farm.in_phase(migration, Phase.PAGING)
    assert farm.runs_on("vm") == ["alpha", "beta"]  # the source's is suspended, and keeps the pages
    return migration


async def _completes(farm: Farm, migration: str) -> Migration:
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.runs_at == "destination host beta"
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "alpha")
    again = await farm.migrate("vm", "alpha", verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", "alpha")
    return record


def _states(farm: Farm, migration: str, host: str, role: Role) -> list[str]:
    journal = MoverFolder.of(farm.lab[host].state_dir / "migrations", migration, role).journal_file
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return [entry["state"] for entry in entries if "state" in entry]


async def test_every_order_of_transfer_loses_no_page(farm: Farm) -> None:
    """One Linux guest that verifies its own memory, moved there and back in each order."""
    await farm.boot_linux("vm", append="workload.rate_pages_s=2000", cpus=2)
    logs = [farm.vm_dir("vm", host) / "serial.log" for host in ("alpha", "beta")]
    with Observer(logs) as observer:
        observer.wait_until_ready(60)
        for number, options in enumerate(ORDERS):
            there = "alpha" if number % 2 else "beta"
            record = await farm.migrate("vm", there, **options)
            assert record.outcome is Outcome.COMPLETED, f"{options}: {record.error}"
            assert record.runs_at == f"destination host {there}"
            rest = options.get("rest") or (
                Rest.BOTH if options["mode"] in (Mode.POST_COPY, Mode.HYBRID) else Rest.BEFORE_STATE
            )
            assert record.report.order.endswith(f"rest {rest}"), record.report.order
            paging = record.report.paging
            assert (paging is not None) == Rest(rest).after_resume, f"{options}: {paging}"
            if paging is not None:
                assert paging.owed_pages > 0
                assert paging.fetched_pages + paging.pushed_pages >= paging.owed_pages
                assert paging.residual_ms > 0
                assert rest is not Rest.BACKGROUND or paging.fetched_pages == 0
            observer.wait_for_full_verification(60)
        corrupt = observer.ask(lambda timeline: [tick.corrupt for tick in timeline.ticks()])
    assert set(corrupt) == {0}


async def test_several_ram_blocks_and_two_vcpus_are_paged(farm: Farm) -> None:
    await farm.boot("vm", memory_bytes=64 << 20, numa_nodes=2, cpus=2)
    for there in ("beta", "alpha"):
        record = await farm.migrate("vm", there, mode=Mode.POST_COPY)
        assert record.outcome is Outcome.COMPLETED, record.error
        await farm.assert_sound("vm", there)


async def test_a_link_that_drops_while_paging_is_found_again(farm: Farm) -> None:
    migration = await _paging(farm)
    farm.lab.cut()

    async def both_noticed() -> bool:
        async with farm.client() as client:
            record = await client.migration(migration)
        return "reconnecting" in _states(farm, migration, "alpha", Role.SOURCE) and record.outcome is (
            Outcome.RUNNING
        )

    await until(both_noticed, "the source looks for its destination")
    farm.lab.restore()
    await farm.hurry(migration)
    record = await _completes(farm, migration)
    assert record.report.paging is not None
    assert record.report.paging.link_losses > 0
    assert record.report.paging.link_lost_ms > 0


async def test_a_lost_link_is_given_up_only_when_that_was_asked_for(farm: Farm) -> None:
    """The VM is left where it lacks pages, which is said plainly, and can be started from its disks."""
    migration = await _paging(farm, give_up_after_s=1.0)
    farm.lab.cut()

    async def given_up() -> bool:
        return "done" in _states(farm, migration, "beta", Role.DESTINATION)

    await until(given_up, "the destination looks for its source no longer")
    farm.lab.restore()
    record = await farm.ended(migration)
    assert record.outcome is Outcome.FAILED
    assert "was not found again within 1 s" in record.error
    assert "beta" in farm.runs_on("vm")
    async with farm.client() as client:
        await client.kill_vm("vm")
        await client.start_vm("vm")
    assert farm.runs_on("vm") == ["beta"]


@pytest.mark.parametrize("role", list(Role))
async def test_a_mover_that_dies_while_paging_has_a_successor(farm: Farm, role: Role) -> None:
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
    await _completes(farm, migration)


async def test_both_movers_die_while_paging(farm: Farm) -> None:
    migration = await _paging(farm)
    victims = [
        farm.mover_pid(migration, "alpha", Role.SOURCE),
        farm.mover_pid(migration, "beta", Role.DESTINATION),
    ]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)

    async def succeeded() -> bool:
        try:
            return farm.mover_pid(migration, "alpha", Role.SOURCE) != victims[0]
        except (OSError, ValueError):
            return False

    await until(succeeded, "a successor works")
    await farm.hurry(migration)
    await _completes(farm, migration)


@pytest.mark.parametrize("host", ["alpha", "beta"])
async def test_a_daemon_that_dies_while_paging_changes_nothing(farm: Farm, host: str) -> None:
    migration = await _paging(farm)
    farm.kill_daemon(host)
    await farm.daemon_gone(host)
    await farm.start_daemon(host)
    await farm.hurry(migration)
    await _completes(farm, migration)


async def test_the_sources_qemu_may_die_while_paging(farm: Farm) -> None:
    """Its mover holds the memory too."""
    migration = await _paging(farm)
    os.kill(farm.qemu_pid("vm", "alpha"), signal.SIGKILL)
    await farm.hurry(migration)
    await _completes(farm, migration)


async def test_cancel_while_paging_says_where_the_vm_runs(farm: Farm) -> None:
    migration = await _paging(farm)
    async with farm.client() as client:
        reply = await client.cancel(migration)
    assert not reply.accepted
    assert reply.runs_at == "destination host beta"
    await farm.hurry(migration)
    await _completes(farm, migration)


async def test_switch_to_post_copy_on_request(farm: Farm) -> None:
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S)
    await farm.in_phase(migration, Phase.PRECOPY)
    async with farm.client("beta") as client:
        await client.adjust(migration, Adjustment(switch_to_post_copy=True))
    await farm.in_phase(migration, Phase.PAGING)
    await farm.hurry(migration)
    record = await _completes(farm, migration)
    assert record.report.switch_reason == "post-copy was asked for while it ran"


async def test_a_migration_without_post_copy_refuses_the_switch(farm: Farm) -> None:
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S, post_copy=False)
    await farm.in_phase(migration, Phase.PRECOPY)
    async with farm.client() as client:
        with pytest.raises(Conflict, match="not prepared for page faults"):
            await client.adjust(migration, Adjustment(switch_to_post_copy=True))
    await farm.hurry(migration)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.paging is None
