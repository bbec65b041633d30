"""The monitor protocol: a real QEMU, and peers that are none."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.vmm.machines import Machines

from transhume.model.errors import TimedOut, VmmError
from transhume.vmm.qmp import Qmp


@asynccontextmanager
async def peer(path: Path, greeting: bytes, *, hang_up: bool) -> AsyncIterator[None]:
    """Somebody at `path` who says `greeting` and then nothing more."""
    over = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        if not hang_up:
            await over.wait()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    yield
    over.set()
    server.close()
    await server.wait_closed()


async def test_a_refusal_carries_qemus_words_and_the_command(machines: Machines) -> None:
    qmp = (await machines.start(machines.spec())).monitor.qmp
    with pytest.raises(VmmError, match=r"VM one: QEMU refused device_del: Device 'nothing' not found"):
        await qmp.execute("device_del", id="nothing")
    with pytest.raises(
        VmmError, match="QEMU refused make-coffee: The command make-coffee has not been found"
    ):
        await qmp.execute("make-coffee")
    assert (await qmp.execute("query-status"))["status"] == "running"


async def test_events_are_heard_from_the_subscription_on(machines: Machines) -> None:
    qmp = (await machines.start(machines.spec())).monitor.qmp
    await qmp.execute("stop")
    with qmp.subscribe("STOP", "RESUME") as some, qmp.subscribe() as all_events:
        await qmp.execute("cont")
        await qmp.execute("stop")
        assert [(await some.next(5)).name for _ in range(2)] == ["RESUME", "STOP"]
        assert [(await all_events.next(5)).name for _ in range(2)] == ["RESUME", "STOP"]
        with pytest.raises(TimedOut, match=r"RESUME or STOP within 0.01 s"):
            await some.next(0.01)


async def test_the_death_of_qemu_reaches_everybody_who_waits(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    qmp = launched.monitor.qmp
    with qmp.subscribe("STOP") as waiting, qmp.subscribe("STOP") as listening:

        async def listen() -> list[str]:
            return [event.name async for event in listening]

        listener = asyncio.create_task(listen())
        waiter = asyncio.create_task(waiting.next())
        await qmp.execute("stop")
        assert (await waiter).name == "STOP"
        waiter = asyncio.create_task(waiting.next())
        await launched.process.kill()
        await qmp.wait_closed()
        assert await listener == ["STOP"]
        with pytest.raises(VmmError, match="QEMU went away while an event was waited for"):
            await waiter
        with pytest.raises(VmmError, match="went away"):
            await waiting.next(1)
    assert not qmp.connected
    with pytest.raises(VmmError, match="QEMU went away before it answered to query-status"):
        await qmp.execute("query-status")
    with pytest.raises(VmmError, match="no file can be given to QEMU"):
        await qmp.execute_with_fd(0, "getfd", fdname="x")
    with qmp.subscribe("STOP") as late, pytest.raises(VmmError, match="went away"):
        await late.next(1)
    await qmp.close()


async def test_death_interrupts_a_command(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    os.kill(launched.process.pid, 19)  # SIGSTOP: alive, but it does not answer
    command = asyncio.create_task(launched.monitor.status())
    done, _ = await asyncio.wait((command,), timeout=0.05)
    assert not done
    await launched.process.kill()
    with pytest.raises(VmmError, match="QEMU went away before it answered to query-status"):
        await command


async def test_closing_leaves_qemu_alone(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    path = launched.monitor.qmp.path
    await launched.monitor.close()
    await launched.monitor.close()
    again = await Qmp.connect(path)
    assert (await again.execute("query-status"))["running"]
    await again.close()


async def test_descriptors_do_not_get_mixed_up(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    files = [os.memfd_create(f"file-{number}") for number in range(8)]
    try:
        lent = await asyncio.gather(*(launched.monitor.lend_fd(fd) for fd in files))
        for number, file in enumerate(lent):
            inside = Path(f"/proc/{launched.process.pid}/fd/{file.number}")
            assert str(inside.readlink()) == f"/memfd:file-{number} (deleted)"
            await launched.monitor.take_back_fd(file)
            assert not inside.exists()
    finally:
        for fd in files:
            os.close(fd)


async def test_a_second_client_is_told_that_the_monitor_is_taken(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    with pytest.raises(VmmError, match="another client may hold this monitor"):
        await Qmp.connect(launched.monitor.qmp.path, deadline_s=0.1)


async def test_nobody_at_the_socket_is_told_after_the_deadline(root: Path) -> None:
    with pytest.raises(VmmError, match=r"nobody listens at .*/qmp.sock"):
        await Qmp.connect(root / "qmp.sock", deadline_s=0.05)
    (root / "file").touch()
    with pytest.raises(VmmError, match=r"nobody listens at"):
        await Qmp.connect(root / "file", deadline_s=0.05)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"{}\n", b"\xff\xfe\n"])
async def test_a_peer_that_is_no_qemu_is_told(root: Path, greeting: bytes) -> None:
    async with peer(root / "qmp.sock", greeting, hang_up=True):
        with pytest.raises(VmmError, match="did not answer as one should"):
            await Qmp.connect(root / "qmp.sock", deadline_s=5)


async def test_a_connection_that_is_not_greeted_is_left_for_another(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transhume.vmm.qmp.GREETING_LIMIT_S", 0.05)
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections > 1:
            version = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}
            writer.write(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
            await reader.readuntil(b"}")
            writer.write(b'{"return": {}}\n')
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.release()

    left = asyncio.Semaphore(0)
    server = await asyncio.start_unix_server(serve, root / "qmp.sock")
    qmp = await Qmp.connect(root / "qmp.sock", deadline_s=20)
    assert (qmp.version, connections) == ("7.2.22", 2)
    await qmp.close()
    for _ in range(connections):
        await asyncio.wait_for(left.acquire(), 20)
    server.close()
    await server.wait_closed()


async def test_a_peer_that_says_nothing_is_told(root: Path) -> None:
    async with peer(root / "qmp.sock", b"", hang_up=False):
        with pytest.raises(VmmError, match=r"did not greet on .* within 0.05 s"):
            await Qmp.connect(root / "qmp.sock", deadline_s=0.05)
