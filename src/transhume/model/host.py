"""A host: a server with the daemon."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

LEASE_S = 15.0
"""A host that was not heard from for so long is lost: what runs there is not known. By the same time it has
paused the VMs that may not run without the register.
"""


class HostState(StrEnum):
    """Whether the farm may place VMs on a host.

    `DRAINING`: its VMs are being moved off. `MAINTENANCE`: that has ended, and it stays without new VMs until
    it is undrained.
    """

    ACTIVE = "active"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"


class ModelRank(NamedTuple):
    """How much a CPU model offers: its level (1 to 4, as in x86-64-v3), then how many features it shows."""

    level: int
    features: int


class GuestCpus(BaseModel):
    """What one accelerator of one host can show to a guest, as QEMU tells it.

    `models` are the named, versioned 64-bit CPU models that run here with all their features (`Nehalem-v1`).
    `features` are all that a guest can be shown, in QEMU's spelling.
    """

    model_config = ConfigDict(frozen=True)

    models: dict[str, ModelRank] = {}
    features: tuple[str, ...] = ()


class HostInventory(BaseModel):
    """What a host has and can do, measured by its own daemon.

    `tracking_obstacles` and `kvm_obstacle` are sentences: empty when the host can do it. `other_addresses`
    are further ones at which its movers can be found. `cpus_of` says which CPUs a guest can be shown here, by
    the accelerator's name; it is empty on a host whose release does not tell, and lacks an accelerator that
    cannot be used.
    """

    model_config = ConfigDict(frozen=True)

    cpus: int
    memory_bytes: int
    memory_available_bytes: int
    kernel: str
    transhume_version: str
    qemu_version: str
    machine_types: tuple[str, ...]
    cpu_flags: tuple[str, ...]
    kvm_obstacle: str = ""
    tracking_obstacles: tuple[str, ...] = ()
    other_addresses: tuple[str, ...] = ()
    cpu_vendor: str = ""
    cpus_of: dict[str, GuestCpus] = {}


class Host(BaseModel):
    """One member of the farm. `address` and `port` are where its daemon answers."""

    model_config = ConfigDict(frozen=True)

    name: str
    address: str
    port: int
    joined_at_s: float
    last_seen_s: float
    controller: bool = False
    inventory: HostInventory
