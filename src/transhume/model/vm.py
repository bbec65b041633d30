"""A VM: what was asked for, what runs, and who may run it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""Names of hosts and VMs are DNS labels: safe in paths, host names and URLs."""

PAGE_BYTES = 4096
"""The unit of transfer on x86-64, whatever the size of the pages behind the guest's RAM."""


class Display(StrEnum):
    """What the guest draws on."""

    NONE = "none"
    VNC = "vnc"


class Accel(StrEnum):
    """Who executes the guest's instructions. `AUTO` is resolved once, when the VM first starts."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Disk(BaseModel):
    """One virtual disk: an image file that every host reaches under the same path."""

    model_config = ConfigDict(frozen=True)

    path: str
    format: str = "raw"
    cache_direct: bool = False
    read_only: bool = False


class VmSpec(BaseModel):
    """What the owner of a VM asked for. Enough to build the same VM on any host.

    `memory_bytes` is split evenly into `numa_nodes` RAM blocks. `machine_type` is a versioned QEMU
    machine (`pc-q35-7.2`), never an alias, so that both ends of a migration build the same one; empty
    means that the first start fills it in. `accel` likewise.
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    memory_bytes: int = Field(ge=16 << 20, multiple_of=1 << 20)
    cpus: int = Field(ge=1, le=255)
    numa_nodes: int = Field(default=1, ge=1, le=8)
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    disks: tuple[Disk, ...] = ()
    display: Display = Display.NONE
    accel: Accel = Accel.AUTO
    machine_type: str = ""
    cpu_model: str = ""


class RamBlock(BaseModel):
    """One contiguous piece of guest RAM, backed by one memfd. `index` is its number on the wire."""

    model_config = ConfigDict(frozen=True)

    index: int
    name: str
    size_bytes: int


class VmState(StrEnum):
    """What the vCPUs do."""

    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    UNKNOWN = "unknown"


class Ownership(BaseModel):
    """The register: only the host `owner` may run the VM's vCPUs, in the era numbered `epoch`."""

    model_config = ConfigDict(frozen=True)

    owner: str
    epoch: int


class Vm(BaseModel):
    """A VM as the farm knows it. `migration` is the id of the one under way, or empty; `queued` of the one
    that waits for it. With `reserve` its host keeps its share while it is stopped too; `labels` stand for it
    in rules.
    """

    model_config = ConfigDict(frozen=True)

    spec: VmSpec
    ownership: Ownership
    state: VmState = VmState.STOPPED
    migration: str = ""
    queued: str = ""
    created_at_s: float = 0.0
    reserve: bool = False
    labels: tuple[str, ...] = ()
