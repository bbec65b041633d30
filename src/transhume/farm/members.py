"""The hosts of the farm: who is a member, how they prove it, and when each was last heard from."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from transhume.farm.host_link import HostLink
from transhume.farm.limits import Limits
from transhume.farm.records import (
    FarmRecords,
    HostRecord,
    TokenRecord,
    absent,
    drain_key,
    encode,
    host_key,
    token_key,
)
from transhume.host.config import HostConfig
from transhume.model.errors import Conflict, HostLost, NotFound, Unauthorized
from transhume.model.host import Host, HostInventory, HostState
from transhume.model.migration import Outcome
from transhume.model.vm import VmState
from transhume.store.interface import Compare


class Links(Protocol):
    """How the controller reaches a host: by HTTP with their shared secret, or directly on its own machine."""

    def __call__(self, host: Host, secret: str) -> HostLink: ...


class HostStatus(Host):
    """A host with what the controller knows of it at this moment. `silent`: it was not heard from lately."""

    silent: bool
    seen_ago_s: float
    vms: tuple[str, ...] = ()
    state: HostState = HostState.ACTIVE


class Invitation(BaseModel):
    """A token as it is shown to the operator, once: the store keeps only its hash."""

    model_config = ConfigDict(frozen=True)

    token: str
    expires_at_s: float


class Joined(BaseModel):
    """What a new member takes home: the secret that it and the controller share."""

    model_config = ConfigDict(frozen=True)

    name: str
    secret: str
    controller: str


class Members:
    """The member list. What changes with every heartbeat is kept in memory, the rest in the store."""

    def __init__(
        self,
        records: FarmRecords,
        links: Links,
        own: HostConfig,
        clock_s: Callable[[], float],
        limits: Limits,
    ) -> None:
        self._records = records
        self._links = links
        self._own = own
        self._clock_s = clock_s
        self._limits = limits
        self._hosts: dict[str, HostRecord] = {}
        self._seen_at_s: dict[str, float] = {}
        self._inventories: dict[str, HostInventory] = {}
        self._vm_states: dict[str, dict[str, VmState]] = {}

    async def start(self) -> None:
        """Read the members, and enter the controller's own host under the name and address of its config."""
        for kept in await self._records.hosts():
            self._hosts[kept.record.name] = kept.record
        known = self._hosts.get(self._own.name)
        record = HostRecord(
            name=self._own.name,
            address=self._own.address,
            port=self._own.port,
            secret=self._own.secret,
            joined_at_s=known.joined_at_s if known else self._clock_s(),
            controller=True,
        )
        if known is not None:
            kept_fields = ("inventory", "state", "reserve_memory_bytes", "cpu_overcommit", "labels")
            record = record.model_copy(update={name: getattr(known, name) for name in kept_fields})
        if record != known:
            await self._records.store.transact(puts={host_key(record.name): encode(record)})
            self._hosts[record.name] = record

    def authenticates(self, name: str, secret: str) -> bool:
        """Whether `secret` is the one that host `name` shares with the controller, in constant time."""
        known = self._hosts.get(name)
        expected = known.secret if known else secrets.token_hex(32)
        return hmac.compare_digest(expected.encode(), secret.encode()) and known is not None

    async def invite(self, ttl_s: float | None = None) -> Invitation:
        """Make a token with which one host may join within `ttl_s`."""
        token = secrets.token_urlsafe(24)
        now_s = self._clock_s()
        expires_at_s = now_s + (self._limits.token_ttl_s if ttl_s is None else ttl_s)
        expired = [kept.key for kept in await self._records.tokens() if kept.record.expires_at_s <= now_s]
        await self._records.store.transact(
            puts={token_key(_hash(token)): encode(TokenRecord(expires_at_s=expires_at_s))}, deletes=expired
        )
        return Invitation(token=token, expires_at_s=expires_at_s)

    async def join(self, token: str, name: str, address: str, port: int) -> Joined:
        """Use up a token and enter a new member.

        Raises `Unauthorized` for a token that is wrong, used or expired, and `Conflict` for a name that is
        taken; the token can be used again then. A host whose daemon never reported may join again.
        """
        kept_token = await self._records.token(_hash(token))
        if kept_token is None or kept_token.record.expires_at_s <= self._clock_s():
            raise Unauthorized(
                "the token is wrong, was used or has expired; "
                f"`transhume token` on {self._own.name} prints a new one"
            )
        known = await self._records.host(name)
        if known is not None and (known.record.controller or known.record.inventory is not None):
            raise Conflict(f"the farm has a host {name} already; choose another name with --name")
        record = HostRecord(
            name=name,
            address=address,
            port=port,
            secret=secrets.token_hex(32),
            joined_at_s=self._clock_s(),
        )
        done = await self._records.store.transact(
            compares=[kept_token.unchanged, known.unchanged if known else absent(host_key(name))],
            puts={host_key(name): encode(record)},
            deletes=[kept_token.key],
        )
        if done is None:
            raise Conflict(f"another host joined at the same moment with this token or as {name}; try again")
        self._hosts[name] = record
        return Joined(name=name, secret=record.secret, controller=self._own.name)

    async def remove(self, name: str) -> None:
        """Forget a member. `Conflict` for the controller's own host, and for one that owns or moves VMs."""
        kept = await self._records.host(name)
        if kept is None:
            raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
        if kept.record.controller:
            raise Conflict(f"host {name} carries the controller and cannot leave its own farm")
        owned = [
            entry.key.split("/", 1)[1]
            for entry in await self._records.ownerships()
            if entry.record.owner == name
        ]
        if owned:
            raise Conflict(f"host {name} owns {', '.join(owned)}; move or delete them first")
        moving = [
            entry.record.vm
            for entry in await self._records.migrations()
            if entry.record.outcome is Outcome.RUNNING
            and name in (entry.record.source, entry.record.destination)
        ]
        if moving:
            # A source that owns the VM no longer may still hold pages that the VM lacks.
            raise Conflict(
                f"host {name} has a part in the migration of {', '.join(sorted(moving))}; wait for its end"
            )
        await self._records.store.transact(compares=[kept.unchanged], deletes=[kept.key, drain_key(name)])
        for memory in (self._hosts, self._seen_at_s, self._inventories, self._vm_states):
            memory.pop(name, None)

    async def heartbeat(self, name: str, inventory: HostInventory, vm_states: Mapping[str, VmState]) -> None:
        """Note that a host lives. Writes to the store only when its equipment changed, not at each beat."""
        known = self._hosts.get(name)
        if known is None:
            raise NotFound(f"host {name} is not a member of this farm; let it join again")
        self._seen_at_s[name] = self._clock_s()
        self._inventories[name] = inventory
        self._vm_states[name] = dict(vm_states)
        if known.inventory is not None and _equipment(known.inventory) == _equipment(inventory):
            return
        kept = await self._records.host(name)
        if kept is None:
            raise NotFound(f"host {name} is not a member of this farm; let it join again")
        record = kept.record.model_copy(update={"inventory": inventory})
        done = await self._records.store.transact(
            compares=[kept.unchanged], puts={host_key(name): encode(record)}
        )
        if done is not None:
            self._hosts[name] = record

    async def hosts(self) -> list[HostStatus]:
        """All members that have reported at least once, by name, with the VMs that each owns."""
        owned: dict[str, list[str]] = {}
        for kept in await self._records.ownerships():
            owned.setdefault(kept.record.owner, []).append(kept.key.split("/", 1)[1])
        return [self._status(name, tuple(owned.get(name, ()))) for name in self.names()]

    def names(self) -> list[str]:
        """All members that have reported at least once, in order."""
        return sorted(name for name in self._hosts if self._inventory(name) is not None)

    def host(self, name: str) -> HostStatus:
        """One member, its `vms` empty. `NotFound` for a stranger, `HostLost` for one that never reported."""
        if name not in self._hosts:
            raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
        return self._status(name, ())

    def link(self, name: str) -> HostLink:
        """The way to a member. Raises as `host` does."""
        return self._links(self.host(name), self._hosts[name].secret)

    def record(self, name: str) -> HostRecord:
        """What the store has of a member. Raises `NotFound` for a stranger."""
        if name not in self._hosts:
            raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
        return self._hosts[name]

    async def configure(
        self,
        name: str,
        changes: Mapping[str, object],
        along: Mapping[str, tuple[int, bytes]] | None = None,
    ) -> HostRecord | None:
        """Change a member's record: its state, its reservation, its overcommit, its labels.

        `along` are other records that are written in the same transaction, each with the revision that it
        must have. None: one of those had another.
        """
        others = along or {}
        while True:
            kept = await self._records.host(name)
            if kept is None:
                raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
            record = kept.record.model_copy(update=dict(changes))
            compares = [kept.unchanged, *(Compare(key, revision) for key, (revision, _) in others.items())]
            puts = {kept.key: encode(record), **{key: value for key, (_, value) in others.items()}}
            if await self._records.store.transact(compares=compares, puts=puts) is not None:
                self._hosts[name] = record
                return record
            now = await self._records.host(name)
            if others and now is not None and now.mod_revision == kept.mod_revision:
                return None

    def silent(self, name: str) -> bool:
        seen_at_s = self._seen_at_s.get(name)
        return seen_at_s is None or self._clock_s() - seen_at_s > self._limits.silent_after_s

    def vm_state(self, host: str, vm: str) -> VmState:
        """What the host last said of the VM; `UNKNOWN` while it is silent."""
        if self.silent(host):
            return VmState.UNKNOWN
        return self._vm_states.get(host, {}).get(vm, VmState.STOPPED)

    def active_vms(self, host: str) -> frozenset[str]:
        """The VMs of which the host last said that they have a QEMU process."""
        states = self._vm_states.get(host, {})
        return frozenset(name for name, state in states.items() if state is not VmState.STOPPED)

    def note_vm_state(self, host: str, vm: str, state: VmState) -> None:
        """What the controller itself just brought about, until the next heartbeat confirms it."""
        self._vm_states.setdefault(host, {})[vm] = state

    def _inventory(self, name: str) -> HostInventory | None:
        return self._inventories.get(name) or self._hosts[name].inventory

    def _status(self, name: str, vms: tuple[str, ...]) -> HostStatus:
        record = self._hosts[name]
        inventory = self._inventory(name)
        if inventory is None:
            raise HostLost(
                f"host {name} has joined but its daemon has not reported yet; run `transhume up` on it"
            )
        seen_at_s = self._seen_at_s.get(name, record.joined_at_s)
        return HostStatus(
            name=name,
            address=record.address,
            port=record.port,
            joined_at_s=record.joined_at_s,
            last_seen_s=seen_at_s,
            controller=record.controller,
            inventory=inventory,
            silent=self.silent(name),
            seen_ago_s=max(0.0, self._clock_s() - seen_at_s),
            vms=vms,
            state=record.state,
        )


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _equipment(inventory: HostInventory) -> HostInventory:
    """The inventory without what changes from second to second."""
    return inventory.model_copy(update={"memory_available_bytes": 0})
