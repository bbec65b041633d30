"""Judgements about network, storage and memory, with made-up facts: good, bad and borderline."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from transhume.host.doctor import memory, network, storage
from transhume.model.finding import Finding, Level

MIB = 1 << 20
PORTS = network.PortFacts("10.0.0.1", 7461, "", 32768, 60999)
WAY = network.WayFacts("10.0.0.1 port 7461", "eth0", 1500, 1500, True)
DISK = storage.StorageFacts(
    "/var/lib/transhume",
    storage.Mount("/", "ext4", frozenset({"rw"})),
    free_bytes=8 << 30,
    free_files=100_000,
    punches_holes=True,
    direct=True,
)
MEMORY = memory.MemoryFacts(total_bytes=16 << 30, available_bytes=12 << 30)


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


def test_ports() -> None:
    assert levels(network.judge_ports(PORTS)) == {Level.OK}
    taken = replace(PORTS, refusal="Address already in use")
    (finding,) = network.judge_ports(taken)
    assert finding.level is Level.ERROR
    assert "10.0.0.1 port 7461" in finding.words
    assert levels(network.judge_ports(taken, daemon_runs=True)) == {Level.OK}
    assert levels(network.judge_ports(replace(PORTS, first_free=60000))) == {Level.OK, Level.WARNING}
    assert levels(network.judge_ports(replace(PORTS, first_free=1024))) == {Level.OK, Level.NOTE}


@pytest.mark.parametrize(
    ("way", "level", "words"),
    [
        (WAY, Level.OK, "large packets reach"),
        (replace(WAY, path_mtu=0), Level.OK, "large packets reach"),
        (replace(WAY, refusal="No route to host"), Level.ERROR, "No route to host"),
        (replace(WAY, large_passed=False), Level.ERROR, "large packets do not arrive"),
        (replace(WAY, interface_mtu=9000), Level.WARNING, "sends larger packets"),
        (replace(WAY, path_mtu=1200), Level.WARNING, "1200 bytes only"),
        (replace(WAY, large_passed=None), Level.NOTE, "ended the trial"),
    ],
)
def test_the_way_to_the_controller(way: network.WayFacts, level: Level, words: str) -> None:
    (finding,) = network.judge_way(way)
    assert finding.level is level
    assert words in finding.words


def test_a_port_that_somebody_has_and_an_address_of_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert network.gather_ports("127.0.0.1", port).refusal == "Address already in use"
    assert network.gather_ports("127.0.0.1", port).refusal == ""
    assert "no address of this machine" in network.gather_ports("192.0.2.7", port).refusal


def test_large_packets_really_go_to_the_far_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as controller:
        way = network.gather_way(("127.0.0.1", controller.getsockname()[1]))
    assert (way.interface, way.large_passed, way.refusal) == ("lo", True, "")
    assert way.interface_mtu == way.path_mtu > 1500
    assert network.gather_way(("127.0.0.1", controller_port_that_is_free())).refusal == "Connection refused"


def controller_port_that_is_free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_packets_that_nobody_takes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver whose window is full acknowledges no more, as if the packets were lost on the way."""
    monkeypatch.setattr(network, "PROBE_LIMIT_S", 0.2)
    monkeypatch.setattr(network, "PROBE_BYTES", 64 * MIB)
    with socket.create_server(("127.0.0.1", 0)) as controller:
        assert network.gather_way(("127.0.0.1", controller.getsockname()[1])).large_passed is False


def test_bridges(tmp_path: Path) -> None:
    (tmp_path / "br0" / "bridge").mkdir(parents=True)
    (tmp_path / "eth0").mkdir()
    assert network.bridges(tmp_path) == ("br0",)
    assert levels(network.judge_bridges(("br0",))) == {Level.OK}
    assert levels(network.judge_bridges(())) == {Level.NOTE}


def on(kind: str, *options: str) -> storage.StorageFacts:
    return replace(DISK, mount=storage.Mount("/", kind, frozenset(options)))


