"""Leader election in etcd: the leader's record is bound to a lease that only the leader keeps alive.

The record is made by a transaction that demands its absence. When the leader dies its lease runs out, etcd
removes the record, and a candidate that looks for it makes its own. The leader counts the lease's time
itself, from before each request to renew it, and stops leading before etcd can have ended it: a leader that
is cut off from the store knows it without the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

from transhume.model.errors import StoreError, StoreUnavailable
from transhume.store.election import ELECTIONS, Ending, Leadership, check_ttl
from transhume.store.etcd import EtcdStore
from transhume.store.etcd_gateway import EtcdRefusal, Json, OutcomeUnknown, encode
from transhume.store.interface import ABSENT, Compare

SAFE_SHARE = 0.9
"""Of the lease's time, how much a leader counts on: clocks of two machines may run apart by the rest."""

RENEWALS_PER_TTL = 4
_LONGEST_LOOK_S = 1.0
_SHORTEST_RENEWAL_TIMEOUT_S = 0.2


class EtcdElection:
    """Satisfies `Election`."""

    def __init__(self, store: EtcdStore, candidate: str) -> None:
        self._store = store
        self._gateway = store.gateway
        self._candidate = candidate

    async def campaign(self, name: str, ttl_s: float) -> Leadership:
        check_ttl(ttl_s)
        look_s = min(_LONGEST_LOOK_S, ttl_s / 10)
        while True:
            try:
                if await self._store.get(ELECTIONS + name) is None:
                    leadership = await self._try(name, ttl_s)
                    if leadership is not None:
                        return leadership
            except StoreUnavailable:
                pass  # nobody can be elected now; whoever leads is told by its own clock
            await asyncio.sleep(look_s)

    async def leader(self, name: str) -> str | None:
        entry = await self._store.get(ELECTIONS + name)
        return None if entry is None else entry.value.decode()

    async def _try(self, name: str, ttl_s: float) -> Leadership | None:
        """Make a lease and with it the record, or neither."""
        asked_s = time.monotonic()
        granted = await self._call("/v3/lease/grant", {"TTL": str(math.ceil(ttl_s))})
        lease = str(granted["ID"])
        try:
            revision = await self._put_record(name, lease)
        except BaseException:
            with contextlib.suppress(StoreError):
                await asyncio.shield(self._revoke(lease))
            raise
        if revision is None:
            await self._revoke(lease)
            return None
        guard = Compare(ELECTIONS + name, revision)
        return EtcdLeadership(self._store, name, guard, lease, asked_s, float(granted["TTL"]))

    async def _put_record(self, name: str, lease: str) -> int | None:
        """The record's revision, or None when another candidate was first."""
        key = self._store.encoded_key(ELECTIONS + name)
        put = {"key": key, "value": encode(self._candidate.encode()), "lease": lease}
        request: Json = {
            "compare": [{"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(ABSENT)}],
            "success": [{"request_put": put}],
        }
        try:
            answer = await self._gateway.call("/v3/kv/txn", request, repeatable=False)
        except OutcomeUnknown:
            # Whether it is there is seen by its lease. If it is not there yet, revoking the lease (which
            # the caller does) keeps it from ever coming.
            seen = await self._call("/v3/kv/range", {"key": key})
            return next(
                (int(kv["mod_revision"]) for kv in seen.get("kvs", []) if kv.get("lease") == lease), None
            )
        except EtcdRefusal as refusal:
            raise StoreUnavailable(f"the farm's store takes no leader now: {refusal.message}") from refusal
        return int(answer["header"]["revision"]) if answer.get("succeeded") else None

    async def _call(self, path: str, request: Json) -> Json:
        try:
            return await self._gateway.call(path, request, repeatable=True)
        except EtcdRefusal as refusal:
            raise StoreUnavailable(f"the farm's store takes no leader now: {refusal.message}") from refusal

    async def _revoke(self, lease: str) -> None:
        await revoke(self._store, lease)


class EtcdLeadership:
    """Satisfies `Leadership`. A task of its own renews the lease until the leadership is over."""

    def __init__(
        self, store: EtcdStore, name: str, guard: Compare, lease: str, asked_s: float, ttl_s: float
    ) -> None:
        self._store = store
        self._lease = lease
        self._ttl_s = ttl_s
        self._until_s = asked_s + ttl_s * SAFE_SHARE
        self._ending = Ending()
        self._resigned = False
        self._renewer = asyncio.create_task(self._renew_always(), name=f"lead {name}")
        self.name = name
        self.guard = guard

    @property
    def leading(self) -> bool:
        return not self._ending and time.monotonic() < self._until_s

    async def lost(self) -> str:
        return await self._ending.wait()

    async def resign(self) -> None:
        if self._resigned:
            return
        self._resigned = True
        self._ending.end(f"this host has given up to lead {self.name}")
        self._renewer.cancel()
        await asyncio.gather(self._renewer, return_exceptions=True)
        # If the store cannot be asked, the lease runs out by itself.
        with contextlib.suppress(StoreError):
            await revoke(self._store, self._lease)

    async def _renew_always(self) -> None:
        while not self._ending:
            wait_s = min(self._ttl_s / RENEWALS_PER_TTL, self._until_s - time.monotonic())
            await asyncio.sleep(max(0.0, wait_s))
            try:
                async with asyncio.timeout(
                    max(_SHORTEST_RENEWAL_TIMEOUT_S, self._until_s - time.monotonic())
                ):
                    await self._renew()
            except (StoreError, EtcdRefusal, TimeoutError) as error:
                if time.monotonic() >= self._until_s:
                    self._ending.end(
                        f"the lease to lead {self.name} could not be renewed for {self._ttl_s:g} s: "
                        f"{error or 'no answer'}"
                    )
            except Exception as error:
                self._ending.end(f"the lease to lead {self.name} cannot be renewed: {error!r}")
                raise

    async def _renew(self) -> None:
        """Renew the lease, and see whether the record is still this leader's."""
        asked_s = time.monotonic()
        answer = await self._store.gateway.call("/v3/lease/keepalive", {"ID": self._lease}, repeatable=True)
        if int(answer.get("TTL", 0)) <= 0:
            self._ending.end(f"the lease to lead {self.name} has run out")
            return
        entry = await self._store.get(self.guard.key)
        if entry is None or entry.mod_revision != self.guard.mod_revision:
            leader = "nobody" if entry is None else entry.value.decode()
            self._ending.end(f"the record of who leads {self.name} was taken away; it names {leader}")
            return
        if time.monotonic() >= self._until_s:
            # `leading` was false for a moment, and whoever saw that is right: it is over.
            self._ending.end(f"the lease to lead {self.name} was renewed too late")
            return
        self._until_s = asked_s + self._ttl_s * SAFE_SHARE


async def revoke(store: EtcdStore, lease: str) -> None:
    """End a lease and remove what is bound to it. One that has run out is no error. Raises `StoreError`."""
    try:
        await store.gateway.call("/v3/lease/revoke", {"ID": lease}, repeatable=True)
    except EtcdRefusal as refusal:
        if "lease not found" not in refusal.message:
            raise StoreUnavailable(f"the farm's store keeps a lease: {refusal.message}") from refusal
