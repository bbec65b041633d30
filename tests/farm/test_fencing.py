"""Dead hosts: silence changes nothing; only what was fenced is started elsewhere, once, where it can be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.farm.scripted_farm import Farm, farm, until

from transhume.farm.fence_command import demand_fence_command, run_fence_command
from transhume.farm.fencing import FenceReport
from transhume.model.errors import Conflict, HostLost, PreflightFailed, Refused, TimedOut
from transhume.model.orders import DestinationFacts
from transhume.model.vm import Ownership, VmSpec, VmState

SILENT_S = 60.0


async def vm_on_beta(f: Farm, name: str = "web", marked: bool = True) -> None:
    spec = VmSpec(name=name, memory_bytes=512 << 20, cpus=1)
    await f.controller.vms.create(spec, "beta", restart_elsewhere=marked)
    await f.controller.vms.start(name)


async def lose_beta(f: Farm) -> None:
    """It dies: nothing answers there, and nothing comes from it."""
    f.now_s += SILENT_S
    for method in ("start_vm", "delete_vm", "destination_facts"):
        f.hosts["beta"].failures[method] = HostLost("host beta does not answer")
    await f.beat(*(name for name in f.hosts if name != "beta"))


async def fence(f: Farm, force: bool = False) -> FenceReport:
    return await f.controller.fencing.fence("beta", powered_off=True, force=force)


async def test_a_lost_host_is_unknown_and_nothing_is_started_elsewhere() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        last_heard_s = f.now_s
        await lose_beta(f)
        f.controller.fencing.wake()
        await f.controller.fencing.close()
        with pytest.raises(HostLost):
            await f.controller.vms.start("web")
        report = await f.controller.fencing.show("beta")
        assert (report.lost_since_s, report.fenced_at_s) == (last_heard_s, None)
        assert "when beta is fenced" in report.vms[0].note
        vm = await f.controller.vms.show("web")
        assert (vm.state, vm.ownership.owner) == (VmState.UNKNOWN, "beta")
        assert "web" not in f.hosts["alpha"].states


async def test_after_the_fence_what_is_marked_starts_elsewhere_with_a_higher_epoch() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        await vm_on_beta(f, "plain", marked=False)
        await lose_beta(f)
        report = await fence(f)
        told = {each.vm: (each.restarts, each.now_on) for each in report.vms}
        assert told == {"web": (True, "alpha"), "plain": (False, "")}
        note = next(each.note for each in report.vms if each.vm == "plain")
        assert "transhume vm start plain" in note
        assert (await f.controller.vms.show("web")).ownership == Ownership(owner="alpha", epoch=3)
        assert f.hosts["alpha"].states == {"web": VmState.RUNNING}
        by_hand = await f.controller.vms.start("plain")
        assert by_hand.ownership.owner == "alpha"


async def test_a_vm_that_was_stopped_stays_stopped() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        await vm_on_beta(f, "off")
        await f.controller.vms.kill("off")
        f.hosts["beta"].states["web"] = VmState.STOPPED  # its guest powered itself down
        await f.beat()
        await lose_beta(f)
        report = await fence(f)
        assert {(each.vm, each.now_on) for each in report.vms} == {("web", ""), ("off", "")}
        assert f.hosts["alpha"].states == {}


async def test_a_vm_whose_disk_somebody_writes_waits_until_nobody_does() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        await lose_beta(f)
        held = DestinationFacts(memory_available_bytes=8 << 30, disks_in_use=("/a.img is open for writing",))
        f.hosts["alpha"].destination_facts_now = held
        report = await fence(f)
        assert "/a.img is open for writing" in report.vms[0].note
        with pytest.raises(PreflightFailed):
            await f.controller.vms.start("web")
        assert (await f.controller.vms.show("web")).ownership == Ownership(owner="beta", epoch=1)
        f.hosts["alpha"].destination_facts_now = None
        assert (await fence(f)).vms[0].now_on == "alpha"


async def test_the_next_controller_goes_on() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        await lose_beta(f)
        f.hosts["alpha"].failures["destination_facts"] = HostLost("busy")
        assert (await fence(f)).vms[0].now_on == ""
        f.hosts["alpha"].failures.clear()
        await f.restart()
        await f.beat("alpha")
        f.controller.fencing.wake()
        await until(lambda: f.hosts["alpha"].states.get("web") is VmState.RUNNING)
        assert (await f.controller.vms.show("web")).ownership.owner == "alpha"


async def test_a_host_that_lives_is_not_fenced_unless_forced() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        with pytest.raises(Conflict, match="not known to be lost"):
            await fence(f)
        with pytest.raises(Conflict, match="carries the controller"):
            await f.controller.fencing.fence("alpha", powered_off=True, force=True)
        assert (await f.controller.fencing.show("beta")).fenced_at_s is None
        assert (await fence(f, force=True)).vms[0].now_on == "alpha"


async def test_a_controller_that_has_only_just_come_up_takes_nobody_for_lost() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        f.now_s += SILENT_S
        await f.restart()
        with pytest.raises(Conflict, match="only just come up"):
            await fence(f)


async def test_a_fenced_host_is_back_only_when_it_runs_nothing_of_another() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        await vm_on_beta(f, "plain", marked=False)
        await lose_beta(f)
        await fence(f)
        f.hosts["beta"].failures.clear()
        beta = f.hosts["beta"]
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states)
        assert reply.disowned == ("web",)
        assert (await f.controller.fencing.show("beta")).fenced_at_s is not None
        spec = VmSpec(name="new", memory_bytes=512 << 20, cpus=1)
        with pytest.raises(PreflightFailed, match="reserve"):
            await f.controller.vms.create(spec, "beta", reserve=True)
        del beta.states["web"]
        reply = await f.controller.heartbeat("beta", beta.inventory_now, beta.states)
        assert reply.disowned == ()
        assert (await f.controller.fencing.show("beta")).fenced_at_s is None
        assert (await f.controller.vms.show("plain")).ownership.owner == "beta"


async def test_without_a_command_or_a_word_nothing_is_fenced() -> None:
    async with farm() as f:
        await vm_on_beta(f)
        await lose_beta(f)
        with pytest.raises(Conflict, match="no fence command"):
            await f.controller.fencing.fence("beta", powered_off=False, force=False)
        await f.controller.overview.configure_farm(None, "/bin/false")
        with pytest.raises(Conflict, match="exit code 1"):
            await f.controller.fencing.fence("beta", powered_off=False, force=False)
        assert (await f.controller.fencing.show("beta")).fenced_at_s is None
        await f.controller.overview.configure_host("beta", None, None, (), (), "/bin/true")
        report = await f.controller.fencing.fence("beta", powered_off=False, force=False)
        assert "its fence command" in report.how
        assert report.vms[0].now_on == "alpha"


def script(folder: Path, text: str) -> str:
    path = folder / "fence"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def test_the_command_is_told_which_host(tmp_path: Path) -> None:
    text = f'echo "$1 $TRANSHUME_HOST $TRANSHUME_HOST_ADDRESS" > {tmp_path}/told'
    await run_fence_command(f"{script(tmp_path, text)} 'a b'", "beta", "192.0.2.4")
    assert (tmp_path / "told").read_text() == "a b beta 192.0.2.4\n"


async def test_a_command_that_fails_or_hangs_fences_nobody(tmp_path: Path) -> None:
    failing = script(tmp_path, "echo no route to the BMC >&2; exit 7")
    with pytest.raises(Conflict, match="exit code 7: no route to the BMC"):
        await run_fence_command(failing, "beta", "192.0.2.4")
    hanging = script(tmp_path, f"echo $$ > {tmp_path}/pid; sleep 600")
    with pytest.raises(TimedOut, match="not fenced"):
        await run_fence_command(hanging, "beta", "192.0.2.4", limit_s=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("text", ["ipmitool off", "/nowhere/at-all", "/bin/sh 'unclosed"])
def test_a_command_that_cannot_be_run_is_refused_when_it_is_set(text: str) -> None:
    with pytest.raises(Refused):
        demand_fence_command(text)
