"""What the controller, the hosts and the movers ask of each other during a migration."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, field_validator

from transhume.model.migration import (
    LEAST_BANDWIDTH_BYTES_S,
    Migration,
    MigrationReport,
    Outcome,
    Phase,
    Progress,
)
from transhume.model.vm import RamBlock, VmSpec, VmState


class SourceFacts(BaseModel):
    """What the source's daemon found by looking at the running VM, for the pre-flight.

    `ram_obstacles` and `device_obstacles` are sentences that name the thing, the reason and the mend;
    `required_cpu_flags` are the host flags that the guest was shown (empty under TCG).
    """

    model_config = ConfigDict(frozen=True)

    state: VmState
    spec: VmSpec
    ram_blocks: tuple[RamBlock, ...] = ()
    qemu_version: str = ""
    required_cpu_flags: tuple[str, ...] = ()
    ram_obstacles: tuple[str, ...] = ()
    device_obstacles: tuple[str, ...] = ()
    qemu_obstacles: tuple[str, ...] = ()


class DestinationFacts(BaseModel):
    """What a possible destination found when it looked for what the VM needs.

    `disk_obstacles` are sentences, one for each disk that this host cannot open, and `disks_in_use` one for
    each that somebody writes, or of which that cannot be told.
    """

    model_config = ConfigDict(frozen=True)

    memory_available_bytes: int
    disk_obstacles: tuple[str, ...] = ()
    file_obstacles: tuple[str, ...] = ()
    disks_in_use: tuple[str, ...] = ()


class DirtySample(BaseModel):
    """A short measurement of a running VM: what a migration would have to move, and how fast it changes."""

    model_config = ConfigDict(frozen=True)

    sample_ms: float
    populated_bytes: int
    zero_bytes: int
    dirty_bytes: int


class PrepareOrder(BaseModel):
    """To the destination: make the VM, paused, and wait for the source (steps 2, 3, 3A, 4)."""

    model_config = ConfigDict(frozen=True)

    migration: Migration
    spec: VmSpec
    ram_blocks: tuple[RamBlock, ...]


class Prepared(BaseModel):
    """The destination waits at `address`:`port`, and at the same port of its `other_addresses`; `key` is the
    one-time secret (hex) of the data path.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    port: int
    key: str
    other_addresses: tuple[str, ...] = ()


class BeginOrder(BaseModel):
    """To the source: the destination is ready, start to move (step 4)."""

    model_config = ConfigDict(frozen=True)

    migration: Migration
    prepared: Prepared
    ram_blocks: tuple[RamBlock, ...]


class MigrationUpdate(BaseModel):
    """From either end: how far the migration is; with an `outcome` other than RUNNING, that it ended."""

    model_config = ConfigDict(frozen=True)

    migration: str
    host: str
    phase: Phase
    outcome: Outcome = Outcome.RUNNING
    runs_at: str = ""
    error_code: str = ""
    error: str = ""
    progress: Progress | None = None
    report: MigrationReport | None = None


class CancelReply(BaseModel):
    """`accepted` is false when the migration had passed its point of no return; `runs_at` says where.

    `migration` is the one that was meant, as the controller found it. `behind`: it was only queued, behind
    this one, which goes on.
    """

    model_config = ConfigDict(frozen=True)

    accepted: bool
    runs_at: str
    migration: str = ""
    behind: str = ""


class Adjustment(BaseModel):
    """Other limits for a migration under way; what is None stays as it is. A bandwidth of 0 means no limit.

    `switch_to_post_copy` suspends the VM as soon as the batch in hand is sent, and leaves the rest for after
    the resume.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bandwidth_bytes_s: int | None = Field(default=None, ge=0)
    max_downtime_ms: float | None = Field(default=None, gt=0)
    deadline_s: float | None = Field(default=None, gt=0)
    switch_to_post_copy: bool = False

    @field_validator("bandwidth_bytes_s")
    @classmethod
    def _none_or_enough(cls, value: int | None) -> int | None:
        if value is not None and 0 < value < LEAST_BANDWIDTH_BYTES_S:
            raise ValueError(f"should be 0, for no limit, or at least {LEAST_BANDWIDTH_BYTES_S}")
        return value


class AdjustReply(BaseModel):
    """Whether the mover took an adjustment, or in words why not."""

    model_config = ConfigDict(frozen=True)

    accepted: bool
    message: str = ""


class ProbeStep(StrEnum):
    """One host leaves a mark in a folder, another looks for it, the first takes it away."""

    LEAVE = "leave"
    FIND = "find"
    REMOVE = "remove"


class FolderProbe(BaseModel):
    """One step of finding out whether hosts share the folder `path`; `mark` is random."""

    model_config = ConfigDict(frozen=True)

    path: str = Field(pattern=r"^/[^\x00]*$", max_length=512)
    mark: str = Field(pattern=r"^[0-9a-f]{16}$")
    step: ProbeStep


class FolderFacts(BaseModel):
    """What came of it: in words what is against it, and the room in the folder."""

    model_config = ConfigDict(frozen=True)

    obstacle: str = ""
    available_bytes: int = 0


class ReviveReply(BaseModel):
    """Whether the source took its VM back, or in words why not; `runs_at` says where it runs now."""

    model_config = ConfigDict(frozen=True)

    revived: bool
    message: str = ""
    runs_at: str = ""


class HeartbeatReply(BaseModel):
    """The controller's answer to a sign of life.

    `disowned`: VMs that the host has running and that the register gives to another. The host ends those
    that it is not moving, after it has asked the register itself. `strict`: those of its VMs that may not run
    while the register cannot be reached. `epochs`: those of VMs that are the host's own, and of which it did
    not say one; it keeps them with the VMs.
    """

    model_config = ConfigDict(frozen=True)

    disowned: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    epochs: dict[str, int] = {}


class Renewed(BaseModel):
    """A host's next certificate, and the authority that signed it; both as PEM."""

    model_config = ConfigDict(frozen=True)

    certificate: str
    authority: str


class SwapReply(BaseModel):
    """The answer of the register: whether the swap was made, and what it holds now."""

    model_config = ConfigDict(frozen=True)

    won: bool
    owner: str
    epoch: int
