"""The farm's records in the store: their keys, their JSON, and the revision each was read at.

authority           AuthorityRecord   the farm's authority with its key: whoever reads it can make hosts
hosts/<name>        HostRecord        a member, and which certificates it may show
tokens/<sha256>     TokenRecord       one invitation to join, under the hash of the token
vms/<name>          VmRecord          what the owner asked for, the migration under way and the one that waits
ownership/<vm>      Ownership         the register: who may run the VM
migrations/<id>     Migration         what was asked, how far it is, what came of it
rules/<name>        Rule              which VMs may be where
drains/<host>       Drain             the latest drain of the host, or the bringing back of its VMs
settings/farm       FarmSettings      what holds for the whole farm
users/<name>        UserRecord        a user and its grants
user-tokens/<sha256> UserTokenRecord  one token of a user, under the hash of its secret
audit/<ring>/<key>  AuditRecord       a change that was asked for, or what was refused
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from transhume.farm.drain_record import Drain
from transhume.farm.pool import DEFAULT_CPU_OVERCOMMIT
from transhume.farm.rules import Rule
from transhume.farm.user_records import AuditRecord, UserRecord, UserTokenRecord
from transhume.model.errors import StoreError
from transhume.model.host import HostInventory, HostState
from transhume.model.migration import Migration
from transhume.model.vm import Ownership, VmSpec
from transhume.store.interface import ABSENT, Compare, Entry, Store


class AuthorityRecord(BaseModel):
    """The farm's authority: made with the farm, once. `farm` is the id by which it is told from another's."""

    model_config = ConfigDict(frozen=True)

    farm: str
    key_pem: str = Field(repr=False)
    certificate_pem: str


class CertificateRecord(BaseModel):
    """A certificate that was issued to a host, the newest last; `serial` is its number in hex."""

    model_config = ConfigDict(frozen=True)

    serial: str
    expires_at_s: float


class Fence(BaseModel):
    """That a lost host was switched off, since when, and who says so."""

    model_config = ConfigDict(frozen=True)

    at_s: float
    how: str


class HostRecord(BaseModel):
    """A member of the farm. `inventory` is None until its daemon first reported.

    A certificate that is not among `certificates` opens nothing any more, whoever signed it.
    `reserve_memory_bytes` is what it keeps for itself and `cpu_overcommit` how often each of its CPUs is
    promised; None: as the farm has it. `labels` stand for it in rules. `fence` is there from the fencing
    until it is back and runs nothing that is another's; `fence_command` switches it off (empty: the farm's).
    """

    model_config = ConfigDict(frozen=True)

    name: str
    address: str
    port: int
    joined_at_s: float
    certificates: tuple[CertificateRecord, ...] = ()
    controller: bool = False
    inventory: HostInventory | None = None
    state: HostState = HostState.ACTIVE
    reserve_memory_bytes: int | None = None
    cpu_overcommit: float | None = None
    labels: tuple[str, ...] = ()
    fence_command: str = ""
    fence: Fence | None = None


class TokenRecord(BaseModel):
    """An invitation that one host may use once, before `expires_at_s`.

    `used_by` is who did. `only_for` is a member that is let in again under its own name; empty for a new one.
    """

    model_config = ConfigDict(frozen=True)

    expires_at_s: float
    used_by: str = ""
    only_for: str = ""


class VmRecord(BaseModel):
    """A VM. `migration` is the id of the one under way, or empty: the lock that keeps a second one out.

    `queued` is the id of the one that waits until that one has brought its last page, or empty. It stays when
    `migration` is freed, and keeps others out until it has become `migration` itself, or has ended.

    With `reserve` its share of its host is promised to it while it is stopped too. `labels` stand for it in
    rules. With `restart_elsewhere` it is started on another host when its own was fenced; `strict` says that
    it stands still while its host cannot reach the register. `wanted` is whether it was last started (True)
    or stopped; None: by an earlier release, nobody knows.
    """

    model_config = ConfigDict(frozen=True)

    spec: VmSpec
    migration: str = ""
    queued: str = ""
    created_at_s: float = 0.0
    reserve: bool = False
    labels: tuple[str, ...] = ()
    restart_elsewhere: bool = False
    strict: bool = False
    wanted: bool | None = None


class FarmSettings(BaseModel):
    """What holds for every host that is not set otherwise."""

    model_config = ConfigDict(frozen=True)

    cpu_overcommit: float = DEFAULT_CPU_OVERCOMMIT
    fence_command: str = ""


Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class Kept(Generic[Record]):
    """A record as it was read, with what a transaction compares to be sure that nobody changed it since."""

    key: str
    record: Record
    mod_revision: int

    @property
    def unchanged(self) -> Compare:
        return Compare(self.key, self.mod_revision)


AUTHORITY_KEY = "authority"


def host_key(name: str) -> str:
    return f"hosts/{name}"


def token_key(token_hash: str) -> str:
    return f"tokens/{token_hash}"


def vm_key(name: str) -> str:
    return f"vms/{name}"


def ownership_key(vm: str) -> str:
    return f"ownership/{vm}"


def migration_key(migration: str) -> str:
    return f"migrations/{migration}"


def rule_key(name: str) -> str:
    return f"rules/{name}"


def drain_key(host: str) -> str:
    return f"drains/{host}"


def user_key(name: str) -> str:
    return f"users/{name}"


def user_token_key(token_hash: str) -> str:
    return f"user-tokens/{token_hash}"


SETTINGS_KEY = "settings/farm"


def absent(key: str) -> Compare:
    """The condition that no record has this key yet."""
    return Compare(key, ABSENT)


def encode(record: BaseModel) -> bytes:
    return record.model_dump_json().encode()


class FarmRecords:
    """Typed reading on top of a `Store`. Writing is `store.transact` with `encode`, where it is decided.

    The store is asked each time. What is remembered is only which record the bytes of an entry stood for when
    its list was read last, because to parse those of 20,000 VMs takes longer than to read them.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._parsed: dict[str, dict[str, tuple[bytes, Kept[Any]]]] = {}

    async def authority(self) -> Kept[AuthorityRecord] | None:
        return await self._get(AUTHORITY_KEY, AuthorityRecord)

    async def host(self, name: str) -> Kept[HostRecord] | None:
        return await self._get(host_key(name), HostRecord)

    async def hosts(self) -> list[Kept[HostRecord]]:
        return await self._list("hosts/", HostRecord)

    async def token(self, token_hash: str) -> Kept[TokenRecord] | None:
        return await self._get(token_key(token_hash), TokenRecord)

    async def tokens(self) -> list[Kept[TokenRecord]]:
        return await self._list("tokens/", TokenRecord)

    async def vm(self, name: str) -> Kept[VmRecord] | None:
        return await self._get(vm_key(name), VmRecord)

    async def vms(self) -> list[Kept[VmRecord]]:
        return await self._list("vms/", VmRecord)

    async def ownership(self, vm: str) -> Kept[Ownership] | None:
        return await self._get(ownership_key(vm), Ownership)

    async def ownerships(self) -> list[Kept[Ownership]]:
        return await self._list("ownership/", Ownership)

    async def migration(self, migration: str) -> Kept[Migration] | None:
        return await self._get(migration_key(migration), Migration)

    async def migrations(self) -> list[Kept[Migration]]:
        return await self._list("migrations/", Migration)

    async def rules(self) -> list[Kept[Rule]]:
        return await self._list("rules/", Rule)

    async def drain(self, host: str) -> Kept[Drain] | None:
        return await self._get(drain_key(host), Drain)

    async def drains(self) -> list[Kept[Drain]]:
        return await self._list("drains/", Drain)

    async def settings(self) -> Kept[FarmSettings] | None:
        return await self._get(SETTINGS_KEY, FarmSettings)

    async def user(self, name: str) -> Kept[UserRecord] | None:
        return await self._get(user_key(name), UserRecord)

    async def users(self) -> list[Kept[UserRecord]]:
        return await self._list("users/", UserRecord)

    async def user_token(self, token_hash: str) -> Kept[UserTokenRecord] | None:
        return await self._get(user_token_key(token_hash), UserTokenRecord)

    async def user_tokens(self) -> list[Kept[UserTokenRecord]]:
        return await self._list("user-tokens/", UserTokenRecord)

    async def audit(self) -> list[Kept[AuditRecord]]:
        return await self._list("audit/", AuditRecord)

    async def _get(self, key: str, kind: type[Record]) -> Kept[Record] | None:
        entry = await self.store.get(key)
        return None if entry is None else _decode(entry, kind)

    async def _list(self, prefix: str, kind: type[Record]) -> list[Kept[Record]]:
        entries = await self.store.list(prefix)
        before = self._parsed.get(prefix, {})
        parsed: dict[str, tuple[bytes, Kept[Any]]] = {}
        found: list[Kept[Record]] = []
        for entry in entries:
            value, kept = before.get(entry.key, (None, None))
            # The bytes are compared too: a store that was brought back from a backup counts anew.
            if kept is None or kept.mod_revision != entry.mod_revision or value != entry.value:
                kept = _decode(entry, kind)
            parsed[entry.key] = (entry.value, kept)
            found.append(kept)
        self._parsed[prefix] = parsed
        return found


def _decode(entry: Entry, kind: type[Record]) -> Kept[Record]:
    try:
        record = kind.model_validate_json(entry.value)
    except ValidationError as error:
        raise StoreError(
            f"the record {entry.key} in the farm's store is not what this release writes "
            f"({error.error_count()} faults); was it edited, or written by a newer release?"
        ) from error
    return Kept(entry.key, record, entry.mod_revision)
