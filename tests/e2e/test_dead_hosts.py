"""A host dies, or is cut off: what runs there is unknown, until somebody has switched it off."""

from __future__ import annotations

import os
import signal

import pytest
from pydantic import TypeAdapter
from tests.e2e.farm import Farm, until

from transhume.api.http_calls import HttpCalls
from transhume.farm.fencing import FenceReport
from transhume.model.errors import Conflict, PreflightFailed
from transhume.model.vm import VmState

_STATES: TypeAdapter[dict[str, VmState]] = TypeAdapter(dict[str, VmState])

pytestmark = pytest.mark.timeout(240)


async def _lost(farm: Farm) -> None:
    """Wait until beta counts as lost."""

    async def lost() -> bool:
        async with farm.client() as client:
            return (await client.pool.fence_report("beta")).lost_since_s is not None

    await until(lost, "beta is lost")


async def _back(farm: Farm) -> None:
    """Wait until beta counts as fenced no longer."""

    async def back() -> bool:
        async with farm.client() as client:
            return (await client.pool.fence_report("beta")).fenced_at_s is None

    await until(back, "the fenced host is back")


async def _fence(farm: Farm) -> FenceReport:
    async with farm.client() as client:
        return await client.pool.fence("beta", powered_off=True)


async def test_a_marked_vm_of_a_dead_host_starts_elsewhere_after_the_fence_and_not_before(farm: Farm) -> None:
    await farm.boot("vm", "beta")
    async with farm.client() as client:
        await client.pool.set_vm("vm", restart_elsewhere=True)
        with pytest.raises(Conflict, match="not known to be lost"):
            await client.pool.fence("beta", powered_off=True)
    farm.kill_daemon("beta")
    await _lost(farm)
    assert (await farm.vm("vm")).state is VmState.UNKNOWN
    # It only looks dead: its VM runs on, and the lock on the disk tells.
    report = await _fence(farm)
    assert "is open for writing" in report.vms[0].note
    async with farm.client() as client:
        with pytest.raises(PreflightFailed):
            await client.start_vm("vm")
    assert farm.runs_on("vm") == ["beta"]
    os.kill(farm.qemu_pid("vm", "beta"), signal.SIGKILL)
    before = (await farm.vm("vm")).ownership

    async def started() -> bool:
        return farm.runs_on("vm") == ["alpha"]

    await until(started, "it is tried again by itself")
    await farm.assert_sound("vm", "alpha")
    assert (await farm.vm("vm")).ownership.epoch > before.epoch
    await farm.start_daemon("beta")
    await _back(farm)
    again = await farm.migrate("vm", "beta", verify=True)
    assert again.error == ""
    await farm.assert_sound("vm", "beta")


async def test_a_cut_off_host_pauses_strict_vms_and_ends_what_is_another_hosts(farm: Farm) -> None:
    """VMs without disks: nothing but the register can tell where they may run."""
    for name in ("strict", "plain", "taken"):
        await farm.boot_linux(name, "beta")
    async with farm.client() as client:
        await client.pool.set_vm("strict", strict=True)
        await client.pool.set_vm("taken", strict=True, restart_elsewhere=True)

    async def told() -> bool:
        file = farm.lab["beta"].state_dir / "strict.json"
        return file.exists() and "taken" in file.read_text()

    await until(told, "beta knows which are strict")
    farm.lab.cut()
    await until(lambda: _states(farm, "strict", VmState.PAUSED), "the strict VM is paused")
    await until(lambda: _states(farm, "taken", VmState.PAUSED), "the other strict VM is paused")
    assert await _states(farm, "plain", VmState.RUNNING)
    await _lost(farm)
    report = await _fence(farm)
    assert {each.vm: each.now_on for each in report.vms} == {"taken": "alpha", "strict": "", "plain": ""}
    assert farm.runs_on("taken") == ["alpha", "beta"]
    farm.lab.restore()

    async def one_is_left() -> bool:
        return farm.runs_on("taken") == ["alpha"]

    await until(one_is_left, "beta has ended what is alpha's")
    await until(lambda: _states(farm, "strict", VmState.RUNNING), "the strict VM goes on")
    assert (await farm.vm("strict")).ownership.owner == "beta"
    await _back(farm)


async def _states(farm: Farm, vm: str, wanted: VmState) -> bool:
    """What QEMU on beta itself says."""
    calls = HttpCalls("beta", farm.lab["beta"].state_dir / "api.sock", "/host/v1")
    try:
        states = await calls.ask("GET", "/vm-states", _STATES)
    finally:
        await calls.close()
    return states.get(vm) is wanted
