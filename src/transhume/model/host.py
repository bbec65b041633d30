"""A host: a server with the daemon."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class HostState(StrEnum):
    """Whether the farm may place VMs on a host.

    `DRAINING`: its VMs are being moved off. `MAINTENANCE`: that has ended, and it stays without new VMs until
    it is undrained.
    """

    ACTIVE = "active"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"


class HostInventory(BaseModel):
    """What a host has and can do, measured by its own daemon.

    `tracking_obstacles` and `kvm_obstacle` are sentences: empty when the host can do it. `other_addresses`
    are further ones at which its movers can be found.
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
