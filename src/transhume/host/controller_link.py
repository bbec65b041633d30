"""What a host and its movers ask of the controller. The controller and its HTTP client both satisfy it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from transhume.model.host import HostInventory
from transhume.model.migration import Migration
from transhume.model.orders import HeartbeatReply, MigrationUpdate, Renewed, SwapReply
from transhume.model.vm import Ownership, VmState


class ControllerLink(Protocol):
    """The controller, seen from a host.

    Every method raises `HostLost` when it does not answer and `StoreError` when its store does not: a
    swap may then have happened or not, and only reading the register tells. `StoreFull` means that
    nothing was written.
    """

    async def ownership(self, vm: str) -> Ownership:
        """Read the register. Raises `NotFound` for a VM that the farm does not know."""
        ...

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        """Compare and swap: the register becomes `wanted` if and only if it holds `expected`."""
        ...

    async def migration(self, migration: str) -> Migration: ...

    async def report(self, update: MigrationUpdate) -> None: ...

    async def renew(self, host: str, request_pem: str) -> Renewed:
        """A new certificate for this host, for a request that proves the possession of its next key."""
        ...

    async def heartbeat(
        self,
        host: str,
        inventory: HostInventory,
        vm_states: Mapping[str, VmState],
        vm_epochs: Mapping[str, int] | None = None,
    ) -> HeartbeatReply:
        """A sign of life. `vm_epochs` is under which epoch each VM runs, of those of which it is known."""
        ...
