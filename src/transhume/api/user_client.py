"""Users and the audit log, seen from a program."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from transhume.api.http_calls import HttpCalls, part
from transhume.farm.rights import Grant
from transhume.farm.user_records import AuditRecord
from transhume.farm.users import IssuedToken, UserView

_USERS: TypeAdapter[list[UserView]] = TypeAdapter(list[UserView])
_RECORDS: TypeAdapter[list[AuditRecord]] = TypeAdapter(list[AuditRecord])


class UserClient:
    """The verbs for users. Raises as `FarmClient` does."""

    def __init__(self, calls: HttpCalls) -> None:
        self._calls = calls

    async def add(self, name: str, grant: Grant, ttl_s: float | None) -> IssuedToken:
        body: dict[str, Any] = {"name": name, "grant": grant.model_dump(mode="json"), "ttl_s": ttl_s}
        return await self._calls.ask("POST", "/v1/users", IssuedToken, body)

    async def everybody(self) -> list[UserView]:
        return await self._calls.ask("GET", "/v1/users", _USERS)

    async def show(self, name: str) -> UserView:
        return await self._calls.ask("GET", f"/v1/users/{part(name)}", UserView)

    async def remove(self, name: str) -> None:
        await self._calls.send("DELETE", f"/v1/users/{part(name)}")

    async def token(self, name: str, ttl_s: float | None, keep: bool) -> IssuedToken:
        body = {"ttl_s": ttl_s, "keep": keep}
        return await self._calls.ask("POST", f"/v1/users/{part(name)}/token", IssuedToken, body)

    async def change_grant(self, name: str, grant: Grant, revoke: bool) -> UserView:
        path = f"/v1/users/{part(name)}/grants{'/revoke' if revoke else ''}"
        return await self._calls.ask("POST", path, UserView, grant)

    async def audit(self, user: str, since_s: float) -> list[AuditRecord]:
        params = {"user": user, "since_s": since_s, "limit": 1000}
        return await self._calls.ask("GET", "/v1/audit", _RECORDS, params=params)
