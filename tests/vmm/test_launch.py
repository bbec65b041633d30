"""Starting a real QEMU: its rights, its life of its own, its last words."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.vmm.machines import Machines, until, until_counting, until_counting_on

from transhume.model.errors import Refused, VmmError
from transhume.model.vm import Disk
from transhume.vmm.command_line import TCG_TRIM_BYTES, ram_blocks
from transhume.vmm.launch import create_ram, launch
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import find_running


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_qemu_runs_with_few_rights(machines: Machines) -> None:
    launched = await machines.start(machines.spec())
    pid = launched.process.pid
    entry = pwd.getpwnam(machines.vm_user)
    status = status_of(pid)
    assert set(status["Uid"].split()) == {str(entry.pw_uid)}
    assert set(status["Gid"].split()) == {str(entry.pw_gid)}
    assert int(status["CapEff"], 16) == 0
    assert status["Seccomp"] == "2"
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert Path(f"/proc/{pid}/environ").read_bytes().count(b"\0") == 3
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +0 ", limits)
    open_files = re.search(r"Max open files +(\d+) ", limits)
    assert open_files is not None
    assert int(open_files[1]) <= 8192


async def test_qemu_inherits_its_ram_and_nothing_else(machines: Machines) -> None:
    stray, other = os.pipe()
    os.set_inheritable(stray, True)
    try:
        launched = await machines.start(machines.spec(numa_nodes=2))
    finally:
        os.close(stray)
        os.close(other)
    folder = Path(f"/proc/{launched.process.pid}/fd")
    targets = {int(path.name): str(path.readlink()) for path in folder.iterdir()}
    for index, fd in enumerate(launched.process.record.ram_fds):
        assert targets[fd] == f"/memfd:transhume-ram{index} (deleted)"
    assert targets[0] == "/dev/null"
    assert targets[1] == targets[2] == str(machines.root / "one" / "qemu.log")
    assert stray not in targets or not targets[stray].startswith("pipe:")


def test_the_size_of_ram_is_fixed(machines: Machines) -> None:
    (fd,) = create_ram(ram_blocks(machines.spec()))
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
    finally:
        os.close(fd)


async def test_a_guest_boots_and_writes_to_its_serial_log(machines: Machines) -> None:
    launched = await machines.start(machines.spec(boot=True))
    await until_counting(launched.process)
    log = machines.root / "one" / "serial.log"
    await until(lambda: log.read_bytes().count(b".") > 10, "the guest writes")


async def test_qemu_outlives_who_started_it(machines: Machines) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from transhume.model.vm import VmSpec
from transhume.vmm.launch import launch
from transhume.vmm.paths import VmPaths
spec = VmSpec.model_validate_json(sys.argv[1])
asyncio.run(launch(spec, VmPaths(Path(sys.argv[2])), vm_user=sys.argv[3]))
"""
    spec, paths = machines.spec(boot=True), VmPaths(machines.root / "one")
    command = [sys.executable, "-c", script, spec.model_dump_json(), str(paths.directory), machines.vm_user]
    starter = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, complaint = await starter.communicate()
    assert starter.returncode == 0, complaint.decode()

    process = find_running(paths)
    assert process is not None
    try:
        monitor = await Monitor.connect(paths.qmp_socket)
        assert await monitor.status() == "running"
        assert process.record.qemu_version == monitor.version
        await until_counting(process)
        await until_counting_on(process)
        await monitor.close()
    finally:
        await process.kill()
    assert find_running(paths) is None
    process.close()


async def test_qemu_starts_again_in_the_folder_of_a_dead_one(machines: Machines) -> None:
    first = await machines.start(machines.spec())
    await first.process.kill()
    second = await machines.start(machines.spec())
    assert await second.monitor.status() == "running"


async def test_an_early_death_is_explained_in_qemus_words(machines: Machines) -> None:
    spec = machines.spec().model_copy(update={"disks": (Disk(path="/no/such/image"),)})
    for _ in range(2):
        with pytest.raises(
            VmmError, match=r"before it could be used; it said: .*/no/such/image.*No such"
        ) as told:
            await machines.start(spec)
        assert told.value.message.count("No such file") == 1, "words of an earlier start are not repeated"
    assert sorted(path.name for path in (machines.root / "one").iterdir()) == [
        "qemu.log",
        "serial.log",
        "spec.json",
    ]


async def test_a_qemu_that_says_nothing_is_ended(machines: Machines, root: Path) -> None:
    sleeper = root / "sleeper"
    sleeper.write_text(f"#!/bin/sh\necho $$ > {root}/one/pid\necho thinking\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    with pytest.raises(VmmError, match=r"QEMU said: thinking"):
        await launch(
            machines.spec(),
            VmPaths(root / "one"),
            vm_user=machines.vm_user,
            deadline_s=1.0,
            binary=str(sleeper),
        )
    assert not Path(f"/proc/{(root / 'one' / 'pid').read_text().strip()}").exists()


async def test_what_is_missing_on_the_host_is_named(machines: Machines) -> None:
    paths = VmPaths(machines.root / "one")
    with pytest.raises(VmmError, match="no-such-qemu is not installed"):
        await launch(machines.spec(), paths, vm_user=machines.vm_user, binary="no-such-qemu")
    with pytest.raises(Refused, match="no user no-such-user"):
        await launch(machines.spec(), paths, vm_user="no-such-user")


async def test_a_vm_has_several_ram_blocks_and_vcpus(machines: Machines) -> None:
    launched = await machines.start(machines.spec(boot=True, cpus=2, numa_nodes=2))
    await until_counting(launched.process)
    folder = Path(f"/proc/{launched.process.pid}/fd")
    sizes = [(folder / str(fd)).stat().st_size for fd in launched.process.record.ram_fds]
    assert sizes == [(16 << 20) - TCG_TRIM_BYTES] * 2
    assert len(await launched.monitor.qmp.execute("query-cpus-fast")) == 2
