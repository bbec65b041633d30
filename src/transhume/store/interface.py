"""What the farm asks of its store: a few small records, and changes that happen entirely or not at all.

The shape is etcd's: a flat set of keys, each with the revision of its last change, and one kind of write, a
transaction that applies its puts and deletes if and only if every compared key still has the revision that
the caller saw. Everything that must never happen twice (the change of a VM's owner, the start of a
migration) is such a comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transhume.model.errors import Refused

MAX_KEY_BYTES = 512
MAX_VALUE_BYTES = 1 << 20
"""A little under what etcd accepts by default, so that a record that fits one store fits the other."""

MAX_TRANSACTION_BYTES = 1_200_000
"""All keys and values of one transaction together; etcd takes 1.5 MiB by default."""

MAX_TRANSACTION_CHANGES = 120
"""Puts and deletes of one transaction, and as many comparisons; etcd takes 128 by default."""

ABSENT = 0
"""The revision of a key that does not exist."""


@dataclass(frozen=True)
class Entry:
    """One key as it was read. `mod_revision` is the store's revision when it was last written (from 1)."""

    key: str
    value: bytes
    mod_revision: int


@dataclass(frozen=True)
class Compare:
    """The condition that `key` still has `mod_revision`; `ABSENT` demands that it does not exist."""

    key: str
    mod_revision: int


@dataclass(frozen=True)
class Snapshot:
    """Entries as of one moment, in the order of their keys' bytes, and the store's revision at it.

    `stale_since_s` is None for the present state. Otherwise others may have changed it since: it is at least
    as new as that moment (seconds since the epoch).
    """

    entries: Sequence[Entry]
    revision: int
    stale_since_s: float | None = None


class Store(Protocol):
    """Keys, values, revisions.

    Every method raises `StoreError` when the store cannot answer: a transaction may then have happened or
    not, or be about to, and only a later comparison of the same keys settles it. `StoreFull` and
    `StoreUnavailable` mean that this call has written nothing and never will, and `Refused` that a key, a
    value or a transaction is over the limits above. One revision numbers each transaction that changed
    something; a key that is deleted and made again has a higher revision than before.
    """

    async def get(self, key: str) -> Entry | None:
        """The entry of one key, or None when it does not exist."""
        ...

    async def list(self, prefix: str) -> Sequence[Entry]:
        """All entries whose keys begin with `prefix`, in the order of their keys' bytes, as of one moment."""
        ...

    async def snapshot(self, prefix: str, *, may_be_stale: bool = False) -> Snapshot:
        """As `list`, with the revision of that moment.

        With `may_be_stale` a store that has lost its quorum shows what it last knew, and says of when that
        is at the latest. It still raises `StoreUnavailable` when it cannot say that.
        """
        ...

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        """Apply all `puts` and `deletes` if every comparison holds, durably, or change nothing.

        Returns the revision of the transaction, or None when a comparison did not hold. A key may not be
        put and deleted at once; deleting an absent key does nothing.
        """
        ...

    async def close(self) -> None:
        """Let go of the store. Later calls raise `StoreError`."""
        ...


def check_limits(compares: Sequence[Compare], puts: Mapping[str, bytes], deletes: Sequence[str]) -> None:
    """Raise `Refused` for a transaction that not every store accepts, before anything is written."""
    for key in (*puts, *deletes):
        if not key or len(key.encode()) > MAX_KEY_BYTES:
            raise Refused(
                f"the store's key {key[:80]!r} is empty or over {MAX_KEY_BYTES} bytes; choose shorter names"
            )
    for key, value in puts.items():
        if len(value) > MAX_VALUE_BYTES:
            raise Refused(
                f"the record {key} has {len(value)} bytes and the store takes {MAX_VALUE_BYTES}; shorten it"
            )
    both = set(puts) & set(deletes)
    if both:
        raise Refused(f"the record {sorted(both)[0]} cannot be written and deleted in one transaction")
    _check_total(compares, puts, deletes)


def _check_total(compares: Sequence[Compare], puts: Mapping[str, bytes], deletes: Sequence[str]) -> None:
    changes = max(len(compares), len(puts) + len(deletes))
    if changes > MAX_TRANSACTION_CHANGES:
        raise Refused(
            f"a transaction of {changes} records is over the store's {MAX_TRANSACTION_CHANGES}; "
            "make several of it"
        )
    total_bytes = transaction_bytes(puts) + sum(len(key.encode()) for key in deletes)
    if total_bytes > MAX_TRANSACTION_BYTES:
        raise Refused(
            f"a transaction of {total_bytes} bytes is over the store's {MAX_TRANSACTION_BYTES}; "
            "make several of it"
        )


def transaction_bytes(puts: Mapping[str, bytes]) -> int:
    """What `puts` count towards `MAX_TRANSACTION_BYTES`."""
    return sum(len(key.encode()) + len(value) for key, value in puts.items())
