"""Who may do what under /v1: the layer behind the gate, on the controller alone.

Root on a host, and a host with its certificate, is an admin. Everybody else shows a token
(`Authorization: Bearer NAME.SECRET`). Each change is noted before it is made and again with its outcome.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends
from starlette.requests import HTTPConnection

from transhume.api.gate import CALLER, LOCAL, REASON_HEADER, App, Receive, Scope, Send, refuse
from transhume.api.permissions import Need, Target, need_of
from transhume.farm.controller import Controller
from transhume.farm.login_limit import LoginLimit
from transhume.farm.rights import Action, Grant, Role, may
from transhume.farm.user_records import AuditRecord
from transhume.model.errors import Forbidden, NotFound, TooManyAttempts, TranshumeError, Unauthorized
from transhume.model.migration import MigrationOptions

log = logging.getLogger(__name__)

MOST_REASON_CHARACTERS = 500
_WHO = "transhume.who"
_ALL = (Grant(role=Role.ADMIN),)


@dataclass(frozen=True)
class Who:
    """Whoever asks, as the log names it, and its grants."""

    name: str
    source: str
    grants: tuple[Grant, ...]


def who(connection: HTTPConnection) -> Who:
    """Whoever the guard has let through."""
    found: Who = connection.scope[_WHO]
    return found


def _sight(connection: HTTPConnection) -> Callable[[Iterable[str]], bool]:
    grants = who(connection).grants
    return lambda labels: may(grants, Action.VIEW, frozenset(labels))


Asker = Annotated[Who, Depends(who)]
Sight = Annotated[Callable[[Iterable[str]], bool], Depends(_sight)]
"""Whether the caller may see a VM with these labels."""


def demand_folder_right(caller: Who, options: MigrationOptions) -> None:
    """Raises `Forbidden` for a safe copy that an admin does not ask for: root writes it to any folder."""
    if options.safe_dir is not None and not may(caller.grants, Action.ADMINISTER, None):
        raise Forbidden(f"user {caller.name} may not name a folder that root writes to; leave --safe out")


class Guard:
    """Lets a request through to `app` when its caller has the right that `api.permissions` demands."""

    def __init__(self, app: App, controller: Controller, own_name: str) -> None:
        self._app = app
        self._controller = controller
        self._own_name = own_name
        self._limit = LoginLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        verb = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
        need, name = need_of(verb, scope["path"])
        if need.target is Target.OPEN:
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._known(scope)
            await self._demand(caller, need, name, scope, f"{verb} {scope['path']}")
            scope[_WHO] = caller
            if need.changes:
                await self._noted(caller, f"{verb} {scope['path']}", scope, receive, send)
                return
        except TranshumeError as error:
            await refuse(scope, send, error, error.status)
            return
        await self._app(scope, receive, send)

    async def _known(self, scope: Scope) -> Who:
        if scope.get(LOCAL):
            return Who(f"root@{self._own_name}", "local", _ALL)
        source = (scope.get("client") or ("unknown",))[0]
        if scope[CALLER]:
            return Who(f"root@{scope[CALLER]}", source, _ALL)
        kind, _, token = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        claimed = token.partition(".")[0][:63]
        wait_s = self._limit.wait_s(source, claimed, time.monotonic())
        if wait_s > 0:
            raise TooManyAttempts(f"too many logins have failed from {source}; try again in {wait_s:.0f} s")
        try:
            if kind.lower() != "bearer":
                raise Unauthorized("this needs a token of a user: Authorization: Bearer TOKEN")
            user = await self._controller.users.prove(token)
        except Unauthorized as error:
            self._limit.failed(source, claimed, time.monotonic())
            # The name is what a stranger wrote: it may be anything, also a secret in the wrong place.
            await self._refused(Who("(unproven)", source, ()), "login", scope, error)
            raise
        return Who(user.name, source, user.grants)

    async def _demand(self, caller: Who, need: Need, name: str, scope: Scope, what: str) -> None:
        if need.target in (Target.SELF, Target.SEEN) or may(caller.grants, need.action, None):
            return
        labels = None
        try:
            if need.target is Target.MIGRATION:
                name = await self._vm_of(name)
            if need.target in (Target.VM, Target.MIGRATION):
                labels = frozenset((await self._controller.vms.show(name)).labels)
        except NotFound:
            labels = None  # whoever may not see it is not told either that it does not exist
        if not may(caller.grants, need.action, labels):
            error = Forbidden(f"user {caller.name} may not do this ({need.action} is needed); ask an admin")
            await self._refused(caller, what, scope, error)
            raise error

    async def _vm_of(self, reference: str) -> str:
        try:
            return (await self._controller.migrations.get(reference)).vm
        except NotFound:
            return reference

    async def _refused(self, caller: Who, what: str, scope: Scope, error: TranshumeError) -> None:
        record = _record(caller, what, scope)
        await self._controller.audit.refused(
            record.model_copy(update={"outcome": f"refused ({error.status})", "told": error.message[:300]})
        )

    async def _noted(self, caller: Who, what: str, scope: Scope, receive: Receive, send: Send) -> None:
        record = _record(caller, what, scope)
        key = await self._controller.audit.begin(record)
        status, told = 0, bytearray()

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            kind = message["type"]
            if kind == "http.response.start":
                status = message["status"]
            elif kind == "websocket.accept":
                status = 101
            elif kind == "http.response.body" and status >= 400 and len(told) < 4096:
                told.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            ended = {"outcome": _outcome(status), "told": _detail(bytes(told))}
            try:
                await self._controller.audit.end(key, record.model_copy(update=ended))
            except TranshumeError as error:
                log.warning("what came of %s by %s could not be noted: %s", what, caller.name, error.message)


def _record(caller: Who, what: str, scope: Scope) -> AuditRecord:
    why = dict(scope["headers"]).get(REASON_HEADER.encode(), b"").decode("latin-1")
    return AuditRecord(
        at_s=time.time(),
        who=caller.name,
        source=caller.source,
        what=what[:300],
        why=unquote(why)[:MOST_REASON_CHARACTERS],
    )


def _outcome(status: int) -> str:
    if not status:
        return "unknown"
    return "done" if status < 400 else f"{'refused' if status < 500 else 'failed'} ({status})"


def _detail(problem: bytes) -> str:
    try:
        found = json.loads(problem) if problem else {}
    except ValueError:
        return ""
    return str(found.get("detail", ""))[:300] if isinstance(found, dict) else ""
