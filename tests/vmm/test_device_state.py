"""Device state out of one QEMU and into another, and every way in which that can fail."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import warnings
from pathlib import Path

import pytest
from tests.vmm.machines import Machines, copy_ram, counter, open_ram, until_counting, until_counting_on

from transhume.model.errors import TimedOut, VmmError
from transhume.model.vm import Accel, Display, VmSpec
from transhume.vmm import device_state
from transhume.vmm.capabilities import KVM_DEVICE
from transhume.vmm.device_state import IncomingState, OutgoingState, prepare_load, prepare_save, save
from transhume.vmm.launch import Launched
from transhume.vmm.migrate_command import QemuMigration


async def stopped_source(machines: Machines, spec: VmSpec, folder: str = "source") -> Launched:
    source = await machines.start(spec, folder)
    await prepare_save(source.monitor)
    await until_counting(source.process)
    await source.monitor.stop()
    return source


async def waiting_destination(machines: Machines, spec: VmSpec, folder: str = "destination") -> Launched:
    destination = await machines.start(spec, folder, incoming=True)
    await prepare_load(destination.monitor)
    return destination


async def load(destination: Launched, state: bytes) -> None:
    incoming = await IncomingState.begin(destination.monitor)
    try:
        await incoming.feed(state)
        await incoming.finish()
    finally:
        incoming.close()


@pytest.mark.parametrize(
    ("display", "cpus", "numa_nodes"),
    [(Display.NONE, 1, 1), (Display.VNC, 1, 1), (Display.NONE, 2, 2)],
    ids=["plain", "frame buffer", "two of each"],
)
async def test_a_vm_goes_on_in_another_qemu(
    machines: Machines, display: Display, cpus: int, numa_nodes: int
) -> None:
    spec = machines.spec(boot=True, display=display, cpus=cpus, numa_nodes=numa_nodes)
    source = await stopped_source(machines, spec)
    destination = await waiting_destination(machines, spec)
    screen = await source.monitor.screendump() if display is Display.VNC else b""

    outgoing = await OutgoingState.begin(source.monitor)
    incoming = await IncomingState.begin(destination.monitor)
    copy_ram(source.process, destination.process)
    async for chunk in outgoing.chunks():
        await incoming.feed(chunk)
    saved = await outgoing.finish()
    await incoming.finish()

    assert 50_000 < saved.size_bytes < 4 << 20
    assert saved.qemu_ram_bytes < spec.memory_bytes
    assert await source.monitor.status() == "postmigrate"
    assert await destination.monitor.status() == "paused"
    if screen:
        assert await destination.monitor.screendump() == screen
    counted = counter(destination.process)
    assert counted == counter(source.process)
    await source.monitor.quit()
    await destination.monitor.cont()
    await until_counting_on(destination.process)


async def test_a_vm_goes_on_in_another_qemu_under_kvm(root: Path) -> None:
    """As root, who may open the device everywhere, and with a CPU model that a nested KVM can do too."""
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"{KVM_DEVICE} does not open here: {error.strerror}")
    machines = Machines(root, "root")
    spec = machines.spec(boot=True).model_copy(update={"accel": Accel.KVM, "cpu_model": "qemu64"})
    try:
        source = await stopped_source(machines, spec)
        destination = await waiting_destination(machines, spec)
        state = await save(source.monitor)
        copy_ram(source.process, destination.process)
        await load(destination, state)
        assert counter(destination.process) == counter(source.process)
        await destination.monitor.cont()
        await until_counting_on(destination.process)
    finally:
        await machines.end_all()


async def test_a_vm_moves_on_from_where_it_came(machines: Machines) -> None:
    spec = machines.spec(boot=True)
    here = await stopped_source(machines, spec, "hop0")
    for hop in ("hop1", "hop2"):
        there = await waiting_destination(machines, spec, hop)
        state = await save(here.monitor)
        copy_ram(here.process, there.process)
        await load(there, state)
        await here.monitor.quit()
        await there.monitor.cont()
        await until_counting_on(there.process)
        await prepare_save(there.monitor)
        await there.monitor.stop()
        here = there


async def test_the_stream_is_whole_when_qemu_writes_ahead_of_the_reader(machines: Machines) -> None:
    source = await stopped_source(machines, machines.spec(boot=True))
    outgoing = await OutgoingState.begin(source.monitor)
    saved = await outgoing.finish()
    state = b"".join([chunk async for chunk in outgoing.chunks()])
    assert len(state) == saved.size_bytes
    assert state[:4] == b"QEVM"


async def test_the_disk_goes_to_one_owner_at_a_time(machines: Machines) -> None:
    spec = machines.spec(boot=True)
    source = await stopped_source(machines, spec)
    destination = await waiting_destination(machines, spec)
    state = await save(source.monitor)
    copy_ram(source.process, destination.process)
    await load(destination, state)

    await source.monitor.cont()
    with pytest.raises(VmmError, match="lock"):
        await destination.monitor.cont()
    assert await destination.monitor.status() == "paused"


async def test_the_disk_is_free_before_the_source_is_gone(machines: Machines) -> None:
    spec = machines.spec(boot=True)
    source = await stopped_source(machines, spec)
    destination = await waiting_destination(machines, spec)
    state = await save(source.monitor)
    copy_ram(source.process, destination.process)
    await load(destination, state)

    await destination.monitor.cont()
    await until_counting_on(destination.process)
    with pytest.raises(VmmError, match="lock"):
        await source.monitor.cont()
    assert await source.monitor.status() == "postmigrate"


async def test_a_cancelled_save_lets_the_vm_go_on(machines: Machines) -> None:
    source = await stopped_source(machines, machines.spec(boot=True, display=Display.VNC))
    counted = counter(source.process)
    for _ in range(3):
        outgoing = await OutgoingState.begin(source.monitor)
        await outgoing.cancel()
        await outgoing.cancel()
        assert await source.monitor.status() in ("paused", "postmigrate")
        assert counter(source.process) == counted
        await source.monitor.cont()
        await until_counting_on(source.process)
        await source.monitor.stop()
        counted = counter(source.process)
    assert len(await save(source.monitor)) > 50_000


async def test_a_save_can_be_given_up_at_any_step(machines: Machines) -> None:
    source = await stopped_source(machines, machines.spec(boot=True))
    prepared = await OutgoingState.prepare(source.monitor)
    await prepared.cancel()
    assert await source.monitor.status() == "paused"

    interrupted = await OutgoingState.prepare(source.monitor)
    starting = asyncio.create_task(interrupted.start())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await interrupted.cancel()
    await source.monitor.cont()
    await until_counting_on(source.process)


async def test_qemu_may_write_while_the_last_pages_go(machines: Machines) -> None:
    spec = machines.spec(boot=True)
    source = await machines.start(spec, "source")
    destination = await waiting_destination(machines, spec)
    await prepare_save(source.monitor)
    outgoing = await OutgoingState.prepare(source.monitor)
    await until_counting(source.process)
    await outgoing.start()
    await source.monitor.stop()
    outgoing.release()
    copy_ram(source.process, destination.process)
    state = b"".join([chunk async for chunk in outgoing.chunks()])
    await outgoing.finish()
    await load(destination, state)
    assert counter(source.process) == counter(destination.process)
    assert await destination.monitor.status() == "paused"
    await destination.monitor.cont()
    await until_counting_on(destination.process)


async def test_a_reader_is_released_by_a_cancel(machines: Machines) -> None:
    source = await stopped_source(machines, machines.spec(boot=True))
    outgoing = await OutgoingState.begin(source.monitor)

    async def read() -> int:
        return sum([len(chunk) async for chunk in outgoing.chunks()])

    reader = asyncio.create_task(read())
    await outgoing.cancel()
    await asyncio.wait_for(reader, 10)


async def test_a_failed_save_lets_the_vm_go_on(machines: Machines) -> None:
    """The reader goes away in the middle of the stream."""
    source = await stopped_source(machines, machines.spec(boot=True))
    counted = counter(source.process)
    outgoing = await OutgoingState.begin(source.monitor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_state, "STATE_LIMIT_BYTES", 1000)
        with pytest.raises(VmmError, match="larger than 1000 bytes: RAM is in it"):
            await outgoing.finish()
    assert counter(source.process) == counted
    await source.monitor.cont()
    await until_counting_on(source.process)
    await source.monitor.stop()
    assert len(await save(source.monitor)) > 50_000


async def test_ram_in_the_stream_is_found_out_while_the_vm_runs(machines: Machines) -> None:
    source = await machines.start(machines.spec(boot=True))
    await prepare_save(source.monitor)
    await source.monitor.qmp.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": False}]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_state, "STATE_LIMIT_BYTES", 16 << 20)
        with pytest.raises(VmmError, match=r"QEMU puts \d+ bytes of RAM into its device state"):
            await OutgoingState.begin(source.monitor)
    assert await source.monitor.status() == "running"


async def test_qemu_waits_for_the_pause_and_the_vm_runs_meanwhile(machines: Machines) -> None:
    source = await machines.start(machines.spec(boot=True, display=Display.VNC))
    await prepare_save(source.monitor)
    await until_counting(source.process)
    with source.monitor.qmp.subscribe("STOP") as stops:
        for _ in range(2):
            outgoing = await OutgoingState.begin(source.monitor)
            with pytest.raises(TimedOut):
                await stops.next(0.3)
            await until_counting_on(source.process)
            await outgoing.cancel()
            assert await source.monitor.status() == "running"
            await until_counting_on(source.process)


async def test_the_death_of_the_reader_does_not_stop_the_vm(machines: Machines) -> None:
    source = await machines.start(machines.spec(boot=True))
    script = """
