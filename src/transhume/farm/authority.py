"""The farm's authority: made with the farm, kept in its store, and the only one that makes hosts.

Every controller that opens the store finds it. Its key leaves the store for no answer and no log.

What signs is loaded where it is needed: a command that lists hosts imports this file too.
"""

from __future__ import annotations

import asyncio
import secrets

from transhume.farm.records import (
    AUTHORITY_KEY,
    AuthorityRecord,
    CertificateRecord,
    FarmRecords,
    absent,
    encode,
)
from transhume.model.errors import StoreError
from transhume.trust.token import fingerprint


class FarmAuthority:
    """Signs requests for certificates. Whether a host may have one is decided by whoever calls."""

    def __init__(self, record: AuthorityRecord) -> None:
        self._record = record
        self.certificate_pem = record.certificate_pem
        self.fingerprint = fingerprint(record.certificate_pem)

    @classmethod
    async def open(cls, records: FarmRecords, now_s: float) -> FarmAuthority:
        """The farm's authority; made if this farm is new. Raises `StoreError`."""
        kept = await records.authority()
        if kept is None:
            await records.store.transact(
                compares=[absent(AUTHORITY_KEY)],
                puts={AUTHORITY_KEY: encode(await asyncio.to_thread(_make, now_s))},
            )
            # Another controller may have been first: what is in the store is the farm's.
            kept = await records.authority()
        if kept is None:
            raise StoreError("the farm's authority was written to the store and is not in it")
        return cls(kept.record)

    def issue(
        self, host: str, request_pem: str, now_s: float, controller: bool
    ) -> tuple[str, CertificateRecord]:
        """A certificate for a host as PEM, and what to note of it. `Refused` for what is no sound request."""
        from transhume.trust.certificates import Authority, issue

        authority = Authority(self._record.key_pem, self._record.certificate_pem)
        made = issue(authority, host, request_pem, now_s, controller)
        return made.certificate_pem, CertificateRecord(serial=made.serial, expires_at_s=made.expires_at_s)


def _make(now_s: float) -> AuthorityRecord:
    from transhume.trust.certificates import make_authority

    farm = secrets.token_hex(8)
    made = make_authority(farm, now_s)
    return AuthorityRecord(farm=farm, key_pem=made.key_pem, certificate_pem=made.certificate_pem)
