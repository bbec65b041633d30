"""The lab itself: real namespaces, real wires."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from transhume.demo import lab as lab_module
from transhume.demo import namespaces
from transhume.demo.lab import Lab, LabHost, sweep
from transhume.model.errors import KernelError, TimedOut, TranshumeError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

PORT = 5001
SERVER = f"""
import socket, sys
server = socket.create_server(("", {PORT}))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello")
    connection.close()
"""
CLIENT = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PORT}), timeout=float(sys.argv[2])) as connection:
    print(connection.recv(5).decode())
"""


def serve(host: LabHost) -> subprocess.Popen[bytes]:
    server = host.start(sys.executable, "-c", SERVER, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    return server


def reaches(host: LabHost, address: str, timeout_s: float = 20.0) -> bool:
    return host.run(sys.executable, "-c", CLIENT, address, str(timeout_s)).stdout == "hello\n"


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    with Lab() as lab:
        serve(lab["beta"])
        yield lab


def test_hosts_reach_each_other_and_are_apart_from_this_machine(pair: Lab) -> None:
    alpha, beta = pair.hosts
    assert reaches(alpha, beta.address)
    assert not reaches(alpha, "127.0.0.1", timeout_s=5)
    here = subprocess.run([sys.executable, "-c", CLIENT, "127.0.0.1", "5"], capture_output=True, check=False)
    assert here.stdout == b""


def test_a_cut_wire_loses_everything_until_it_is_restored(pair: Lab) -> None:
    alpha, beta = pair.hosts
    assert reaches(alpha, beta.address)
    pair.cut()
    try:
        assert not reaches(alpha, beta.address, timeout_s=0.3)
    finally:
        pair.restore()
    assert reaches(alpha, beta.address)
    pair.restore()


def test_a_wire_is_shaped_and_freed(pair: Lab) -> None:
    alpha, beta = pair.hosts
    pair.shape(rate_bits_s=100_000_000)
    for host in pair.hosts:
        assert "rate 100Mbit" in namespaces.tc("qdisc", "show", namespace=host.namespace)
    assert reaches(alpha, beta.address)
    pair.shape()
    assert "tbf" not in namespaces.tc("qdisc", "show", namespace=alpha.namespace)


def test_a_delay_works_or_is_refused_in_words(pair: Lab) -> None:
    try:
        pair.shape(delay_ms=1.0)
    except KernelError as error:
        pytest.skip(f"this kernel cannot delay: {error}")
    finally:
        pair.shape()


def test_the_machine_s_own_state_folder_is_not_handed_on(pair: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSHUME_STATE_DIR", "/nowhere")
    assert "TRANSHUME_STATE_DIR" not in pair.hosts[0].run("env").stdout


def test_a_failed_command_tells_its_words(pair: Lab) -> None:
    result = pair.hosts[0].run("sh", "-c", "echo no such luck >&2; exit 7")
    assert result.exit_code == 7
    with pytest.raises(TranshumeError, match="ended with 7: no such luck"):
        result.require_success()
    with pytest.raises(TimedOut, match="did not end within"):
        pair.hosts[0].run("sleep", "60", timeout_s=0.1)


def test_three_hosts_are_joined_by_a_switch() -> None:
    with Lab(("alpha", "beta", "gamma")) as lab:
        serve(lab["gamma"])
        assert reaches(lab["alpha"], lab["gamma"].address)
        assert reaches(lab["beta"], lab["gamma"].address)


def test_two_hosts_may_have_two_links_that_break_one_by_one() -> None:
    with Lab(second_link=True) as lab:
        alpha, beta = lab.hosts
        serve(beta)
        for cut in (lab.cut_first, lab.take_down_first):
            cut()
            assert not reaches(alpha, beta.address, timeout_s=0.3)
            assert reaches(alpha, beta.other_address)
            lab.restore()
            assert reaches(alpha, beta.address)
        lab.cut()
        assert not reaches(alpha, beta.address, timeout_s=0.3)
        assert not reaches(alpha, beta.other_address, timeout_s=0.3)
        lab.restore()
        assert reaches(alpha, beta.other_address)
    with pytest.raises(ValueError, match="joins two hosts"):
        Lab(("alpha", "beta", "gamma"), second_link=True)


def test_nothing_is_left_when_it_closes() -> None:
    with Lab() as lab:
        server = serve(lab["beta"])
        # A process that leaves its parent, its session and its group, as a daemon does.
        detached = lab["alpha"].run("sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!")
        detached_pid = int(detached.stdout)
        assert detached_pid in lab["alpha"].processes()
        lab["alpha"].state_dir.joinpath("file").touch()
        made = [host.namespace for host in lab.hosts]
        folder = lab["alpha"].state_dir.parent
    assert server.returncode == -signal.SIGKILL
    assert not any(namespaces.exists(name) for name in made)
    assert not folder.exists()
    assert not is_running(detached_pid)
    lab.close()


def test_nothing_is_left_after_an_error() -> None:
    lab = Lab()
    with pytest.raises(RuntimeError, match="on purpose"), lab:
        raise RuntimeError("on purpose")
    assert not any(namespaces.exists(host.namespace) for host in lab.hosts)


def test_a_lab_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(first: str, second: str) -> None:
        raise KernelError("no veth here")

    monkeypatch.setattr(namespaces, "join_two", refuse)
    lab = Lab()
    with pytest.raises(KernelError, match="no veth"), lab:
        pass
    assert not any(namespaces.exists(host.namespace) for host in lab.hosts)


def test_what_a_killed_maker_left_is_swept_and_the_living_are_spared(pair: Lab) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with maker:
        assert maker.stdout is not None
        lab_id, namespace, folder, pid = maker.stdout.readline().split()
        assert lab_id not in sweep()
        assert namespaces.exists(namespace)
        maker.kill()
    assert lab_id in sweep()
    assert not namespaces.exists(namespace)
    assert not Path(folder).exists()
    assert not is_running(int(pid))
    assert not (lab_module.RECORDS_DIR / lab_id).exists()
    assert reaches(pair.hosts[0], pair.hosts[1].address)


MAKER = """
import sys
from transhume.demo.lab import Lab
lab = Lab()
lab.__enter__()
sleeper = lab.hosts[0].start("sleep", "600")
host = lab.hosts[0]
print(host.namespace[:-2], host.namespace, host.state_dir.parent, sleeper.pid, flush=True)
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not select.select([pidfd], [], [], 0)[0]
    finally:
        os.close(pidfd)
