"""Each reason against a migration by itself, and all of them at once. Pure facts in, sentences out."""

from __future__ import annotations

from typing import Any

import pytest

from transhume.farm.members import HostStatus
from transhume.farm.pool import VMM_OVERHEAD_BYTES
from transhume.farm.preflight import destination_reasons, source_reasons
from transhume.model.host import GuestCpus, ModelRank
from transhume.model.migration import Engine, MigrationOptions
from transhume.model.orders import DestinationFacts, SourceFacts
from transhume.model.vm import Accel, Disk, Ownership, Vm, VmSpec, VmState
from transhume.sim.scripted_host import INVENTORY, MACHINE_TYPE

SPEC = VmSpec(name="web", memory_bytes=1 << 30, cpus=1, machine_type=MACHINE_TYPE, accel=Accel.TCG)
VM = Vm(spec=SPEC, ownership=Ownership(owner="alpha", epoch=1), state=VmState.RUNNING)
FACTS = SourceFacts(state=VmState.RUNNING, spec=SPEC, qemu_version=INVENTORY.qemu_version)
ROOM = DestinationFacts(memory_available_bytes=(1 << 30) + VMM_OVERHEAD_BYTES)
OURS = MigrationOptions()
QEMUS = MigrationOptions(engine=Engine.QEMU)


def host(name: str, **inventory: Any) -> HostStatus:
    return HostStatus(
        name=name,
        address="192.0.2.1",
        port=7461,
        joined_at_s=0.0,
        last_seen_s=0.0,
        inventory=INVENTORY.model_copy(update=inventory),
        silent=False,
        seen_ago_s=21.0,
    )


ALPHA, BETA = host("alpha"), host("beta")


def at_source(
    options: MigrationOptions = OURS, vm: Vm = VM, source: HostStatus = ALPHA, **facts: Any
) -> tuple[str, ...]:
    return source_reasons(vm, source, FACTS.model_copy(update=facts), options)


def at_destination(
    found: DestinationFacts | None = ROOM,
    destination: HostStatus = BETA,
    options: MigrationOptions = OURS,
    **facts: Any,
) -> tuple[str, ...]:
    return destination_reasons(VM, ALPHA, FACTS.model_copy(update=facts), destination, found, options)


def test_a_destination_that_cannot_page_is_told_unless_nothing_is_owed() -> None:
    old = host("beta", tracking_obstacles=("this kernel has no WP_ASYNC: install Linux 6.7 or newer",))
    (reason,) = at_destination(destination=old)
    assert reason.startswith("host beta: this kernel has no WP_ASYNC")
    assert "--no-post-copy" in reason
    assert at_destination(destination=old, options=MigrationOptions(post_copy=False)) == ()


def test_a_vm_that_fits_has_no_reason_against_it() -> None:
    assert at_source() == ()
    assert at_destination() == ()


def test_a_vm_that_does_not_run() -> None:
    [reason] = at_source(state=VmState.STOPPED)
    assert reason == (
        "VM web is stopped on alpha and only a running VM can move live; `transhume vm start web` first"
    )


def test_a_vm_that_is_migrating_already() -> None:
    [reason] = at_source(vm=VM.model_copy(update={"migration": "m1"}))
    assert "already migrating (m1)" in reason


@pytest.mark.parametrize("kind", ["ram_obstacles", "device_obstacles"])
def test_what_only_our_engine_cannot_do(kind: str) -> None:
    sentences = ("RAM block pc.ram is not shared: start the VM with share=on for it",)
    told: dict[str, Any] = {kind: sentences}
    assert at_source(**told) == sentences
    assert at_source(QEMUS, **told) == ()


def test_what_qemu_itself_forbids_holds_for_both_engines() -> None:
    told = ("QEMU itself forbids it: a device is not migratable",)
    assert at_source(qemu_obstacles=told) == told
    assert at_source(QEMUS, qemu_obstacles=told) == told


def test_a_kernel_that_cannot_track() -> None:
    source = host(
        "alpha", tracking_obstacles=("this kernel has no PAGEMAP_SCAN: install Linux 6.7 or newer",)
    )
    [reason] = at_source(source=source)
    assert reason == "host alpha: this kernel has no PAGEMAP_SCAN: install Linux 6.7 or newer"
    assert at_source(QEMUS, source=source) == ()


