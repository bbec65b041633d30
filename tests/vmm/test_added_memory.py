"""RAM that is added to a real QEMU while it runs, and additions that were interrupted."""

from __future__ import annotations

import os

import pytest
from tests.vmm.machines import Machines, until_counting, until_counting_on

from transhume.memory.ram import GuestRam
from transhume.model.errors import Refused, VmmError
from transhume.model.vm import VmSpec
from transhume.vmm import added_memory
from transhume.vmm.added_memory import add_memory, settle_memory
from transhume.vmm.command_line import backend_properties, ram_blocks
from transhume.vmm.inspect import find_obstacles
from transhume.vmm.launch import Launched, create_ram
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths

MORE_BYTES = 128 << 20


async def started(machines: Machines) -> tuple[Launched, VmSpec]:
    spec = machines.spec(boot=True).model_copy(update={"max_memory_bytes": 1 << 30})
    launched = await machines.start(spec)
    await until_counting(launched.process)
    return launched, spec


async def modules(monitor: Monitor) -> list[str]:
    return [each["data"]["memdev"] for each in await monitor.qmp.execute("query-memory-devices")]


async def test_a_running_vm_is_given_memory_twice(machines: Machines) -> None:
    launched, spec = await started(machines)
    monitor, paths = launched.monitor, VmPaths(machines.root / "one")
    for number in (1, 2):
        spec = await add_memory(monitor, launched.process.pid, paths, spec, MORE_BYTES)
        assert spec.added_bytes == (MORE_BYTES,) * number
        assert await modules(monitor) == [f"/objects/ram{index}" for index in range(1, number + 1)]
    assert VmSpec.model_validate_json(paths.spec_file.read_text()) == spec
    ram = GuestRam.of_process(launched.process.pid)
    try:
        assert [each.size_bytes for each in ram.ram_blocks] == [each.size_bytes for each in ram_blocks(spec)]
    finally:
        ram.close()
    assert (await find_obstacles(monitor, launched.process.pid)).ram == ()
    assert await settle_memory(monitor, paths, spec) == spec
    await until_counting_on(launched.process)


async def test_a_vm_without_room_stays_as_it_is(machines: Machines) -> None:
    spec = machines.spec()
    launched = await machines.start(spec)
    with pytest.raises(Refused, match="made without room to grow"):
        await add_memory(
            launched.monitor, launched.process.pid, VmPaths(machines.root / "one"), spec, MORE_BYTES
        )
    assert await modules(launched.monitor) == []


async def test_what_qemu_refuses_leaves_nothing(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, spec = await started(machines)
    paths = VmPaths(machines.root / "one")
    # After a refused device_add QEMU waits until each vCPU was outside its translated code once
    # (drain_call_rcu), which this guest, a loop without interrupts, may never be under TCG.
    await launched.monitor.stop()

    def without_its_slot(spec: VmSpec, number: int) -> dict[str, object]:
        return {"driver": "pc-dimm", "id": "dimm0", "memdev": "ram1", "slot": 99}

    monkeypatch.setattr(added_memory, "added_device", without_its_slot)
    with pytest.raises(VmmError, match="QEMU refused device_add"):
        await add_memory(launched.monitor, launched.process.pid, paths, spec, MORE_BYTES)
    assert VmSpec.model_validate_json(paths.spec_file.read_text()) == spec
    assert len(await launched.monitor.qmp.execute("query-memdev")) == 1


@pytest.mark.parametrize("written_down", [False, True])
async def test_an_addition_that_was_interrupted_is_undone(machines: Machines, written_down: bool) -> None:
    """Whoever added died when QEMU had the block and the guest had no module."""
    launched, spec = await started(machines)
    paths = VmPaths(machines.root / "one")
    grown = spec.with_added(MORE_BYTES)
    (fd,) = create_ram([ram_blocks(grown)[-1]])
    try:
        lent = await launched.monitor.lend_fd(fd)
    finally:
        os.close(fd)
    await launched.monitor.qmp.execute("object-add", **backend_properties(ram_blocks(grown)[-1], lent.number))
    if written_down:
        paths.spec_file.write_text(grown.model_dump_json())
    found = VmSpec.model_validate_json(paths.spec_file.read_text())
    assert await settle_memory(launched.monitor, paths, found) == spec
    assert VmSpec.model_validate_json(paths.spec_file.read_text()) == spec
    assert len(await launched.monitor.qmp.execute("query-memdev")) == 1
