"""Whether a VM can move, before a byte does: every reason against it at once, in words with the mend.

Pure: the facts were gathered elsewhere. Reasons are split by whom they concern, because those of the VM and
its source hold for every destination.
"""

from __future__ import annotations

from transhume.farm.members import HostStatus
from transhume.farm.pool import VMM_OVERHEAD_BYTES
from transhume.model.migration import Engine, MigrationOptions
from transhume.model.orders import DestinationFacts, SourceFacts
from transhume.model.vm import Accel, Vm, VmState


def source_reasons(
    vm: Vm, source: HostStatus, facts: SourceFacts, options: MigrationOptions
) -> tuple[str, ...]:
    """Reasons that hold wherever the VM would go."""
    name = vm.spec.name
    reasons = []
    if vm.migration:
        reasons.append(moving_already(name, vm.migration))
    if facts.state is not VmState.RUNNING:
        reasons.append(
            f"VM {name} is {facts.state.value} on {source.name} and only a running VM can move live; "
            f"`transhume vm start {name}` first"
        )
    if options.engine is Engine.TRANSHUME:
        reasons += _own_engine_reasons(source, facts)
    else:
        reasons += _native_engine_reasons(facts)
    reasons += facts.qemu_obstacles
    return tuple(reasons)


def moving_already(vm: str, migration: str) -> str:
    """Why a VM with this migration under way cannot begin another."""
    return f"VM {vm} is already migrating ({migration}); wait for it or `transhume cancel {migration}` first"


def queued_already(vm: str, queued: str) -> str:
    """Why a VM of which this migration waits cannot have another."""
    return f"migration {queued} of VM {vm} is queued already; `transhume cancel {queued}` first"


def destination_reasons(
    vm: Vm,
    source: HostStatus,
    facts: SourceFacts,
    destination: HostStatus,
    found: DestinationFacts | None,
    options: MigrationOptions,
) -> tuple[str, ...]:
    """Reasons that hold for this destination. `found` is None when it could not be asked."""
    if destination.name == source.name:
        return (f"VM {vm.spec.name} runs on {source.name} already; name another host with --to",)
    if found is None:
        return (
            f"host {destination.name} does not answer (last heard from {destination.seen_ago_s:.0f} s ago); "
            "start its daemon with `transhume up`, or choose another host",
        )
    return (
        *_memory_reasons(vm, destination, found),
        *_vmm_reasons(facts, destination),
        *_cpu_reasons(facts, destination),
        *found.disk_obstacles,
        *found.file_obstacles,
        *(_paging_reasons(destination) if options.may_page else ()),
    )


def _paging_reasons(destination: HostStatus) -> list[str]:
    """Pages owed after the resume need the kernel's faults there too."""
    return [
        f"host {destination.name}: {obstacle}; or move with --no-post-copy"
        for obstacle in destination.inventory.tracking_obstacles
    ]


def _own_engine_reasons(source: HostStatus, facts: SourceFacts) -> list[str]:
    """What only this project's engine cannot do: QEMU tracks its own writes and moves RAM of any kind."""
    reasons = [*facts.ram_obstacles, *facts.device_obstacles]
    told = " ".join(facts.device_obstacles)
    reasons += [
        f"disk {disk.path} has cache.direct=on, and reads that bypass the page cache change the guest's "
        "memory unseen; use cache.direct=off or --engine qemu"
        for disk in facts.spec.disks
        if disk.cache_direct and disk.path not in told
    ]
    reasons += [f"host {source.name}: {obstacle}" for obstacle in source.inventory.tracking_obstacles]
    return reasons


def _native_engine_reasons(facts: SourceFacts) -> list[str]:
    """Under TCG, QEMU up to 8.2 loses pages of RAM blocks of round sizes: see docs/decisions/0009."""
    if facts.spec.accel is not Accel.TCG or not facts.spec.added_bytes:
        return []
    return [
        f"VM {facts.spec.name} was given memory while it ran, and QEMU's own engine may lose pages of it "
        "under TCG; use --engine transhume, or stop and start the VM"
    ]


def _memory_reasons(vm: Vm, destination: HostStatus, found: DestinationFacts) -> list[str]:
    needed_bytes = vm.spec.memory_bytes + VMM_OVERHEAD_BYTES
    if found.memory_available_bytes >= needed_bytes:
        return []
    return [
        f"host {destination.name} has {_mib(found.memory_available_bytes)} MiB of memory available and VM "
        f"{vm.spec.name} needs {_mib(needed_bytes)} MiB with QEMU's own; free some or choose another host"
    ]


def _vmm_reasons(facts: SourceFacts, destination: HostStatus) -> list[str]:
    reasons = []
    inventory = destination.inventory
    if facts.qemu_version and inventory.qemu_version != facts.qemu_version:
        reasons.append(
            f"the VM runs under QEMU {facts.qemu_version} and host {destination.name} has "
            f"{inventory.qemu_version or 'none'}; install the same version there"
        )
    machine = facts.spec.machine_type
    if machine and machine not in inventory.machine_types:
        reasons.append(
            f"the QEMU of host {destination.name} does not know the machine type {machine}; "
            "install a version there that does"
        )
    if facts.spec.accel is Accel.KVM and inventory.kvm_obstacle:
        reasons.append(f"the VM runs under KVM and host {destination.name} cannot: {inventory.kvm_obstacle}")
    return reasons


def _cpu_reasons(facts: SourceFacts, destination: HostStatus) -> list[str]:
    """A named, versioned model that runs there whole is enough, whatever else the source's CPU has."""
    under = destination.inventory.cpus_of.get(facts.spec.accel.value)
    if under is not None and facts.spec.cpu_model in under.models:
        return []
    missing = sorted(set(facts.required_cpu_flags) - set(destination.inventory.cpu_flags))
    if not missing:
        return []
    return [
        f"the guest was shown CPU flags that host {destination.name} lacks: {', '.join(missing)}; "
        "choose a host with them, or restart the VM with an older CPU model"
    ]


def _mib(size_bytes: int) -> int:
    return size_bytes >> 20
