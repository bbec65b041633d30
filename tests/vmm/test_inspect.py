"""Every obstacle is found, and a VM of ours has none."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.vmm.machines import Machines
from tests.vmm.scripted_monitor import scripted_monitor

from transhume.model.vm import Disk, Display
from transhume.vmm.inspect import Obstacles, access_obstacle, find_obstacles
from transhume.vmm.monitor import Monitor

Look = Callable[..., Awaitable[Obstacles]]


@pytest.fixture
async def look(root: Path) -> AsyncIterator[Look]:
    """Starts a QEMU with arguments of any kind, not by `launch`, and looks at it."""
    children: list[asyncio.subprocess.Process] = []

    async def start_and_look(*arguments: str, ram_fd: int | None = None) -> Obstacles:
        socket_path = root / "qmp.sock"
        child = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64",
            *("-nodefaults", "-display", "none", "-S"),
            *("-qmp", f"unix:{socket_path},server=on,wait=off"),
            *arguments,
            stdin=subprocess.DEVNULL,
            pass_fds=() if ram_fd is None else (ram_fd,),
        )
        children.append(child)
        monitor = await Monitor.connect(socket_path)
        try:
            return await find_obstacles(monitor, child.pid)
        finally:
            await monitor.close()

    yield start_and_look
    for child in children:
        child.kill()
        await child.wait()


async def test_our_vms_have_none(machines: Machines) -> None:
    launched = await machines.start(machines.spec(boot=True, display=Display.VNC, cpus=2, numa_nodes=2))
    assert await find_obstacles(launched.monitor, launched.process.pid) == Obstacles()


async def test_a_disk_that_goes_past_the_page_cache(machines: Machines) -> None:
    image = machines.root / "direct.img"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o666)
    spec = machines.spec().model_copy(update={"disks": (Disk(path=str(image), cache_direct=True),)})
    launched = await machines.start(spec)
    found = await find_obstacles(launched.monitor, launched.process.pid)
    (obstacle,) = found.devices
    assert str(image) in obstacle
    assert "cache.direct=off" in obstacle


async def test_private_ram(look: Look) -> None:
    found = await look("-machine", "q35", "-m", "32")
    assert found.ram == ("RAM block pc.ram (32 MiB) is not shared: start the VM with share=on for it",) or (
        found.ram == ("32 MiB of RAM are private to QEMU: start the VM with its RAM in memfds",)
    )


async def test_a_file_that_is_not_shared(look: Look, root: Path) -> None:
    (root / "ram").write_bytes(bytes(32 << 20))
    backend = f"memory-backend-file,id=r0,size=32M,share=off,mem-path={root}/ram"
    found = await look("-machine", "q35,memory-backend=r0", "-m", "32", "-object", backend)
    assert found.ram == ("RAM block r0 (32 MiB) is not shared: start the VM with share=on for it",)


@pytest.mark.parametrize("kind", ["file", "memfd of qemu", "memfd of another"])
async def test_shared_ram_that_is_not_ours(look: Look, root: Path, kind: str) -> None:
    fd = os.memfd_create("somebody-else")
    os.ftruncate(fd, 32 << 20)
    (root / "ram").write_bytes(bytes(32 << 20))
    backend = {
        "file": f"memory-backend-file,mem-path={root}/ram",
        "memfd of qemu": "memory-backend-memfd",
        "memfd of another": f"memory-backend-file,mem-path=/proc/self/fd/{fd}",
    }[kind]
    try:
        found = await look(
            *("-machine", "q35,memory-backend=r0", "-m", "32"),
            *("-object", f"{backend},id=r0,size=32M,share=on"),
            ram_fd=fd,
        )
    finally:
        os.close(fd)
    (obstacle,) = found.ram
    assert obstacle.startswith("RAM block r0 (32 MiB) is not a memfd of Transhume's")


async def test_qemus_own_reasons(look: Look, root: Path) -> None:
    (root / "shared").mkdir()
    found = await look(
        *("-machine", "q35", "-m", "32"),
        *("-blockdev", f"driver=vvfat,node-name=fat,dir={root}/shared,rw=on"),
    )
    assert all(sentence.startswith("QEMU itself forbids it: The ") for sentence in found.qemu)
    assert any("vvfat" in sentence for sentence in found.qemu)


async def test_devices_of_other_processes_and_hardware(root: Path) -> None:
    """No test machine has these, so a scripted QEMU does."""
    devices = {
        "/machine/peripheral": [
            {"name": "type", "type": "string"},
            {"name": "card0", "type": "child<vfio-pci>"},
            {"name": "disk0", "type": "child<virtio-blk-pci>"},
            {"name": "share0", "type": "child<vhost-user-fs-pci>"},
        ],
        "/machine/peripheral-anon": [{"name": "device[0]", "type": "child<vhost-user-blk-pci>"}],
    }
    network = "card1: index=0,type=nic,model=virtio-net-pci\r\n \\ net0: index=0,type=vhost-user,fd=1\r\n"
    answers = {
        "query-memdev": [],
        "query-memory-size-summary": {"base-memory": 0},
        "qom-list": lambda arguments: devices[arguments["path"]],
        "human-monitor-command": network,
        "query-named-block-nodes": [
            {"node-name": "n0", "drv": "nvme", "cache": {"direct": True}, "file": "nvme://0000:01:00.0/1"}
        ],
        "query-migrate": {"blocked-reasons": ["one", "two"]},
    }
    async with scripted_monitor(root / "qmp.sock", answers) as monitor:
        found = await find_obstacles(monitor, os.getpid())
    assert found.ram == ()
    assert [sentence.split(" is ")[0] for sentence in found.devices] == [
        "device card0 (vfio-pci)",
        "device share0 (vhost-user-fs-pci)",
        "device device[0] (vhost-user-blk-pci)",
        "network net0",
        "disk nvme://0000:01:00.0/1",
    ]
    assert all(sentence.endswith("unplug it first") for sentence in found.devices)
    assert found.qemu == ("QEMU itself forbids it: one", "QEMU itself forbids it: two")


async def test_access_to_files(root: Path, vm_user: str) -> None:
    image = root / "image"
    assert "is not there" in await access_obstacle(str(image), False, vm_user)
    assert "is a folder" in await access_obstacle(str(root), False, vm_user)
    image.touch(mode=0o600)
    assert f"{vm_user} may not read {image}" in await access_obstacle(str(image), False, vm_user)
    image.chmod(0o644)
    assert await access_obstacle(str(image), False, vm_user) == ""
    assert f"{vm_user} may not write {image}" in await access_obstacle(str(image), True, vm_user)
    image.chmod(0o666)
    assert await access_obstacle(str(image), True, vm_user) == ""
    root.chmod(0o700)
    assert "may not read" in await access_obstacle(str(image), True, vm_user)
