"""The farm's store in an etcd cluster: each transaction is one of etcd's, each revision is etcd's.

Under the prefix of the farm's URL lie `records/<key>`, which the interface shows, and `slots/<id>`.

**A slot makes a lost answer harmless.** A member that dies between a transaction and its answer leaves the
client not knowing, and reading does not help: the transaction may still be on its way. So each transaction
also compares and writes a slot, a key that only this process uses, and for one transaction at a time. When an
answer is lost, a second transaction, the fence, writes the slot under the same comparison. If it wins, the
first has not happened and can never happen; if it loses, the slot shows which of the two came first, and at
which revision. The outcome stays unknown only while nobody answers the fence either. (The idea is the fencing
of a lock by a rising number, turned upon one's own late message.)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transhume.model.errors import Refused, StoreError, StoreFull, StoreUnavailable
from transhume.store.etcd_gateway import EtcdGateway, EtcdRefusal, Json, OutcomeUnknown, decode, encode
from transhume.store.etcd_http import Endpoint
from transhume.store.interface import ABSENT, Compare, Entry, Snapshot, check_limits

LIST_PAGE = 1000
"""Entries in one answer; a longer list is read piece by piece at one revision."""

SLOT_KEPT_S = 86_400.0
"""A slot that was not used for so long belongs to a process that is gone, and is removed."""

_LIST_TRIES = 3
_TRANSACT_TRIES = 3
_SLOTS_REMOVED_AT_ONCE = 100
_LAST = b"\xff"
"""No UTF-8 text holds this byte, so it is above every key with a prefix."""

_NO_SPACE = "etcdserver: mvcc: database space exceeded"
_COMPACTED = "etcdserver: mvcc: required revision has been compacted"
_OVER_LIMIT = frozenset(
    {"etcdserver: too many operations in txn request", "etcdserver: request is too large"}
)


@dataclass
class _Slot:
    """A key of this process and the revision at which it is certain to be, for its next transaction."""

    key: str
    revision: int


@dataclass(frozen=True)
class Fresh:
    """What was last seen for certain: at `at_s` (seconds since the epoch) the revision was not above this."""

    revision: int
    at_s: float


class EtcdStore:
    """Satisfies `Store`. Many calls may be under way at once; each has a connection and a slot of its own."""

    def __init__(self, gateway: EtcdGateway, prefix: str) -> None:
        self._gateway = gateway
        self._root = prefix.rstrip("/").encode()
        self._records = self._root + b"/records/"
        self._slots: list[_Slot] = []
        self._own_id = uuid.uuid4().hex
        self._slot_count = 0
        self._fresh: Fresh | None = None

    @classmethod
    async def open(cls, gateway: EtcdGateway, prefix: str) -> EtcdStore:
        """Raises `StoreUnavailable` when the cluster has no quorum; the gateway is closed then."""
        store = cls(gateway, prefix)
        try:
            await store._remove_old_slots()
        except BaseException:
            await gateway.close()
            raise
        return store

    @property
    def gateway(self) -> EtcdGateway:
        """The members, for what is not a store's business (leases)."""
        return self._gateway

    def encoded_key(self, key: str) -> str:
        """Where a record lies in etcd, as its JSON has it."""
        return encode(self._records + key.encode())

    async def get(self, key: str) -> Entry | None:
        answer = await self._range({"key": self.encoded_key(key)})
        return next((self._entry(kv) for kv in answer.get("kvs", [])), None)

    async def list(self, prefix: str) -> Sequence[Entry]:
        return (await self.snapshot(prefix)).entries

    async def snapshot(self, prefix: str, *, may_be_stale: bool = False) -> Snapshot:
        for _ in range(_LIST_TRIES):
            try:
                return await self._snapshot(self._records + prefix.encode(), None)
            except EtcdRefusal as refusal:
                if refusal.message != _COMPACTED:
                    raise self._failure(refusal) from refusal
            except StoreUnavailable as error:
                if not may_be_stale:
                    raise
                return await self._stale_snapshot(prefix, error)
        raise StoreError(
            "the farm's store (etcd) is compacted faster than its records can be read; "
            "set a longer --auto-compaction-retention on its members"
        )

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        wanted = dict(puts or {})
        check_limits(compares, wanted, deletes)
        conditions = [_unchanged(self.encoded_key(one.key), one.mod_revision) for one in compares]
        changes = [_put(self.encoded_key(key), value) for key, value in wanted.items()]
        changes += [{"request_delete_range": {"key": self.encoded_key(key)}} for key in deletes]
        for _ in range(_TRANSACT_TRIES):
            # Not put back when an error leaves its state unknown: nobody uses that slot again.
            slot = self._slots.pop() if self._slots else await self._make_slot()
            done, revision = await self._try(slot, conditions, changes)
            if done:
                return revision
        raise StoreUnavailable(
            f"the farm's store ({self._gateway}) did not take a transaction in {_TRANSACT_TRIES} tries; "
            "nothing was written. Look at its members' disks and network"
        )

    async def close(self) -> None:
        await self._gateway.close()

    # --- transactions --------------------------------------------------------------------------------

    async def _try(
        self, slot: _Slot, conditions: Sequence[Json], changes: Sequence[Json]
    ) -> tuple[bool, int | None]:
        """Whether there is an answer, and the revision, or None for a comparison that did not hold.

        Without an answer the transaction has not happened and never will: it may be tried again.
        """
        mark = _new_mark()
        request = {
            "compare": [_unchanged(slot.key, slot.revision), *conditions],
            "success": [_put(slot.key, mark), *changes],
            "failure": [{"request_range": {"key": slot.key}}],
        }
        asked_s = time.time()
        try:
            answer = await self._gateway.call("/v3/kv/txn", request, repeatable=False)
        except StoreUnavailable:
            self._slots.append(slot)
            raise
        except EtcdRefusal as refusal:
            return await self._settle_refusal(slot, mark, refusal)
        except OutcomeUnknown as unknown:
            return await self._settle(slot, mark, str(unknown))
        self._note_fresh(_revision(answer), asked_s)
        if answer.get("succeeded"):
            return True, self._put_back(slot, _revision(answer))
        seen = _slot_state(answer["responses"][0]["response_range"])
        if seen is None:
            return False, None  # removed, after a day without use: perhaps that alone was the difference
        self._put_back(slot, slot.revision)
        return True, None

    async def _settle_refusal(
        self, slot: _Slot, mark: bytes, refusal: EtcdRefusal
    ) -> tuple[bool, int | None]:
        if refusal.message == _NO_SPACE:
            return await self._settle_no_space(slot, mark)
        if refusal.message in _OVER_LIMIT:
            self._slots.append(slot)
            raise Refused(
                f"the farm's store (etcd) refused a transaction: {refusal.message}. "
                "Start its members with the default --max-txn-ops and --max-request-bytes, or higher"
            ) from refusal
        return await self._settle(slot, mark, refusal.message)

    async def _settle(self, slot: _Slot, mark: bytes, reason: str) -> tuple[bool, int | None]:
        """Find out what came of a transaction whose answer was lost, and rule out that it still happens."""
        fence = _new_mark()
        request = {
            "compare": [_unchanged(slot.key, slot.revision)],
            "success": [_put(slot.key, fence)],
            "failure": [{"request_range": {"key": slot.key}}],
        }
        try:
            # Repeatable: whichever of several fences comes first says the same.
            answer = await self._gateway.call("/v3/kv/txn", request, repeatable=True)
        except (StoreUnavailable, EtcdRefusal) as error:
            raise StoreError(
                f"the answer to a change was lost ({reason}), and whether it was made is unknown: "
                f"the farm's store ({self._gateway}) cannot be asked ({error})"
            ) from error
        if answer.get("succeeded"):
            self._put_back(slot, _revision(answer))
            return False, None
        seen = _slot_state(answer["responses"][0]["response_range"])
        if seen is None or seen.mark not in (mark, fence):
            raise StoreError(
                f"the answer to a change was lost ({reason}), and whether it was made is unknown: "
                "somebody has removed what would tell it. Read the record again"
            )
        self._put_back(slot, seen.revision)
        return (True, seen.revision) if seen.mark == mark else (False, None)

    async def _settle_no_space(self, slot: _Slot, mark: bytes) -> tuple[bool, int | None]:
        """etcd says so before it makes a transaction, but also after the one that passed its quota.

        Either way the transaction is over when it says so: reading the slot tells which it was.
        """
        try:
            answer = await self._range({"key": slot.key})
        except StoreUnavailable as error:
            raise StoreError(
                f"the farm's store (etcd) is full, and whether the last change was made is unknown: {error}"
            ) from error
        seen = _slot_state(answer)
        if seen is not None and seen.mark == mark:
            return True, self._put_back(slot, seen.revision)
        self._put_back(slot, slot.revision)
        raise self._full()

    # --- reading -------------------------------------------------------------------------------------

    async def _range(self, request: Json) -> Json:
        try:
            return await self._fresh_range(request)
        except EtcdRefusal as refusal:
            raise self._failure(refusal) from refusal

    async def _fresh_range(self, request: Json) -> Json:
        asked_s = time.time()
        answer = await self._gateway.call("/v3/kv/range", request, repeatable=True)
        self._note_fresh(_revision(answer), asked_s)
        return answer

    def _note_fresh(self, revision: int, asked_s: float) -> None:
        if self._fresh is None or (revision, asked_s) > (self._fresh.revision, self._fresh.at_s):
            self._fresh = Fresh(revision, asked_s)

    async def _snapshot(self, first: bytes, member: Endpoint | None) -> Snapshot:
        """All keys from `first` on that begin with it. From one `member` as far as that knows, if given."""
        entries: list[Entry] = []
        at_revision = 0
        key = first
        while True:
            request: Json = {
                "key": encode(key),
                "range_end": encode(first + _LAST),
                "limit": str(LIST_PAGE),
                "revision": str(at_revision),
            }
            if member is None:
                answer = await self._fresh_range(request)
            else:
                answer = await self._gateway.call_at(
                    member, "/v3/kv/range", {**request, "serializable": True}
                )
            at_revision = at_revision or _revision(answer)
            kvs = answer.get("kvs", [])
            entries += map(self._entry, kvs)
            if not answer.get("more"):
                return Snapshot(entries, at_revision)
            key = decode(kvs[-1]["key"]) + b"\0"

    async def _stale_snapshot(self, prefix: str, error: StoreUnavailable) -> Snapshot:
        """What a member without a leader still shows, if it is not older than what was seen before."""
        fresh = self._fresh
        if fresh is None:
            raise error
        for member in self._gateway.endpoints:
            try:
                seen = await self._snapshot(self._records + prefix.encode(), member)
            except StoreUnavailable:
                continue
            if seen.revision >= fresh.revision:
                return Snapshot(seen.entries, seen.revision, stale_since_s=fresh.at_s)
        raise error

    def _entry(self, kv: Json) -> Entry:
        key = decode(kv["key"]).removeprefix(self._records).decode()
        return Entry(key, decode(kv.get("value", "")), int(kv["mod_revision"]))

    def _failure(self, refusal: EtcdRefusal) -> StoreError:
        return StoreError(f"the farm's store ({self._gateway}) failed: {refusal.message}")

    def _full(self) -> StoreFull:
        return StoreFull(
            f"the farm's store ({self._gateway}) has used up its space quota and nothing was written; "
            "compact and defragment its members, then `etcdctl alarm disarm`, or give them a higher "
            "--quota-backend-bytes"
        )

    # --- slots ---------------------------------------------------------------------------------------

    async def _make_slot(self) -> _Slot:
        """A new slot, which exists: if it did not, a fence could not tell "not yet" from "removed again"."""
        self._slot_count += 1
        key = encode(self._root + f"/slots/{self._own_id}-{self._slot_count}".encode())
        request = {
            "compare": [_unchanged(key, ABSENT)],
            "success": [_put(key, _new_mark())],
            "failure": [{"request_range": {"key": key}}],
        }
        try:
            # Repeatable: the comparison lets it happen once.
            answer = await self._gateway.call("/v3/kv/txn", request, repeatable=True)
        except EtcdRefusal as refusal:
            if refusal.message == _NO_SPACE:
                raise self._full() from refusal
            raise self._failure(refusal) from refusal
        if answer.get("succeeded"):
            return _Slot(key, _revision(answer))
        seen = _slot_state(answer["responses"][0]["response_range"])
        return _Slot(key, ABSENT if seen is None else seen.revision)

    def _put_back(self, slot: _Slot, revision: int) -> int:
        slot.revision = revision
        self._slots.append(slot)
        return revision

    async def _remove_old_slots(self) -> None:
        first = self._root + b"/slots/"
        answer = await self._range(
            {"key": encode(first), "range_end": encode(first + _LAST), "limit": str(LIST_PAGE)}
        )
        oldest_s = time.time() - SLOT_KEPT_S
        old = [kv for kv in answer.get("kvs", []) if float(decode(kv["value"]).split()[0]) < oldest_s]
        for kv in old[:_SLOTS_REMOVED_AT_ONCE]:
            request = {
                "compare": [_unchanged(kv["key"], int(kv["mod_revision"]))],
                "success": [{"request_delete_range": {"key": kv["key"]}}],
            }
            try:
                # Repeatable: the comparison lets it happen once.
                await self._gateway.call("/v3/kv/txn", request, repeatable=True)
            except EtcdRefusal as refusal:
                raise self._failure(refusal) from refusal


def _unchanged(encoded_key: str, revision: int) -> Json:
    return {"key": encoded_key, "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def _put(encoded_key: str, value: bytes) -> Json:
    return {"request_put": {"key": encoded_key, "value": encode(value)}}


def _revision(answer: Json) -> int:
    return int(answer["header"]["revision"])


def _new_mark() -> bytes:
    """What a transaction writes into its slot: when (seconds since the epoch), and a word of its own."""
    return f"{time.time():.0f} {uuid.uuid4().hex}".encode()


@dataclass(frozen=True)
class _SlotState:
    revision: int
    mark: bytes


def _slot_state(answer: Json) -> _SlotState | None:
    """The slot as etcd shows it, or None if it was removed."""
    for kv in answer.get("kvs", []):
        return _SlotState(int(kv["mod_revision"]), decode(kv["value"]))
    return None
