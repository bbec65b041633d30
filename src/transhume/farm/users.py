"""The farm's users and their tokens: the records `users/<name>` and `user-tokens/<sha256>`."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from transhume.farm.records import FarmRecords, Kept, absent, encode, user_key, user_token_key
from transhume.farm.rights import Grant, Role
from transhume.farm.user_records import UserRecord, UserTokenRecord
from transhume.model.errors import Conflict, NotFound, Refused, Unauthorized
from transhume.trust.token import hash_of

_SECRET_BYTES = 32
DEFAULT_TOKEN_S = 90 * 86_400.0
MOST_TOKENS = 20
MOST_GRANTS = 50


class IssuedToken(BaseModel):
    """The only answer that ever holds a token. It reads NAME.SECRET."""

    model_config = ConfigDict(frozen=True)

    user: str
    token: str
    expires_at_s: float


class UserView(BaseModel):
    """A user as others see it: when each of its tokens ends, and nothing of the tokens themselves."""

    model_config = ConfigDict(frozen=True)

    name: str
    grants: tuple[Grant, ...]
    tokens_expire_at_s: tuple[float, ...] = ()


class Users:
    """Adds, changes and recognizes users. What is written is written in one transaction, or not at all."""

    def __init__(self, records: FarmRecords, clock_s: Callable[[], float]) -> None:
        self._records = records
        self._clock_s = clock_s

    async def add(self, name: str, grant: Grant, ttl_s: float | None = None) -> IssuedToken:
        """Raises `Conflict` for a name that is taken."""
        digest, record, issued = self._issue(name, ttl_s)
        user = UserRecord(name=name, grants=(grant,))
        done = await self._records.store.transact(
            compares=[absent(user_key(name))],
            puts={user_key(name): encode(user), user_token_key(digest): encode(record)},
        )
        if done is None:
            raise Conflict(
                f"the farm has a user {name} already; `transhume user token {name}` gives a new token"
            )
        return issued

    async def everybody(self) -> list[UserView]:
        """All users by name."""
        tokens = await self._records.user_tokens()
        return [_view(kept.record, tokens) for kept in await self._records.users()]

    async def show(self, name: str) -> UserView:
        """Raises `NotFound`."""
        return _view((await self._kept(name)).record, await self._records.user_tokens())

    async def remove(self, name: str) -> None:
        """From then on none of its tokens opens anything. Raises `NotFound`, `Conflict`."""
        user = await self._kept(name)
        await self._demand_other_admin(user.record, ())
        tokens = [kept.key for kept in await self._tokens(name)]
        done = await self._records.store.transact([user.unchanged], deletes=[user.key, *tokens])
        _demand(done, name)

    async def token(self, name: str, ttl_s: float | None = None, keep: bool = False) -> IssuedToken:
        """A new token; the older ones open nothing any more, unless `keep`. Raises `NotFound`, `Conflict`."""
        user = await self._kept(name)
        old = await self._tokens(name)
        if keep and len(old) >= MOST_TOKENS:
            raise Conflict(f"user {name} has {len(old)} tokens already; leave out --keep to revoke them")
        digest, record, issued = self._issue(name, ttl_s)
        done = await self._records.store.transact(
            [user.unchanged],
            # The user is written too: of two at a time one loses.
            {user_token_key(digest): encode(record), user.key: encode(user.record)},
            [] if keep else [kept.key for kept in old],
        )
        _demand(done, name)
        return issued

    async def grant(self, name: str, grant: Grant) -> UserView:
        """Raises `NotFound`, `Refused`."""
        user = await self._kept(name)
        grants = tuple(dict.fromkeys((*user.record.grants, grant)))
        if len(grants) > MOST_GRANTS:
            raise Refused(f"user {name} has {MOST_GRANTS} grants already; revoke one first")
        return await self._write(user, grants)

    async def revoke(self, name: str, grant: Grant) -> UserView:
        """Raises `NotFound` for a grant that the user has not, `Conflict` for the last admin's."""
        user = await self._kept(name)
        if grant not in user.record.grants:
            raise NotFound(f"user {name} has no such grant; `transhume user show {name}` lists them")
        grants = tuple(each for each in user.record.grants if each != grant)
        await self._demand_other_admin(user.record, grants)
        return await self._write(user, grants)

    async def prove(self, token: str) -> UserRecord:
        """Whose token it is. Raises `Unauthorized`, in the same words for all that are not good."""
        name, _, secret = token.partition(".")
        kept = await self._records.user_token(hash_of(secret))
        user = await self._records.user(name) if kept and kept.record.user == name else None
        if kept is None or user is None:
            raise Unauthorized(
                "this token opens nothing here: it is wrong, or was revoked; ask an admin for another"
            )
        if kept.record.expires_at_s <= self._clock_s():
            raise Unauthorized(f"this token of user {name} has expired; ask an admin for another")
        return user.record

    def _issue(self, name: str, ttl_s: float | None) -> tuple[str, UserTokenRecord, IssuedToken]:
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        expires_at_s = self._clock_s() + (DEFAULT_TOKEN_S if ttl_s is None else ttl_s)
        record = UserTokenRecord(user=name, expires_at_s=expires_at_s)
        issued = IssuedToken(user=name, token=f"{name}.{secret}", expires_at_s=expires_at_s)
        return hash_of(secret), record, issued

    async def _kept(self, name: str) -> Kept[UserRecord]:
        found = await self._records.user(name)
        if found is None:
            raise NotFound(f"the farm has no user {name}; `transhume user list` shows those it has")
        return found

    async def _tokens(self, name: str) -> list[Kept[UserTokenRecord]]:
        return [kept for kept in await self._records.user_tokens() if kept.record.user == name]

    async def _write(self, user: Kept[UserRecord], grants: tuple[Grant, ...]) -> UserView:
        record = user.record.model_copy(update={"grants": grants})
        done = await self._records.store.transact([user.unchanged], {user.key: encode(record)})
        _demand(done, record.name)
        return await self.show(record.name)

    async def _demand_other_admin(self, user: UserRecord, left: tuple[Grant, ...]) -> None:
        admin = Grant(role=Role.ADMIN)
        if admin not in user.grants or admin in left:
            return
        others = [kept.record for kept in await self._records.users() if kept.record.name != user.name]
        if not any(admin in other.grants for other in others):
            raise Conflict(f"user {user.name} is the farm's last admin; make another one first")


def _demand(done: int | None, name: str) -> None:
    if done is None:
        raise Conflict(f"user {name} was changed by somebody else at this moment; look at it and try again")


def _view(user: UserRecord, tokens: list[Kept[UserTokenRecord]]) -> UserView:
    ends = sorted(kept.record.expires_at_s for kept in tokens if kept.record.user == user.name)
    return UserView(name=user.name, grants=user.grants, tokens_expire_at_s=tuple(ends))