@pytest.mark.parametrize(
    ("facts", "worst", "words"),
    [
        (DISK, Level.OK, "8192 MiB free on ext4"),
        (on("nfs4"), Level.ERROR, "is on nfs4"),
        (on("tmpfs"), Level.WARNING, "forgets the farm"),
        (on("ext4", "ro"), Level.ERROR, "read-only"),
        (replace(DISK, write_refusal="Permission denied"), Level.ERROR, "Permission denied"),
        (replace(DISK, free_bytes=63 * MIB), Level.ERROR, "63 MiB"),
        (replace(DISK, free_bytes=64 * MIB), Level.WARNING, "64 MiB"),
        (replace(DISK, free_bytes=1024 * MIB), Level.OK, "1024 MiB free"),
        (replace(DISK, free_files=999), Level.WARNING, "999 more files"),
        (replace(DISK, free_files=None), Level.OK, "MiB free"),
        (replace(DISK, no_way="transhume-vm may not pass through /root"), Level.ERROR, "/root"),
        (replace(DISK, punches_holes=False), Level.NOTE, "makes no holes"),
        (replace(DISK, direct=False), Level.NOTE, "O_DIRECT"),
        (replace(DISK, longest_name_fits=False), Level.NOTE, "long names"),
    ],
)
def test_storage(facts: storage.StorageFacts, worst: Level, words: str) -> None:
    findings = storage.judge(facts)
    assert max(findings, key=lambda finding: list(Level).index(finding.level)).level is worst
    assert any(words in finding.words for finding in findings)


def test_the_mount_of_a_path() -> None:
    mounts = "\n".join(
        (
            "22 27 254:0 / / rw,relatime - ext4 /dev/vda rw",
            "23 22 0:30 / /srv/my\\040farm rw,noexec shared:1 - nfs4 nas:/farm rw,vers=4.2",
            "24 23 0:31 / /srv rw - xfs /dev/vdb ro",
        )
    )
    found = storage.mount_of(Path("/srv/my farm/state"), mounts)
    assert (found.point, found.kind) == ("/srv/my farm", "nfs4")
    assert "noexec" in found.options
    assert storage.mount_of(Path("/srv/other"), mounts).options >= {"rw", "ro"}
    assert storage.mount_of(Path("/srvother"), mounts).point == "/"


async def test_storage_is_tried_without_a_trace(tmp_path: Path) -> None:
    facts = await storage.gather(tmp_path / "not" / "there", "nobody")
    assert list(tmp_path.iterdir()) == []
    assert facts.write_refusal == ""
    assert facts.free_bytes > 0
    assert facts.mount.kind != "unknown"
    # pytest's folders are closed to others, so QEMU's user cannot get there.
    assert "nobody may not pass through" in facts.no_way


@pytest.mark.parametrize(
    ("facts", "check", "level"),
    [
        (MEMORY, "memory", Level.OK),
        (replace(MEMORY, available_bytes=1 << 30), "memory", Level.OK),
        (replace(MEMORY, available_bytes=(1 << 30) - 1), "memory", Level.WARNING),
        (replace(MEMORY, available_bytes=255 * MIB), "memory", Level.ERROR),
        (replace(MEMORY, overcommit=2), "overcommit", Level.WARNING),
        (replace(MEMORY, huge_free_bytes=4 << 30), "huge-pages", Level.WARNING),
        (replace(MEMORY, swap_bytes=1 << 30), "swap", Level.NOTE),
        (replace(MEMORY, cgroup_limit_bytes=2 << 30), "cgroup", Level.WARNING),
        (replace(MEMORY, cgroup_tasks=100), "cgroup", Level.WARNING),
        (replace(MEMORY, open_files=256), "open-files", Level.WARNING),
    ],
)
def test_memory(facts: memory.MemoryFacts, check: str, level: Level) -> None:
    assert (check, level) in {(finding.check, finding.level) for finding in memory.judge(facts)}


def test_memory_without_a_fault_says_one_thing() -> None:
    harmless = replace(MEMORY, overcommit=1, huge_free_bytes=64 * MIB, cgroup_limit_bytes=16 << 30)
    assert [finding.check for finding in memory.judge(harmless)] == ["memory"]


def test_the_least_limit_of_all_cgroups_above_counts(tmp_path: Path) -> None:
    inner = tmp_path / "system.slice" / "ssh.service"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("4096\n")
    text = "0::/system.slice/ssh.service\n"
    assert memory.least_limit(text, tmp_path, "memory.max", "old", "memory") == 4096
    assert memory.least_limit("0::/\n", tmp_path, "memory.max", "old", "memory") is None
    old = tmp_path / "memory" / "jail"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("8192\n")
    both = "4:memory:/jail\n3:cpuset:/jail\n0::/\n"
    assert memory.least_limit(both, tmp_path, "memory.max", "memory.limit_in_bytes", "memory") == 8192
    assert memory.gather().total_bytes > 0
