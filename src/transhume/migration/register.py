"""What a migration needs to know of the farm: the register, and whether it still goes on."""

from __future__ import annotations

from typing import Protocol

from transhume.model.migration import Migration
from transhume.model.orders import SwapReply
from transhume.model.vm import Ownership


class Register(Protocol):
    """The register that decides who runs a VM.

    Every method raises `HostLost` or `StoreError` when there is no answer: a swap may then have been
    made or not. `StoreFull` means that it was certainly not made.
    """

    async def ownership(self, vm: str) -> Ownership:
        """Read the register."""
        ...

    async def swap_ownership(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        """The register becomes `wanted` if and only if it holds `expected`."""
        ...

    async def migration(self, migration: str) -> Migration:
        """The record of a migration."""
        ...
