"""The register: for each VM the host that may run it, and the epoch.

A migration commits by one compare-and-swap `(source, e) -> (destination, e+1)` and is given up by one
`(source, e) -> (source, e+1)`. Whichever comes first wins, and the loser learns it from the answer.
"""

from __future__ import annotations

from transhume.farm.records import FarmRecords, Kept, encode
from transhume.model.errors import NotFound, Refused
from transhume.model.orders import SwapReply
from transhume.model.vm import Ownership


class OwnershipRegister:
    """Reads and swaps on top of the store.

    The store is the truth. What was read last is remembered for swaps alone, to save a reading while a VM
    stands still: the transaction compares its revision, so what has become stale cannot win or lose by it.
    """

    def __init__(self, records: FarmRecords) -> None:
        self._records = records
        self._last: dict[str, Kept[Ownership]] = {}

    async def read(self, vm: str) -> Ownership:
        """Raises `NotFound` for a VM that the farm does not know, `StoreError` when the store fails."""
        return (await self.kept(vm)).record

    async def kept(self, vm: str) -> Kept[Ownership]:
        """As `read`, with the revision, for a transaction that also changes other records."""
        found = await self._records.ownership(vm)
        if found is None:
            self._last.pop(vm, None)
            raise NotFound(f"the farm has no VM {vm}; `transhume vm list` shows those it has")
        self._last[vm] = found
        return found

    async def swap(self, vm: str, expected: Ownership, wanted: Ownership) -> SwapReply:
        """The register becomes `wanted` if and only if it holds `expected`.

        Raises `StoreFull` when nothing was written, another `StoreError` when only reading tells.
        """
        if wanted.epoch <= expected.epoch:
            raise Refused(
                f"the epoch of VM {vm} may only rise: {expected.epoch} -> {wanted.epoch}; ask for more"
            )
        held = self._last.pop(vm, None)
        if held is None or held.record != expected:
            held = await self.kept(vm)
        while held.record == expected:
            revision = await self._records.store.transact(
                compares=[held.unchanged], puts={held.key: encode(wanted)}
            )
            if revision is not None:
                self._last[vm] = Kept(held.key, wanted, revision)
                return SwapReply(won=True, owner=wanted.owner, epoch=wanted.epoch)
            # Somebody wrote after the reading: read again and see what it holds now.
            held = await self.kept(vm)
        return SwapReply(won=False, owner=held.record.owner, epoch=held.record.epoch)
