"""Who changed what: kept in the store, the newest entries of each of two rings.

Changes, and what was refused for want of rights or of a good token, are counted apart, so that nobody
without rights can push changes out of the log.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque

from transhume.farm.records import FarmRecords, encode
from transhume.farm.user_records import AuditRecord

CHANGES = "audit/changes/"
REFUSALS = "audit/refusals/"
MOST_CHANGES = 10_000
MOST_REFUSALS = 1_000


class AuditLog:
    """Writes before a change and after it. Raises `StoreError`: what cannot be noted is not done."""

    def __init__(
        self, records: FarmRecords, most: int = MOST_CHANGES, most_refusals: int = MOST_REFUSALS
    ) -> None:
        self._records = records
        self._most = {CHANGES: most, REFUSALS: most_refusals}
        self._keys: dict[str, deque[str]] = {}
        self._lock = asyncio.Lock()

    async def begin(self, record: AuditRecord) -> str:
        """Note what will be done; the answer is the key for `end`."""
        return await self._add(CHANGES, record)

    async def end(self, key: str, record: AuditRecord) -> None:
        """Note what came of it."""
        await self._records.store.transact(puts={key: encode(record)})

    async def refused(self, record: AuditRecord) -> None:
        """Note what was asked for without the right to it."""
        await self._add(REFUSALS, record)

    async def list(self, user: str = "", since_s: float = 0.0, limit: int = 200) -> list[AuditRecord]:
        """The newest `limit` of them, the oldest of those first."""
        found = [
            kept.record
            for kept in await self._records.audit()
            if kept.record.at_s >= since_s and (not user or kept.record.who == user)
        ]
        return sorted(found, key=lambda record: record.at_s)[-limit:]

    async def _add(self, ring: str, record: AuditRecord) -> str:
        async with self._lock:
            if ring not in self._keys:
                self._keys[ring] = deque(entry.key for entry in await self._records.store.list(ring))
            keys = self._keys[ring]
            key = f"{ring}{int(record.at_s * 1000):015d}-{secrets.token_hex(4)}"
            surplus = [keys[place] for place in range(min(len(keys) + 1 - self._most[ring], 100))]
            await self._records.store.transact(puts={key: encode(record)}, deletes=surplus)
            for _ in surplus:
                keys.popleft()
            keys.append(key)
            return key
