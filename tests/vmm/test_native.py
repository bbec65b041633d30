"""QEMU's own engine, driven through connected TCP sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from tests.vmm.machines import Machines, counter, until_counting, until_counting_on

from transhume.model.errors import TimedOut, VmmError
from transhume.vmm.native import NativeIncoming, NativeOptions, NativeOutgoing

SLOW = NativeOptions(max_bandwidth_bytes_s=100_000, downtime_limit_ms=1)


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


async def test_a_vm_moves_with_its_ram(machines: Machines, wire: tuple[socket.socket, socket.socket]) -> None:
    spec = machines.spec(boot=True, numa_nodes=2)
    source = await machines.start(spec, "source")
    destination = await machines.start(spec, "destination", incoming=True)
    await until_counting(source.process)
    began_s = time.monotonic()

    incoming = await NativeIncoming.begin(destination.monitor, wire[1].fileno())
    outgoing = await NativeOutgoing.begin(source.monitor, wire[0].fileno(), NativeOptions())
    for end in wire:
        end.close()
    stopped_s = await outgoing.wait_stopped(30)
    done = await outgoing.finish(30)
    await incoming.finish(30)

    assert began_s < stopped_s < time.monotonic()
    assert done.status == "completed"
    assert done.total_bytes >= spec.memory_bytes
    assert done.transferred_bytes > done.normal_pages * 4096 > 0
    assert done.downtime_ms is not None
    assert await source.monitor.status() == "postmigrate"
    assert await destination.monitor.status() == "paused"
    counted = counter(destination.process)
    assert counted == counter(source.process)
    await destination.monitor.cont()
    await until_counting_on(destination.process)
    outgoing.close()
    incoming.close()


async def test_a_cancel_leaves_the_vm_running(
    machines: Machines, wire: tuple[socket.socket, socket.socket]
) -> None:
    spec = machines.spec(boot=True)
    source = await machines.start(spec, "source")
    destination = await machines.start(spec, "destination", incoming=True)
    await until_counting(source.process)
    incoming = await NativeIncoming.begin(destination.monitor, wire[1].fileno())
    outgoing = await NativeOutgoing.begin(source.monitor, wire[0].fileno(), SLOW)
    for end in wire:
        end.close()
    while (await outgoing.progress()).status == "setup":
        pass  # each question is a round trip to QEMU
    with pytest.raises(TimedOut, match="is still"):
        await outgoing.finish(0.05)
    assert (await outgoing.progress()).status == "active"
    assert await outgoing.cancel()
    assert await source.monitor.status() == "running"
    with pytest.raises(VmmError, match="QEMU's own migration cancelled"):
        await outgoing.finish()
    with pytest.raises(VmmError, match=r"QEMU did not load the VM: .*\w"):
        await incoming.finish(30)
    outgoing.close()
    incoming.close()
    await destination.process.wait(30)
    await until_counting_on(source.process)


async def test_a_dead_destination_leaves_the_vm_running(
    machines: Machines, wire: tuple[socket.socket, socket.socket]
) -> None:
    spec = machines.spec(boot=True)
    source = await machines.start(spec, "source")
    destination = await machines.start(spec, "destination", incoming=True)
    await until_counting(source.process)
    incoming = await NativeIncoming.begin(destination.monitor, wire[1].fileno())
    outgoing = await NativeOutgoing.begin(source.monitor, wire[0].fileno(), SLOW)
    for end in wire:
        end.close()
    await destination.process.kill()
    with pytest.raises(VmmError, match="QEMU's own migration failed"):
        await outgoing.finish(30)
    with pytest.raises(VmmError, match="QEMU did not stop the VM"):
        await outgoing.wait_stopped(1)
    with pytest.raises(VmmError, match="QEMU did not load the VM"):
        await incoming.finish(30)
    assert await source.monitor.status() == "running"
    outgoing.close()
    incoming.close()


async def test_a_cancel_after_the_end_says_so(
    machines: Machines, wire: tuple[socket.socket, socket.socket]
) -> None:
    spec = machines.spec(boot=True)
    source = await machines.start(spec, "source")
    destination = await machines.start(spec, "destination", incoming=True)
    incoming = await NativeIncoming.begin(destination.monitor, wire[1].fileno())
    outgoing = await NativeOutgoing.begin(source.monitor, wire[0].fileno(), NativeOptions())
    await outgoing.finish(30)
    await incoming.finish(30)
    assert not await outgoing.cancel()
    assert await source.monitor.status() == "postmigrate"
    outgoing.close()
    incoming.close()
