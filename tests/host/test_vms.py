"""The VMs of a host: nothing about them is remembered that could not be found again."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.vmm.machines import Machines, until, until_counting

from transhume.host.vms import LocalVms
from transhume.model.errors import Conflict, NotFound, VmmError
from transhume.model.vm import Disk, VmSpec, VmState


class Host:
    """The VMs of one host, and the specifications that it is given."""

    def __init__(self, vms_dir: Path, machines: Machines) -> None:
        self.vms_dir = vms_dir
        self.machines = machines
        self.vms = self.daemon()

    def daemon(self) -> LocalVms:
        return LocalVms(self.vms_dir, self.machines.vm_user)

    def spec(self, name: str = "small") -> VmSpec:
        return self.machines.spec(boot=True).model_copy(update={"name": name})

    def log(self, name: str, text: bytes) -> Path:
        path = self.vms_dir / name / "serial.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        return path


@pytest.fixture
async def host(root: Path, machines: Machines) -> AsyncIterator[Host]:
    made = Host(root / "vms", machines)
    made.vms_dir.mkdir(mode=0o711)
    yield made
    for name in await made.vms.states():
        await made.vms.kill(name)
    await made.vms.close()


async def test_a_vm_is_started_looked_at_and_ended(host: Host) -> None:
    vms, spec = host.vms, host.spec()
    assert await vms.states() == {}
    await vms.start(spec)
    assert await vms.states() == {"small": VmState.RUNNING}
    assert vms.spec("small") == spec
    process = vms.process("small")
    assert process is not None
    await until_counting(process)
    with pytest.raises(Conflict, match="small runs already"):
        await vms.start(spec)
    with pytest.raises(Conflict, match="stop it before"):
        await vms.delete("small")
    await (await vms.monitor("small")).stop()
    assert await vms.state("small") is VmState.PAUSED
    await vms.kill("small")
    await vms.kill("small")
    assert await vms.state("small") is VmState.STOPPED
    assert vms.process("small") is None
    process.close()
    assert "." in vms.log("small", serial=True, lines=10), "what the guest wrote stays"
    await vms.delete("small")
    assert not (host.vms_dir / "small").exists()
    assert await vms.states() == {}


async def test_the_next_daemon_finds_what_runs(host: Host) -> None:
    await host.vms.start(host.spec())
    first = host.vms.process("small")
    assert first is not None
    await host.vms.close()
    host.vms = host.daemon()
    assert await host.vms.states() == {"small": VmState.RUNNING}
    second = host.vms.process("small")
    assert second is not None
    assert second.pid == first.pid
    assert host.vms.spec("small") == host.spec()
    first.close()
    second.close()


async def test_a_vm_that_died_by_itself_is_stopped_and_starts_again(host: Host) -> None:
    await host.vms.start(host.spec())
    process = host.vms.process("small")
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    process.close()
    assert await host.vms.states() == {"small": VmState.STOPPED}
    with pytest.raises(Conflict, match="does not run"):
        await host.vms.monitor("small")
    await host.vms.start(host.spec())
    assert await host.vms.state("small") is VmState.RUNNING


async def test_a_start_that_fails_leaves_nothing_running(host: Host) -> None:
    broken = host.spec().model_copy(update={"disks": (Disk(path="/no/such/image"),)})
    with pytest.raises(VmmError, match="No such file"):
        await host.vms.start(broken)
    assert await host.vms.states() == {"small": VmState.STOPPED}
    assert "No such file" in host.vms.log("small", serial=False, lines=10)


async def test_what_was_never_here(host: Host) -> None:
    assert host.vms.process("other") is None
    assert await host.vms.state("other") is VmState.STOPPED
    assert host.vms.log("other", serial=True, lines=10) == ""
    with pytest.raises(NotFound, match="other is not on this host"):
        host.vms.spec("other")
    await host.vms.stop("other", timeout_s=1.0)
    await host.vms.kill("other")
    await host.vms.delete("other")
    assert await host.daemon().states() == {}


async def test_traces_of_a_vm_that_is_gone_are_no_vm(host: Host) -> None:
    host.log("small", b"...")
    (host.vms_dir / "small" / "qmp.sock").touch()
    assert await host.vms.states() == {"small": VmState.STOPPED}


async def test_a_record_that_cannot_be_read_is_not_taken_for_a_vm_that_stopped(host: Host) -> None:
    record = host.log("small", b"").with_name("run.json")
    record.write_text("{")
    assert await host.vms.states() == {"small": VmState.UNKNOWN}
    with pytest.raises(VmmError, match=r"run\.json is damaged: remove it"):
        await host.vms.start(host.spec())
    record.unlink()
    assert await host.vms.states() == {"small": VmState.STOPPED}


async def test_a_log_ends_with_its_last_lines(host: Host) -> None:
    host.log("small", b"".join(b"line %d\n" % number for number in range(100)))
    assert host.vms.log("small", serial=True, lines=3) == "line 97\nline 98\nline 99"
    assert len(host.vms.log("small", serial=True, lines=1000).splitlines()) == 100
    assert host.vms.log("small", serial=False, lines=3) == ""


async def test_a_log_may_hold_any_bytes(host: Host) -> None:
    host.log("small", b"\xff\xfe boot\r\n\x1b[0mlogin: ")
    assert host.vms.log("small", serial=True, lines=5).endswith("login: ")


async def test_a_qemu_that_is_ending_is_waited_for(host: Host) -> None:
    """Killed from outside while the daemon holds a connection: the next question finds it gone."""
    await host.vms.start(host.spec())
    await host.vms.state("small")
    process = host.vms.process("small")
    assert process is not None
    process.send_kill()
    await until(lambda: host.vms.process("small") is None, "it is gone")
    process.close()
    assert await host.vms.state("small") is VmState.STOPPED
