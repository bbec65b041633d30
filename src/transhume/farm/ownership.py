"""The register: for each VM the host that may run it, and the epoch.

A migration commits by one compare-and-swap `(source, e) -> (destination, e+1)` and is given up by one
`(source, e) -> (source, e+1)`. Whichever comes first wins, and the loser learns it from the answer.
"""

from __future__ import annotations

from transhume.farm.records import FarmRecords, Kept, encode, ownership_key
from transhume.model.errors import NotFound, Refused
from transhume.model.orders import SwapReply
from transhume.model.vm import Ownership


class OwnershipRegister:
    """Reads and swaps on top of the store. Keeps nothing in memory: the store is the truth."""

    def __init__(self, records: FarmRecords) -> None:
        self._records = records

    async def read(self, vm: str) -> Ownership:
        """Raises `NotFound` for a VM that the farm does not know, `StoreError` when the store fails."""
        return (await self.kept(vm)).record

    async def kept(self, vm: str) -> Kept[Ownership]:
        """As `read`, with the revision, for a transaction that also changes other records."""
        found = await self._records.ownership(vm)
        if found is None:
            raise NotFound(f"the farm has no VM {vm}; `transhume vm list` shows those it has")
        return found

    async def swap(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        """The register becomes `wanted` if and only if it holds `expected`.

        Raises `StoreFull` when nothing was written, another `StoreError` when only reading tells.
        """
        if wanted.epoch <= expected.epoch:
            raise Refused(
                f"the epoch of VM {vm} may only rise: {expected.epoch} -> {wanted.epoch}; ask for more"
            )
        while True:
            held = await self.kept(vm)
            if held.record != expected:
                return SwapReply(won=False, owner=held.record.owner, epoch=held.record.epoch)
            done = await self._records.store.transact(
                compares=[held.unchanged], puts={ownership_key(vm): encode(wanted)}
            )
            if done is not None:
                return SwapReply(won=True, owner=wanted.owner, epoch=wanted.epoch)
            # Somebody wrote between the read and the swap: read again and see what it holds now.
