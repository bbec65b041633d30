"""The hosts of the farm: who is a member, how they prove it, and when each was last heard from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from transhume.farm.authority import FarmAuthority
from transhume.farm.host_link import HostLink
from transhume.farm.limits import Limits
from transhume.farm.records import (
    FarmRecords,
    HostRecord,
    Kept,
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
from transhume.model.orders import Renewed
from transhume.model.vm import VmState
from transhume.store.interface import Compare
from transhume.trust.token import Token, hash_of

_KEPT_CERTIFICATES = 3

OnStates = Callable[[str, Mapping[str, VmState], Mapping[str, VmState]], None]


class Links(Protocol):
    """How the controller reaches a host: over the network, or directly on its own machine."""

    def __call__(self, host: Host) -> HostLink: ...


class HostStatus(Host):
    """A host with what the controller knows of it at this moment. `silent`: it was not heard from lately.

    `certificate_expires_at_s` is when the newest certificate that it was given ends. `lost_since_s` is when
    it was last heard from while it is silent, `fenced_at_s` since when it counts as switched off; else None.
    """

    silent: bool
    certificate_expires_at_s: float = 0.0
    seen_ago_s: float
    vms: tuple[str, ...] = ()
    state: HostState = HostState.ACTIVE
    lost_since_s: float | None = None
    fenced_at_s: float | None = None


class Invitation(BaseModel):
    """A token as it is shown to the operator, once: the store keeps only its hash."""

    model_config = ConfigDict(frozen=True)

    token: str
    expires_at_s: float


class Joined(BaseModel):
    """What a new member takes home; `controller` is the name of the host that let it in.

    With `store`, the address of the farm's store, the new member is to carry a controller too.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    certificate: str
    authority: str
    controller: str
    store: str = ""


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
        self._authority: FarmAuthority | None = None
        self._started_at_s = clock_s()
        self._hosts: dict[str, HostRecord] = {}
        self._seen_at_s: dict[str, float] = {}
        self._inventories: dict[str, HostInventory] = {}
        self._vm_states: dict[str, dict[str, VmState]] = {}
        self.on_states: OnStates | None = None
        """Hears what a host said of its VMs before, and says now."""

    async def start(self) -> None:
        """Read the members and the authority, which is made for a new farm. Enter the controller's own host
        under the name and address of its config.
        """
        self._authority = await FarmAuthority.open(self._records, self._clock_s())
        for kept in await self._records.hosts():
            self._hosts[kept.record.name] = kept.record
        known = self._hosts.get(self._own.name)
        address, port = self._own.address, self._own.port
        new = HostRecord(name=self._own.name, address=address, port=port, joined_at_s=self._clock_s())
        record = (known or new).model_copy(update={"address": address, "port": port, "controller": True})
        if record != known:
            await self._records.store.transact(puts={host_key(record.name): encode(record)})
            self._hosts[record.name] = record

    @property
    def authority(self) -> FarmAuthority:
        """The farm's authority. After `start`."""
        assert self._authority is not None
        return self._authority

    def admits(self, name: str, serial: str) -> bool:
        """Whether the certificate with this serial is one that host `name` may show now."""
        known = self._hosts.get(name)
        return known is not None and any(each.serial == serial for each in known.certificates)

    async def invite(self, ttl_s: float | None = None, only_for: str = "") -> Invitation:
        """Make a token with which one host may join within `ttl_s`.

        With `only_for`, the name of a member, it lets that member in once more, to get a new certificate in
        place of all that it had. Raises `NotFound` when there is none.
        """
        if only_for and only_for not in self._hosts:
            raise NotFound(f"the farm has no host {only_for}; `transhume hosts` lists its members")
        token = Token.make(self.authority.fingerprint)
        now_s = self._clock_s()
        expires_at_s = now_s + (self._limits.token_ttl_s if ttl_s is None else ttl_s)
        expired = [kept.key for kept in await self._records.tokens() if kept.record.expires_at_s <= now_s]
        record = TokenRecord(expires_at_s=expires_at_s, only_for=only_for)
        await self._records.store.transact(
            puts={token_key(hash_of(token.secret)): encode(record)}, deletes=expired
        )
        return Invitation(token=str(token), expires_at_s=expires_at_s)

    async def join(self, secret: str, name: str, address: str, port: int, request_pem: str) -> Joined:
        """Use up a token, of which this is the secret, and enter a new member with its first certificate.

        Raises `Unauthorized` for a token that is wrong, used or expired, `Conflict` for a name that is taken
        and `Refused` for a request that is not sound; the token can be used again then. A host whose daemon
        never reported may join again, and one that joins once more keeps its settings and its state.
        """
        kept_token = await self.valid_token(secret, name)
        known = await self._records.host(name)
        self._demand_may_join(name, known, again=bool(kept_token.record.only_for))
        shared = self._own.on_cluster
        certificate, noted = self.authority.issue(name, request_pem, self._clock_s(), controller=shared)
        fresh = HostRecord(name=name, address=address, port=port, joined_at_s=self._clock_s())
        before = known.record if known and kept_token.record.only_for else fresh
        entered = {"address": address, "port": port, "certificates": (noted,), "controller": shared}
        record = before.model_copy(update=entered)
        used = kept_token.record.model_copy(update={"used_by": name})
        done = await self._records.store.transact(
            compares=[kept_token.unchanged, known.unchanged if known else absent(host_key(name))],
            puts={host_key(name): encode(record), kept_token.key: encode(used)},
        )
        if done is None:
            raise Conflict(f"another host joined at the same moment with this token or as {name}; try again")
        self._hosts[name] = record
        return Joined(
            name=name,
            certificate=certificate,
            authority=self.authority.certificate_pem,
            controller=self._own.name,
            store=self._own.store if shared else "",
        )

    async def renew(self, name: str, request_pem: str, shown_serial: str = "") -> Renewed:
        """A member's next certificate. The one that it has shown, of this serial, holds on until it ends.

        Raises `NotFound` for a stranger and `Refused` for a request that is not sound.
        """
        kept = await self._records.host(name)
        if kept is None:
            raise NotFound(f"host {name} is not a member of this farm; let it join again")
        now_s = self._clock_s()
        certificate, noted = self.authority.issue(name, request_pem, now_s, controller=kept.record.controller)
        # An answer may be lost: a host must not lock itself out by asking again and again.
        newest = kept.record.certificates[-_KEPT_CERTIFICATES:]
        held = tuple(
            each
            for each in kept.record.certificates
            if (each in newest or each.serial == shown_serial) and each.expires_at_s > now_s
        )
        record = kept.record.model_copy(update={"certificates": (*held, noted)})
        done = await self._records.store.transact(
            compares=[kept.unchanged], puts={host_key(name): encode(record)}
        )
        if done is None:
            raise Conflict(f"the record of host {name} changed at the same moment; try again")
        self._hosts[name] = record
        return Renewed(certificate=certificate, authority=self.authority.certificate_pem)

    async def valid_token(self, secret: str, name: str) -> Kept[TokenRecord]:
        """The record of a token with which host `name` may join now. `Unauthorized` for any other."""
        kept = await self._records.token(hash_of(secret))
        new_one = f"`transhume token` on {self._own.name} prints a new one"
        if kept is None:
            raise Unauthorized(f"the farm does not know this token; {new_one}")
        if kept.record.used_by:
            raise Unauthorized(
                f"the token was used already, by host {kept.record.used_by}; {new_one}. If that host is not "
                f"yours, take it out with `transhume host remove {kept.record.used_by}`"
            )
        if kept.record.expires_at_s <= self._clock_s():
            raise Unauthorized(f"the token has expired; {new_one}")
        if kept.record.only_for and kept.record.only_for != name:
            raise Unauthorized(f"the token is for host {kept.record.only_for} and no other; {new_one}")
        return kept

    def _demand_may_join(self, name: str, known: Kept[HostRecord] | None, again: bool) -> None:
        alone = known is not None and known.record.controller and not self._own.on_cluster
        if known is None or (again and not alone):
            return
        if alone:
            raise Conflict(f"host {name} carries the controller and cannot join its own farm")
        if known.record.inventory is not None:
            raise Conflict(
                f"the farm has a host {name} already; choose another name with --name, or, if it is this "
                f"host, let `transhume token --host {name}` print its command"
            )

    async def remove(self, name: str) -> None:
        """Forget a member. From this moment on its certificates open nothing any more.

        Raises `Conflict` for the controller's own host, and for one that owns or moves VMs.
        """
        kept = await self._records.host(name)
        if kept is None:
            raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
        if name == self._own.name and self._own.on_cluster:
            raise Conflict(
                f"host {name} leads the farm now: stop its daemon first, with `transhume down` there"
            )
        if name == self._own.name or (kept.record.controller and not self._own.on_cluster):
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
        deletes = [kept.key, drain_key(name)]
        if await self._records.store.transact(compares=[kept.unchanged], deletes=deletes) is None:
            raise Conflict(f"the record of host {name} changed at the same moment; try again")
        for memory in (self._hosts, self._seen_at_s, self._inventories, self._vm_states):
            memory.pop(name, None)

    async def heartbeat(self, name: str, inventory: HostInventory, vm_states: Mapping[str, VmState]) -> None:
        """Note that a host lives. Writes to the store only when its equipment changed, not at each beat."""
        known = self._hosts.get(name)
        if known is None:
            raise NotFound(f"host {name} is not a member of this farm; let it join again")
        self._seen_at_s[name] = self._clock_s()
        self._inventories[name] = inventory
        before, self._vm_states[name] = self._vm_states.get(name), dict(vm_states)
        if self.on_states is not None and before is not None and before != vm_states:
            self.on_states(name, before, vm_states)
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

    def inventories(self) -> dict[str, HostInventory]:
        """What each of those hosts has, by its name."""
        return {name: self.host(name).inventory for name in self.names()}

    def host(self, name: str) -> HostStatus:
        """One member, its `vms` empty. `NotFound` for a stranger, `HostLost` for one that never reported."""
        if name not in self._hosts:
            raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
        return self._status(name, ())

    def link(self, name: str) -> HostLink:
        """The way to a member. Raises as `host` does."""
        return self._links(self.host(name))

    def record(self, name: str) -> HostRecord:
        """What the store has of a member. Raises `NotFound` for a stranger."""
        if name not in self._hosts:
            raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
        return self._hosts[name]

    async def configure(
        self,
        name: str,
        changes: Mapping[str, object] | Callable[[HostRecord], Mapping[str, object]],
        along: Mapping[str, tuple[int, bytes]] | None = None,
    ) -> HostRecord | None:
        """Change a member's record: its state, its reservation, its overcommit, its labels.

        `changes` are the new values, or what makes them of the record as it is when it is written. `along`
        are other records that are written in the same transaction, each with the revision that it must have.
        None: one of those had another.
        """
        others = along or {}
        while True:
            kept = await self._records.host(name)
            if kept is None:
                raise NotFound(f"the farm has no host {name}; `transhume hosts` lists its members")
            wanted = changes(kept.record) if callable(changes) else changes
            record = kept.record.model_copy(update=dict(wanted))
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

    def fenced(self, name: str) -> bool:
        """Whether it counts as switched off."""
        known = self._hosts.get(name)
        return known is not None and known.fence is not None

    def lost(self, name: str) -> bool:
        """Whether it was silent for long enough, also since this controller listens at all."""
        listening_s = self._clock_s() - self._started_at_s
        return self.silent(name) and listening_s > self._limits.silent_after_s

    def last_state(self, host: str, vm: str) -> VmState | None:
        """What the host last said of the VM, however long ago; None when this controller never heard it."""
        states = self._vm_states.get(host)
        return None if states is None else states.get(vm, VmState.STOPPED)

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
        states = self._vm_states.setdefault(host, {})
        before, states[vm] = states.get(vm, VmState.STOPPED), state
        if self.on_states is not None:
            self.on_states(host, {vm: before}, {vm: state})

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
        silent = self.silent(name)
        return HostStatus(
            name=name,
            address=record.address,
            port=record.port,
            joined_at_s=record.joined_at_s,
            last_seen_s=seen_at_s,
            controller=record.controller,
            inventory=inventory,
            silent=silent,
            seen_ago_s=max(0.0, self._clock_s() - seen_at_s),
            certificate_expires_at_s=record.certificates[-1].expires_at_s if record.certificates else 0.0,
            vms=vms,
            state=record.state,
            # A controller that was restarted knows only that it has not heard from it since.
            lost_since_s=self._seen_at_s.get(name, self._started_at_s) if silent else None,
            fenced_at_s=record.fence.at_s if record.fence else None,
        )


def _equipment(inventory: HostInventory) -> HostInventory:
    """The inventory without what changes from second to second."""
    return inventory.model_copy(update={"memory_available_bytes": 0})
