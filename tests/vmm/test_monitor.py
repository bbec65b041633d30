"""The verbs of the monitor, each on a real QEMU."""

from __future__ import annotations

import struct

import pytest
from tests.vmm.machines import Machines, counter, until_counting, until_counting_on

from transhume.model.errors import VmmError
from transhume.model.vm import Display, VmState
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths


async def test_stop_and_cont(machines: Machines) -> None:
    launched = await machines.start(machines.spec(boot=True, cpus=2))
    monitor, process = launched.monitor, launched.process
    await until_counting(process)
    assert await monitor.state() is VmState.RUNNING
    await monitor.stop()
    assert await monitor.status() == "paused"
    assert await monitor.state() is VmState.PAUSED
    stopped_at = counter(process)
    assert counter(process) == stopped_at
    await monitor.cont()
    await until_counting_on(process)


async def test_a_destination_waits(machines: Machines) -> None:
    launched = await machines.start(machines.spec(), incoming=True)
    assert await launched.monitor.state() is VmState.INCOMING
    assert launched.process.record.incoming


async def test_quit_ends_qemu(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    await launched.monitor.quit()
    await launched.process.wait(10)
    assert not launched.process.alive
    await launched.monitor.quit()


async def test_the_power_button_is_pressed(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    with launched.monitor.qmp.subscribe("POWERDOWN") as pressed:
        await launched.monitor.power_button()
        await pressed.next(10)


async def test_the_screen_is_a_png(machines: Machines) -> None:
    launched = await machines.start(machines.spec(boot=True, display=Display.VNC))
    await until_counting(launched.process)
    png = await launched.monitor.screendump()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (640, 400), "each dot is doubled"
    assert (machines.root / "one" / "vnc.sock").is_socket()


async def test_a_vm_without_a_display_has_no_screen(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    with pytest.raises(VmmError, match="QEMU refused screendump"):
        await launched.monitor.screendump()


async def test_the_announcement_is_accepted(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    await launched.monitor.announce()


async def test_daemon_and_mover_have_a_monitor_each(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    paths = VmPaths(machines.root / "one")
    mover = await Monitor.connect(paths.mover_qmp_socket)
    assert mover.paths == launched.monitor.paths == paths
    with launched.monitor.qmp.subscribe("STOP") as seen_by_daemon:
        await mover.stop()
        await seen_by_daemon.next(10)
    await mover.close()