import asyncio, os, sys
from pathlib import Path
from transhume.vmm.capabilities import KVM_DEVICE
from transhume.vmm.device_state import OutgoingState, prepare_save
from transhume.vmm.monitor import Monitor

async def die():
    monitor = await Monitor.connect(Path(sys.argv[1]))
    await prepare_save(monitor)
    await OutgoingState.begin(monitor)
    os._exit(0)

asyncio.run(die())
"""
    mover_socket = str(source.monitor.paths.mover_qmp_socket)
    with source.monitor.qmp.subscribe("MIGRATION") as changes:
        reader = await asyncio.create_subprocess_exec(sys.executable, "-c", script, mover_socket)
        assert await reader.wait() == 0
        while (await changes.next(10)).data["status"] != "failed":
            pass
    assert await source.monitor.status() == "running"
    await until_counting_on(source.process)
    await prepare_save(source.monitor)
    outgoing = await OutgoingState.begin(source.monitor)
    await source.monitor.stop()
    await outgoing.finish()


async def test_the_death_of_the_source_is_noticed(machines: Machines) -> None:
    source = await stopped_source(machines, machines.spec(boot=True))
    outgoing = await OutgoingState.begin(source.monitor)
    await source.process.kill()
    async for _ in outgoing.chunks():
        pass
    with pytest.raises(VmmError, match="went away"):
        await outgoing.finish()
    with pytest.raises(VmmError, match="went away"):
        await outgoing.cancel()


async def test_a_vm_that_runs_already_takes_no_state(machines: Machines) -> None:
    running = await machines.start(machines.spec(boot=True))
    with pytest.raises(VmmError, match="QEMU refused migrate-incoming"):
        await IncomingState.begin(running.monitor)
    assert await running.monitor.status() == "running"


@pytest.mark.parametrize("damage", ["garbage", "cut short", "one byte"])
async def test_a_broken_state_is_refused_in_qemus_words(machines: Machines, damage: str) -> None:
    spec = machines.spec(boot=True)
    source = await stopped_source(machines, spec)
    state = await save(source.monitor)
    position = state.index(b"cpu_common")
    broken = {
        "garbage": b"x" * 100_000,
        "cut short": state[: len(state) // 2],
        "one byte": state[:position] + b"C" + state[position + 1 :],
    }[damage]
    destination = await waiting_destination(machines, spec)
    copy_ram(source.process, destination.process)
    with pytest.raises(VmmError, match=r"QEMU did not (load|take) the device state: .*\w+") as told:
        await load(destination, broken)
    assert not told.value.message.endswith("nothing"), "QEMU's reason is in it"
    await destination.process.wait(10)
    await source.monitor.cont()
    await until_counting_on(source.process)


async def test_a_state_refused_halfway_leaves_no_socket_open(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all has gone before QEMU refuses is a race with a large buffer, and none with a small one."""
    monkeypatch.setattr(device_state, "CHANNEL_BUFFER_BYTES", 4096)
    destination = await waiting_destination(machines, machines.spec(boot=True))
    incoming = await IncomingState.begin(destination.monitor)
    with pytest.raises(VmmError, match="QEMU did not take the device state"):
        await incoming.feed(b"x" * (1 << 20))
    del incoming
    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(warning.message) for warning in left_open] == []
    await destination.process.wait(10)


