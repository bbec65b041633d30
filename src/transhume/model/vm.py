"""A VM: what was asked for, what runs, and who may run it."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from transhume.model.errors import Refused

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


LEAST_MEMORY_BYTES = 16 << 20

ADDED_MEMORY_GRAIN_BYTES = 128 << 20
"""Linux guests take memory that is added while they run in blocks of this size, each whole."""

ADDITIONS_MAX = 16


class Disk(BaseModel):
    """One virtual disk: an image file that every host reaches under the same path."""

    model_config = ConfigDict(frozen=True)

    path: str
    format: str = "raw"
    cache_direct: bool = False
    read_only: bool = False


class VmSpec(BaseModel):
    """What the owner of a VM asked for. Enough to build the same VM on any host.

    `memory_bytes` is all of its RAM; what it started with is split evenly into `numa_nodes` RAM blocks, and
    each of `added_bytes` is one more, added while it ran. It can grow up to `max_memory_bytes` (0: it
    cannot). `machine_type` is a versioned QEMU machine (`pc-q35-7.2`), never an alias, so that both ends of
    a migration build the same one; empty means that the first start fills it in. `accel` likewise.
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    memory_bytes: int = Field(ge=LEAST_MEMORY_BYTES, multiple_of=1 << 20)
    cpus: int = Field(ge=1, le=255)
    max_memory_bytes: int = Field(default=0, ge=0, multiple_of=1 << 20)
    added_bytes: tuple[int, ...] = Field(default=(), max_length=ADDITIONS_MAX)
    numa_nodes: int = Field(default=1, ge=1, le=8)
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    disks: tuple[Disk, ...] = ()
    display: Display = Display.NONE
    accel: Accel = Accel.AUTO
    machine_type: str = ""
    cpu_model: str = ""

    @model_validator(mode="after")
    def _room_for_all(self) -> Self:
        if self.max_memory_bytes and self.max_memory_bytes < self.memory_bytes:
            raise ValueError(
                f"its RAM of {self.memory_bytes >> 20} MiB is more than it may have at most, which is "
                f"{self.max_memory_bytes >> 20} MiB: raise the latter, or leave it out"
            )
        return self

    @property
    def first_memory_bytes(self) -> int:
        """The RAM with which QEMU was started."""
        return self.memory_bytes - sum(self.added_bytes)

    def anew(self) -> VmSpec:
        """The same VM as the next start makes it: all of its RAM is there from the beginning."""
        return self.model_copy(update={"added_bytes": ()})

    def resized(self, memory_bytes: int, running: bool) -> VmSpec:
        """The same VM with another size, as the farm keeps it. Raises `Refused` when it cannot have that.

        One that runs can only grow.
        """
        more_bytes = memory_bytes - self.memory_bytes
        if running and more_bytes < 0:
            raise Refused(
                f"VM {self.name} has {self.memory_bytes >> 20} MiB, and memory is not taken from a VM that "
                "runs: stop it first"
            )
        if running and more_bytes:
            return self.with_added(more_bytes).anew()
        if memory_bytes < LEAST_MEMORY_BYTES:
            raise Refused(f"VM {self.name} cannot have less than {LEAST_MEMORY_BYTES >> 20} MiB")
        most_bytes = max(memory_bytes, self.max_memory_bytes) if self.max_memory_bytes else 0
        return self.model_copy(update={"memory_bytes": memory_bytes, "max_memory_bytes": most_bytes})

    def with_added(self, size_bytes: int) -> VmSpec:
        """The same VM with one RAM block more. Raises `Refused` when it cannot have it."""
        obstacle = self._obstacle_to_adding(size_bytes)
        if obstacle:
            raise Refused(f"VM {self.name} cannot be given {size_bytes >> 20} MiB more: {obstacle}")
        return self.model_copy(
            update={
                "memory_bytes": self.memory_bytes + size_bytes,
                "added_bytes": (*self.added_bytes, size_bytes),
            }
        )

    def _obstacle_to_adding(self, size_bytes: int) -> str:
        if size_bytes <= 0 or size_bytes % ADDED_MEMORY_GRAIN_BYTES:
            return f"what is added must be a multiple of {ADDED_MEMORY_GRAIN_BYTES >> 20} MiB"
        if not self.max_memory_bytes:
            return "it was made without room to grow; stop it and set the size, or make it with --max-memory"
        if self.memory_bytes + size_bytes > self.max_memory_bytes:
            return (
                f"it has {self.memory_bytes >> 20} MiB and may have {self.max_memory_bytes >> 20} MiB at most"
            )
        if len(self.added_bytes) == ADDITIONS_MAX:
            return f"it was given more {ADDITIONS_MAX} times already; stop and start it first"
        return ""


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
    in rules. With `restart_elsewhere` it is started on another host when its own was fenced; a `strict` one
    stands still while its host cannot reach the register. `fenced` is whether its host is fenced now.
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
    restart_elsewhere: bool = False
    strict: bool = False
    fenced: bool = False
