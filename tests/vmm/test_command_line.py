"""The command line: a pure function of the specification."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transhume.model.errors import Refused
from transhume.model.vm import Accel, Disk, Display, VmSpec
from transhume.vmm.command_line import DISKS_MAX, TCG_TRIM_BYTES, build_command, ram_blocks
from transhume.vmm.paths import VmPaths

HERE, THERE = VmPaths(Path("/here/vms/a")), VmPaths(Path("/there/vms/a"))


def spec(**changes: object) -> VmSpec:
    resolved: dict[str, object] = {
        "name": "a",
        "memory_bytes": 64 << 20,
        "cpus": 2,
        "accel": Accel.TCG,
        "machine_type": "pc-q35-7.2",
    }
    return VmSpec.model_validate(resolved | changes)


def values(command: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == option]


def test_both_ends_build_the_same_machine() -> None:
    wanted = spec(display=Display.VNC, numa_nodes=2, disks=(Disk(path="/d/a"), Disk(path="/d/b")))
    source = build_command(wanted, HERE, [3, 4], incoming=False)
    destination = build_command(wanted, THERE, [7, 8], incoming=True)
    assert destination[-3:] == ["-incoming", "defer", "-S"]
    translated = [
        word.replace("/there", "/here").replace("fd/7", "fd/3").replace("fd/8", "fd/4")
        for word in destination[:-3]
    ]
    assert translated == source


def test_qemu_gets_no_more_than_it_needs() -> None:
    command = build_command(spec(), HERE, [3], incoming=False)
    assert values(command, "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ]
    assert "-nodefaults" in command
    assert "-no-user-config" in command
    assert "-runas" not in command


def test_ram_is_a_shared_file_that_qemu_inherits() -> None:
    command = build_command(spec(), HERE, [5], incoming=False)
    (backend,) = values(command, "-object")
    assert json.loads(backend) == {
        "qom-type": "memory-backend-file",
        "id": "ram0",
        "size": (64 << 20) - TCG_TRIM_BYTES,
        "share": True,
        "mem-path": "/proc/self/fd/5",
    }
    assert values(command, "-m") == [f"size={((64 << 20) - TCG_TRIM_BYTES) >> 10}K"]
    assert values(command, "-machine")[0].endswith(",memory-backend=ram0")
    assert values(command, "-numa") == []


def test_each_numa_node_has_a_block_and_its_share_of_the_cpus() -> None:
    command = build_command(spec(numa_nodes=3, cpus=2), HERE, [3, 4, 5], incoming=False)
    assert values(command, "-numa") == [
        "node,nodeid=0,memdev=ram0,cpus=0-0",
        "node,nodeid=1,memdev=ram1,cpus=1-1",
        "node,nodeid=2,memdev=ram2",
    ]
    assert "memory-backend=" not in values(command, "-machine")[0]


def test_what_was_added_is_there_from_the_start_at_the_other_end() -> None:
    grown = spec(max_memory_bytes=1 << 30).with_added(128 << 20).with_added(256 << 20)
    command = build_command(grown, HERE, [3, 4, 5], incoming=True)
    backends = [json.loads(value) for value in values(command, "-object")]
    assert [each["size"] for each in backends] == [(64 << 20) - TCG_TRIM_BYTES, 128 << 20, 256 << 20]
    assert values(command, "-m") == [
        f"size={((64 << 20) - TCG_TRIM_BYTES) >> 10}K,slots=16,maxmem={1 << 20}K"
    ]
    assert values(command, "-numa") == ["node,nodeid=0,memdev=ram0,cpus=0-1"]
    modules = [json.loads(value) for value in values(command, "-device")]
    assert [(each["id"], each["memdev"], each["slot"]) for each in modules] == [
        ("dimm0", "ram1", 0),
        ("dimm1", "ram2", 1),
    ]
    assert values(build_command(grown.anew(), HERE, [3], incoming=False), "-device") == []


@pytest.mark.parametrize(
    ("changes", "more_mib", "words"),
    [
        ({}, 128, "it was made without room to grow"),
        ({"max_memory_bytes": 1 << 30}, 100, "must be a multiple of 128 MiB"),
        ({"max_memory_bytes": 1 << 30}, 1024, "it has 64 MiB and may have 1024 MiB at most"),
        ({"max_memory_bytes": 1 << 40, "added_bytes": (1 << 20,) * 16}, 128, "16 times already"),
    ],
)
def test_what_cannot_be_added_is_refused(changes: dict[str, object], more_mib: int, words: str) -> None:
    with pytest.raises(Refused, match=words):
        spec(**changes).with_added(more_mib << 20)


def test_a_vm_that_is_stopped_takes_any_size_and_one_that_runs_only_grows() -> None:
    room = spec(max_memory_bytes=512 << 20)
    assert room.resized(32 << 20, running=False).memory_bytes == 32 << 20
    assert room.resized(1 << 30, running=False).max_memory_bytes == 1 << 30
    assert spec().resized(1 << 30, running=False).max_memory_bytes == 0
    assert room.resized(192 << 20, running=True) == room.model_copy(update={"memory_bytes": 192 << 20})
    assert room.resized(64 << 20, running=True) == room
    with pytest.raises(Refused, match="memory is not taken from a VM that runs"):
        room.resized(32 << 20, running=True)
    with pytest.raises(Refused, match="less than 16 MiB"):
        room.resized(1 << 20, running=False)


@given(mib=st.integers(16, 1 << 20), nodes=st.integers(1, 8), accel=st.sampled_from([Accel.KVM, Accel.TCG]))
def test_blocks_are_even_and_whole(mib: int, nodes: int, accel: Accel) -> None:
    blocks = ram_blocks(spec(memory_bytes=mib << 20, numa_nodes=nodes, accel=accel))
    sizes = [block.size_bytes for block in blocks]
    trim_bytes = TCG_TRIM_BYTES if accel is Accel.TCG else 0
    assert sum(sizes) + nodes * trim_bytes == mib << 20
    assert all(size % (256 << 10) for size in sizes) or accel is Accel.KVM
    assert max(sizes) - min(sizes) in (0, 1 << 20)
    assert [block.index for block in blocks] == list(range(nodes))
    assert len({block.name for block in blocks}) == nodes


def test_disks_have_addresses_of_their_own_and_stop_the_guest_on_errors() -> None:
    disks = (
        Disk(path="/d/with,comma"),
        Disk(path="/dev/vg/b", format="qcow2", cache_direct=True, read_only=True),
    )
    command = build_command(spec(disks=disks), HERE, [3], incoming=False)
    nodes = [json.loads(value) for value in values(command, "-blockdev")]
    assert [node["driver"] for node in nodes] == ["file", "raw", "host_device", "qcow2"]
    assert nodes[0]["filename"] == "/d/with,comma"
    assert [node["cache"]["direct"] for node in nodes] == [False, False, True, True]
    assert [node["read-only"] for node in nodes] == [False, False, True, True]
    assert all(node["drop-cache"] for node in nodes[::2])
    devices = values(command, "-device")
    assert ["addr=0x4" in devices[0], "addr=0x5" in devices[1]] == [True, True]
    assert all("rerror=stop,werror=stop" in device for device in devices)


def test_commas_in_paths_do_not_end_an_option() -> None:
    command = build_command(spec(), VmPaths(Path("/a,b/vm")), [3], incoming=False)
    assert any("path=/a,,b/vm/qmp.sock," in value for value in values(command, "-chardev"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accel": Accel.AUTO}, "no accelerator yet"),
        ({"machine_type": ""}, "no machine type yet"),
        ({"append": "quiet"}, "no kernel"),
        ({"disks": (Disk(path="/d"),) * (DISKS_MAX + 1)}, "remove some"),
    ],
)
def test_what_cannot_run_is_refused_in_words(changes: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        build_command(spec(**changes), HERE, [3], incoming=False)


def test_a_folder_too_deep_for_sockets_is_refused() -> None:
    with pytest.raises(Refused, match="shorter state folder"):
        build_command(spec(), VmPaths(Path("/" + "x" * 100)), [3], incoming=False)