async def test_a_begin_that_is_broken_off_leaves_no_socket_open(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await machines.start(machines.spec(boot=True))
    await prepare_save(source.monitor)
    setting_up = asyncio.Event()

    async def never_active(migration: QemuMigration, timeout_s: float | None = None) -> None:
        setting_up.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(QemuMigration, "wait_active", never_active)
    beginning = asyncio.create_task(OutgoingState.begin(source.monitor))
    async with asyncio.timeout(20):
        await setting_up.wait()
    beginning.cancel()
    await asyncio.gather(beginning, return_exceptions=True)
    assert beginning.cancelled()
    del beginning
    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(warning.message) for warning in left_open] == []
    await until_counting_on(source.process)


async def test_another_machine_is_refused(machines: Machines) -> None:
    source = await stopped_source(machines, machines.spec(boot=True, display=Display.VNC))
    destination = await waiting_destination(machines, machines.spec(boot=True))
    copy_ram(source.process, destination.process)
    with pytest.raises(VmmError, match=r"QEMU did not load the device state: .*vga"):
        await load(destination, await save(source.monitor))


async def test_a_source_that_says_no_more_is_given_up(machines: Machines) -> None:
    destination = await waiting_destination(machines, machines.spec(boot=True))
    incoming = await IncomingState.begin(destination.monitor)
    incoming.close()
    incoming.close()
    await destination.process.wait(10)


async def test_loading_touches_no_page_that_was_copied(machines: Machines) -> None:
    """The engine may compare the RAM of both ends after the load: nothing else has changed it."""
    spec = machines.spec(boot=True)
    source = await stopped_source(machines, spec)
    destination = await waiting_destination(machines, spec)
    state = await save(source.monitor)
    copy_ram(source.process, destination.process)
    await load(destination, state)
    assert ram_bytes(source) == ram_bytes(destination)


def ram_bytes(launched: Launched) -> bytes:
    fd = open_ram(launched.process)
    with open(fd, "rb") as file:
        return file.read()
