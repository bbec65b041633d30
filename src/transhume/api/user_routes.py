"""Users, their grants and tokens, and what was done: part of /v1."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from transhume.api.guard import Asker
from transhume.api.schemas import Body, Name
from transhume.farm.controller import Controller
from transhume.farm.rights import Grant
from transhume.farm.user_records import AuditRecord
from transhume.farm.users import IssuedToken, UserView

TtlS = Annotated[float, Field(gt=0, le=10 * 365 * 86_400)]


class AddUserRequest(Body):
    """`ttl_s` is how long its first token is good; None: 90 days."""

    name: Name
    grant: Grant
    ttl_s: TtlS | None = None


class UserTokenRequest(Body):
    """With `keep` the older tokens stay good."""

    ttl_s: TtlS | None = None
    keep: bool = False


def add_user_routes(router: APIRouter, controller: Controller) -> None:
    """Add them to the router of /v1."""
    users = controller.users

    @router.get("/whoami")
    async def whoami(caller: Asker) -> UserView:
        return UserView(name=caller.name, grants=caller.grants)

    @router.get("/users")
    async def list_users() -> list[UserView]:
        return await users.everybody()

    @router.post("/users", status_code=201)
    async def add_user(body: AddUserRequest) -> IssuedToken:
        """The answer holds the user's first token, which is told this once."""
        return await users.add(body.name, body.grant, body.ttl_s)

    @router.get("/users/{name}")
    async def show_user(name: Name) -> UserView:
        return await users.show(name)

    @router.delete("/users/{name}", status_code=204)
    async def remove_user(name: Name) -> None:
        await users.remove(name)

    @router.post("/users/{name}/token")
    async def new_token(name: Name, body: UserTokenRequest) -> IssuedToken:
        return await users.token(name, body.ttl_s, body.keep)

    @router.post("/users/{name}/grants")
    async def grant(name: Name, body: Grant) -> UserView:
        return await users.grant(name, body)

    @router.post("/users/{name}/grants/revoke")
    async def revoke(name: Name, body: Grant) -> UserView:
        return await users.revoke(name, body)

    @router.get("/audit")
    async def audit(
        user: str = "", since_s: float = 0.0, limit: Annotated[int, Query(ge=1, le=10_000)] = 200
    ) -> list[AuditRecord]:
        """The newest ones, the oldest of those first."""
        return await controller.audit.list(user, since_s, limit)