def test_a_disk_past_the_page_cache_is_told_once() -> None:
    spec = SPEC.model_copy(update={"disks": (Disk(path="/srv/web.raw", cache_direct=True),)})
    [reason] = at_source(spec=spec)
    assert "/srv/web.raw" in reason
    assert "cache.direct=on" in reason
    told = ("disk /srv/web.raw has cache.direct=on: start the VM with cache.direct=off for it",)
    assert at_source(spec=spec, device_obstacles=told) == told
    assert at_source(QEMUS, spec=spec) == ()


def test_the_same_host() -> None:
    [reason] = at_destination(destination=ALPHA)
    assert "runs on alpha already" in reason


def test_a_host_that_does_not_answer() -> None:
    [reason] = at_destination(found=None)
    assert "beta does not answer (last heard from 21 s ago)" in reason


def test_too_little_memory() -> None:
    [reason] = at_destination(DestinationFacts(memory_available_bytes=(1 << 30) + VMM_OVERHEAD_BYTES - 1))
    assert reason == (
        "host beta has 1215 MiB of memory available and VM web needs 1216 MiB with QEMU's own; "
        "free some or choose another host"
    )


def test_another_qemu() -> None:
    [reason] = at_destination(destination=host("beta", qemu_version="8.2.0"))
    assert "under QEMU 7.2.22 and host beta has 8.2.0" in reason


def test_a_machine_type_that_is_not_known_there() -> None:
    [reason] = at_destination(destination=host("beta", machine_types=("pc-q35-8.2",)))
    assert "does not know the machine type pc-q35-7.2" in reason


def test_kvm_that_is_not_there() -> None:
    spec = SPEC.model_copy(update={"accel": Accel.KVM})
    [reason] = at_destination(destination=host("beta", kvm_obstacle="/dev/kvm is missing"), spec=spec)
    assert reason == "the VM runs under KVM and host beta cannot: /dev/kvm is missing"


def test_cpu_flags_that_are_missing_are_all_named() -> None:
    [reason] = at_destination(required_cpu_flags=("avx512f", "sse4_2", "amx_tile"))
    assert "lacks: amx_tile, avx512f;" in reason


def test_a_named_model_that_runs_there_needs_no_other_flags() -> None:
    spec = SPEC.model_copy(update={"accel": Accel.KVM, "cpu_model": "Haswell-v4"})
    told = {"kvm": GuestCpus(models={"Haswell-v4": ModelRank(3, 60)})}
    whole, other = host("beta", cpus_of=told), host("beta", cpus_of={"kvm": GuestCpus()})
    flags = ("avx512f",)
    assert at_destination(destination=whole, spec=spec, required_cpu_flags=flags) == ()
    [reason] = at_destination(destination=other, spec=spec, required_cpu_flags=flags)
    assert "lacks: avx512f" in reason
    unnamed = spec.model_copy(update={"cpu_model": "host"})
    assert len(at_destination(destination=whole, spec=unnamed, required_cpu_flags=flags)) == 1


def test_disks_and_files_that_cannot_be_reached() -> None:
    found = ROOM.model_copy(
        update={"disk_obstacles": ("disk /a is not there",), "file_obstacles": ("no /k",)}
    )
    assert at_destination(found) == ("disk /a is not there", "no /k")


def test_all_reasons_at_once() -> None:
    spec = SPEC.model_copy(
        update={"accel": Accel.KVM, "disks": (Disk(path="/srv/web.raw", cache_direct=True),)}
    )
    general = at_source(
        vm=VM.model_copy(update={"migration": "m1"}),
        source=host("alpha", tracking_obstacles=("no WP_ASYNC",)),
        state=VmState.PAUSED,
        spec=spec,
        ram_obstacles=("not shared",),
        device_obstacles=("vhost-user",),
        qemu_obstacles=("blocked",),
    )
    special = at_destination(
        DestinationFacts(memory_available_bytes=1, disk_obstacles=("no disk",), file_obstacles=("no file",)),
        host("beta", qemu_version="8.2.0", machine_types=(), kvm_obstacle="no kvm"),
        spec=spec,
        required_cpu_flags=("avx512f",),
    )
    assert len(general) == 7
    assert len(special) == 7
    assert all(reason for reason in (*general, *special))
