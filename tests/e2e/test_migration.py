"""A running VM moves, by both engines, and nothing is lost."""

from __future__ import annotations

import pytest
from tests.e2e.boot_guest import read_sweeps
from tests.e2e.farm import Farm, until

from transhume.demo.observer import Observer
from transhume.model.migration import Engine, Outcome, Phase
from transhume.model.vm import Display, VmState
from transhume.vmm.command_line import TCG_TRIM_BYTES

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("engine", list(Engine))
async def test_a_vm_moves_there_and_back_and_there_again(farm: Farm, engine: Engine) -> None:
    await farm.boot("vm")
    newest = 0
    for hop, (here, there) in enumerate([("alpha", "beta"), ("beta", "alpha"), ("alpha", "beta")]):
        newest = await farm.assert_sound("vm", here, newest)
        record = await farm.migrate("vm", there, engine=engine)
        assert record.outcome is Outcome.COMPLETED, record.error
        assert record.phase is Phase.DONE
        assert record.runs_at == f"destination host {there}"
        assert (await farm.vm("vm")).ownership.epoch == hop + 2
        newest = await farm.assert_sound("vm", there, newest)
        await farm.assert_nothing_left("vm", here)


async def test_ram_is_equal_by_hash_at_the_switchover(farm: Farm) -> None:
    await farm.boot("vm", memory_bytes=64 << 20)
    record = await farm.migrate("vm", "beta", verify=True, post_copy=False)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.downtime.verify_ms > 0
    await farm.assert_sound("vm", "beta")


async def test_several_ram_blocks_and_two_vcpus(farm: Farm) -> None:
    await farm.boot("vm", memory_bytes=64 << 20, numa_nodes=2, cpus=2)
    record = await farm.migrate("vm", "beta", verify=True)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "beta")


async def test_the_frame_buffer_comes_along(farm: Farm) -> None:
    await farm.boot("vm", display=Display.VNC)
    async with farm.client("beta") as client:
        before = await client.screendump("vm")
        record = await farm.migrate("vm", "beta")
        assert record.outcome is Outcome.COMPLETED, record.error
        assert await client.screendump("vm") == before
    await farm.assert_sound("vm", "beta")


async def test_a_linux_guest_with_two_vcpus_loses_no_page(farm: Farm) -> None:
    """The guest verifies its own pages all the while; the hashes are compared too."""
    await farm.boot_linux("vm", append="workload.rate_pages_s=4000", cpus=2)
    logs = [farm.vm_dir("vm", host) / "serial.log" for host in ("alpha", "beta")]
    with Observer(logs) as observer:
        observer.wait_until_ready(60)
        for there in ("beta", "alpha"):
            record = await farm.migrate("vm", there, verify=True)
            assert record.outcome is Outcome.COMPLETED, record.error
            observer.wait_for_full_verification(60)
        corrupt = observer.ask(lambda timeline: [tick.corrupt for tick in timeline.ticks()])
    assert set(corrupt) == {0}


async def test_the_report_adds_up(farm: Farm) -> None:
    await farm.boot("vm")
    # A limit that even a busy machine keeps: what is judged here is the sums.
    record = await farm.migrate("vm", "beta", max_downtime_ms=60_000)
    report = record.report
    assert report.ram_bytes == (48 << 20) - TCG_TRIM_BYTES
    assert [each.index for each in report.iterations] == list(range(len(report.iterations)))
    assert [each.suspended for each in report.iterations][-1]
    assert report.wire_bytes >= sum(each.pages for each in report.iterations) * 4096
    assert report.state_bytes > 0
    parts = report.downtime
    assert parts.total_ms >= parts.stop_ms + parts.last_pages_ms + parts.state_out_ms
    assert parts.commit_ms > 0
    assert parts.resume_ms > 0
    assert report.total_ms >= parts.total_ms
    assert report.converged, report


async def test_a_vm_that_moved_can_be_stopped_started_and_deleted_there(farm: Farm) -> None:
    await farm.boot("vm")
    await farm.migrate("vm", "beta")
    async with farm.client() as client:
        assert (await client.kill_vm("vm")).state is VmState.STOPPED
        await client.start_vm("vm")
        assert farm.runs_on("vm") == ["beta"]

        async def sweeps() -> bool:
            return (await read_sweeps(farm.vm_dir("vm", "beta"))).newest > 2

        await until(sweeps, "the guest booted again")
        await client.kill_vm("vm")
        await client.delete_vm("vm")
        assert await client.vms() == []
    await farm.assert_nothing_left("vm", "beta")
