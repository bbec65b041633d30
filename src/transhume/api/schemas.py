"""The bodies of requests that are not a noun of the model by themselves."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from transhume.farm.drain_record import DrainOptions
from transhume.model.finding import Finding
from transhume.model.host import HostInventory
from transhume.model.migration import MigrationOptions
from transhume.model.vm import NAME_PATTERN, Ownership, VmSpec, VmState
from transhume.trust.names import MAX_PEM_BYTES

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
MigrationId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
Labels = Annotated[tuple[Name, ...], Field(max_length=50)]
CpuOvercommit = Annotated[float, Field(ge=1, le=100)]
FenceCommand = Annotated[str, Field(max_length=1000)]
Lines = Annotated[int, Field(ge=1, le=10_000)]
Pem = Annotated[str, Field(max_length=MAX_PEM_BYTES)]
TimeoutS = Annotated[float, Field(gt=0, le=3600)]


class Body(BaseModel):
    """A request's body. A field that is not known is refused: it is a misspelling or a later release's."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PeerBody(BaseModel):
    """What hosts tell the controller, and daemons whoever asks. A field that is not known is left aside: a
    later release adds fields that an earlier one can do without.
    """

    model_config = ConfigDict(frozen=True)


class JoinRequest(PeerBody):
    """A server asks to become a member; its daemon will answer at `address`:`port`.

    `secret` is the middle part of a token, `request` what its first certificate is made from.
    """

    secret: str = Field(max_length=200)
    name: Name
    address: str = Field(min_length=1, max_length=253, pattern=r"^[0-9A-Za-z.:\-]+$")
    port: int = Field(ge=1, le=65535)
    request: Pem


class JoinPreviewRequest(PeerBody):
    """A server asks what its joining would change. The token is looked at and stays good."""

    secret: str = Field(max_length=200)
    name: Name
    inventory: HostInventory


class JoinPreview(BaseModel):
    model_config = ConfigDict(frozen=True)

    findings: tuple[Finding, ...]


class ClockAnswer(BaseModel):
    """The controller's clock, in seconds since 1970."""

    model_config = ConfigDict(frozen=True)

    now_s: float


class InviteRequest(Body):
    """`only_for` is a member that shall join once more, to get a new certificate."""

    ttl_s: float | None = Field(default=None, gt=0, le=30 * 86400)
    only_for: Name | None = None


class RenewRequest(PeerBody):
    request: Pem


class AuthorityText(PeerBody):
    """The certificate of the farm's authority. Whoever joins compares it with its token."""

    certificate: Pem


class CreateVmRequest(Body):
    """`host` is who shall own the VM; without it, the best one. With `reserve` its share is kept for it.

    With `restart_elsewhere` it is started on another host when its own was fenced; a `strict` one stands
    still while its host cannot reach the register.
    """

    spec: VmSpec
    host: Name | None = None
    labels: Labels = ()
    reserve: bool = False
    restart_elsewhere: bool = False
    strict: bool = False


class VmSettingsRequest(Body):
    """Labels to add and to take away, and what shall hold for the VM; what is None stays as it is."""

    add_labels: Labels = ()
    remove_labels: Labels = ()
    reserve: bool | None = None
    restart_elsewhere: bool | None = None
    strict: bool | None = None


class HostSettingsRequest(Body):
    """What is None stays as it is. `reserve_memory_bytes` is what the host keeps for itself.

    `fence_command` is only taken on the controller's host.
    """

    reserve_memory_bytes: int | None = Field(default=None, ge=0)
    cpu_overcommit: CpuOvercommit | None = None
    add_labels: Labels = ()
    remove_labels: Labels = ()
    fence_command: FenceCommand | None = None


class FarmSettingsRequest(Body):
    """What is None stays as it is. `fence_command` is only taken on the controller's host."""

    cpu_overcommit: CpuOvercommit | None = None
    fence_command: FenceCommand | None = None


class FenceRequest(Body):
    """`powered_off`: somebody has switched the host off by hand. `force`: although it may not be lost."""

    powered_off: bool = False
    force: bool = False


class DrainRequest(Body):
    options: DrainOptions = DrainOptions()


class UndrainRequest(Body):
    """`restore`: bring back the VMs that the drain moved away."""

    restore: bool = False
    options: DrainOptions = DrainOptions()


class GrowVmRequest(Body):
    """All the RAM that the VM shall have."""

    memory_bytes: int = Field(gt=0, multiple_of=1 << 20)


class StopVmRequest(Body):
    timeout_s: TimeoutS = 60.0


class MigrateRequest(Body):
    """Without `to` the controller chooses."""

    to: Name | None = None
    options: MigrationOptions = MigrationOptions()


class ReviveRequest(Body):
    """`despite_disks`: even though the VM went on writing its disks."""

    despite_disks: bool = False


class SwapRequest(Body):
    expected: Ownership
    wanted: Ownership


class HeartbeatRequest(PeerBody):
    inventory: HostInventory
    vm_states: dict[str, VmState]
    vm_epochs: dict[str, Annotated[int, Field(ge=0)]] = {}


class SampleRequest(Body):
    duration_s: float = Field(gt=0, le=60)


class Pong(PeerBody):
    """Who answers, and whether it is the host that carries the controller."""

    host: str
    carries_controller: bool
    version: str


class LogText(PeerBody):
    text: str
