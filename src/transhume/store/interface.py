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


class Store(Protocol):
    """Keys, values, revisions.

    Every method raises `StoreError` when the store cannot answer: a transaction may then have happened or
    not, and only reading tells. `StoreFull` means that nothing was written, and `Refused` that a key or a
    value is over the limits above. One revision numbers each transaction that was applied; a key that is
    deleted and made again has a higher revision than before.
    """

    async def get(self, key: str) -> Entry | None:
        """The entry of one key, or None when it does not exist."""
        ...

    async def list(self, prefix: str) -> Sequence[Entry]:
        """All entries whose keys begin with `prefix`, in the order of their keys' bytes, as of one moment."""
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


def check_limits(puts: Mapping[str, bytes], deletes: Sequence[str]) -> None:
    """Raise `Refused` for a transaction that no store accepts, before anything is written."""
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
