"""The farm, seen from a program: what the CLI uses, over a daemon's local socket or over TCP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from transhume.api.gate import REASON_HEADER
from transhume.api.http_calls import HttpCalls, part
from transhume.api.http_connection import TlsMaker, authority
from transhume.api.http_stream import open_answer
from transhume.api.operations_client import FeedClient, OperationsClient
from transhume.api.pool_client import PoolClient
from transhume.api.problem import from_problem
from transhume.api.schemas import ClockAnswer, JoinPreview, LogText, Pong
from transhume.api.user_client import UserClient
from transhume.farm.baseline import FarmBaseline
from transhume.farm.events import MigrationEvent
from transhume.farm.members import HostStatus, Invitation
from transhume.farm.revival import Revival
from transhume.model.errors import HostLost, PeerProtocolError
from transhume.model.finding import Finding
from transhume.model.host import HostInventory
from transhume.model.migration import DryRun, Migration, MigrationOptions, Outcome
from transhume.model.orders import Adjustment, CancelReply, ReviveReply
from transhume.model.vm import Vm, VmSpec

_HOSTS: TypeAdapter[list[HostStatus]] = TypeAdapter(list[HostStatus])
_VMS: TypeAdapter[list[Vm]] = TypeAdapter(list[Vm])
_MIGRATIONS: TypeAdapter[list[Migration]] = TypeAdapter(list[Migration])

REVIVE_TIMEOUT_S = 90.0
STREAM_SILENCE_S = 20.0
"""A stream beats every few seconds; one that is silent for so long has lost its other end."""


class FarmClient:
    """The API's verbs. Raises the errors of `transhume.model.errors`, `HostLost` when no daemon answers.

    `target` is the path of a daemon's local socket, or an address and a port; over TCP `tls` says how to
    prove oneself, and to whom. Close it, or use it with `async with`.
    """

    def __init__(self, target: tuple[str, int] | Path, tls: TlsMaker | None = None, reason: str = "") -> None:
        where = str(target) if isinstance(target, Path) else authority(*target)
        self._target = target
        self._tls = tls
        self._calls = HttpCalls(f"the daemon at {where}", target, "", tls)
        if reason:
            self._calls.headers[REASON_HEADER] = quote(reason)

    async def __aenter__(self) -> FarmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._calls.close()

    @cached_property
    def users(self) -> UserClient:
        """Users, their tokens, and what was done."""
        return UserClient(self._calls)

    @cached_property
    def pool(self) -> PoolClient:
        """The farm as a pool: rules, settings, drains."""
        return PoolClient(self._calls)

    @cached_property
    def feed(self) -> FeedClient:
        """What happens in the farm."""
        return FeedClient(self._calls)

    @cached_property
    def operations(self) -> OperationsClient:
        """Long actions: migrations and drains."""
        return OperationsClient(self._calls)

    async def ping(self) -> Pong:
        """The daemon itself, whether or not it reaches the controller. For local callers."""
        return await self._calls.ask("GET", "/host/v1/ping", Pong, timeout_s=5.0)

    async def hosts(self) -> list[HostStatus]:
        return await self._calls.ask("GET", "/v1/hosts", _HOSTS)

    async def invite(self, ttl_s: float | None = None, only_for: str | None = None) -> Invitation:
        """A token for one host; with `only_for`, for that member to join once more."""
        body = {"ttl_s": ttl_s, "only_for": only_for}
        return await self._calls.ask("POST", "/v1/tokens", Invitation, body)

    async def clock_s(self) -> float:
        """The controller's clock. Needs no certificate."""
        return (await self._calls.ask("GET", "/v1/clock", ClockAnswer, timeout_s=5.0)).now_s

    async def preview_join(self, secret: str, name: str, inventory: HostInventory) -> tuple[Finding, ...]:
        """What it would change if a server with `inventory` joined; the token stays good."""
        body = {"secret": secret, "name": name, "inventory": inventory.model_dump(mode="json")}
        return (await self._calls.ask("POST", "/v1/join/preview", JoinPreview, body)).findings

    async def baseline(self) -> FarmBaseline:
        return await self._calls.ask("GET", "/v1/baseline", FarmBaseline)

    async def export_store(self) -> bytes:
        """All records of the farm at one moment, as `store.transfer` writes them. For root on a host that
        carries a controller.
        """
        return await self._calls.send("GET", "/v1/store", timeout_s=120.0)

    async def remove_host(self, name: str) -> None:
        await self._calls.send("DELETE", f"/v1/hosts/{part(name)}")

    async def vms(self) -> list[Vm]:
        return await self._calls.ask("GET", "/v1/vms", _VMS)

    async def vm(self, name: str) -> Vm:
        return await self._calls.ask("GET", f"/v1/vms/{part(name)}", Vm)

    async def create_vm(
        self,
        spec: VmSpec,
        host: str | None,
        labels: tuple[str, ...] = (),
        reserve: bool = False,
        restart_elsewhere: bool = False,
        strict: bool = False,
    ) -> Vm:
        """Without `host` the farm places it. Raises `PreflightFailed` with all reasons when it fits
        nowhere.
        """
        body: dict[str, object] = {"spec": spec.model_dump(mode="json"), "host": host}
        if labels:
            body["labels"] = labels
        if reserve:
            body["reserve"] = reserve
        if restart_elsewhere:
            body["restart_elsewhere"] = restart_elsewhere
        if strict:
            body["strict"] = strict
        return await self._calls.ask("POST", "/v1/vms", Vm, body)

    async def start_vm(self, name: str, ignore_rules: bool = False) -> Vm:
        path = f"/v1/vms/{part(name)}/start"
        params = {"ignore_rules": True} if ignore_rules else None
        return await self._calls.ask("POST", path, Vm, params=params, timeout_s=90.0)

    async def stop_vm(self, name: str, timeout_s: float) -> Vm:
        body = {"timeout_s": timeout_s}
        return await self._calls.ask("POST", f"/v1/vms/{part(name)}/stop", Vm, body, timeout_s=timeout_s + 30)

    async def kill_vm(self, name: str) -> Vm:
        return await self._calls.ask("POST", f"/v1/vms/{part(name)}/kill", Vm, timeout_s=60.0)

    async def delete_vm(self, name: str) -> None:
        await self._calls.send("DELETE", f"/v1/vms/{part(name)}", timeout_s=60.0)

    async def vm_log(self, name: str, serial: bool, lines: int) -> str:
        params = {"serial": serial, "lines": lines}
        return (await self._calls.ask("GET", f"/v1/vms/{part(name)}/log", LogText, params=params)).text

    async def screendump(self, name: str) -> bytes:
        return await self._calls.send("GET", f"/v1/vms/{part(name)}/screendump")

    def console(self, name: str, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        # Loaded here: the library behind it would slow every other command down.
        from transhume.api.console_client import join_console

        path = f"/v1/vms/{part(name)}/console"
        return join_console(self._calls.peer, self._target, path, self._tls, received)

    async def migrate(self, vm: str, to: str | None, options: MigrationOptions) -> Migration:
        """Returns when the migration is entered; `follow` tells the rest."""
        body = {"to": to, "options": options.model_dump(mode="json")}
        return await self._calls.ask("POST", f"/v1/vms/{part(vm)}/migrate", Migration, body, timeout_s=60.0)

    async def dry_run(self, vm: str, to: str | None, options: MigrationOptions) -> DryRun:
        body = {"to": to, "options": options.model_dump(mode="json")}
        return await self._calls.ask("POST", f"/v1/vms/{part(vm)}/dry-run", DryRun, body, timeout_s=90.0)

    async def migrations(self, limit: int = 100) -> list[Migration]:
        """The latest ones, the oldest of those first."""
        return await self._calls.ask("GET", "/v1/migrations", _MIGRATIONS, params={"limit": limit})

    async def migration(self, migration: str) -> Migration:
        return await self._calls.ask("GET", f"/v1/migrations/{part(migration)}", Migration)

    async def cancel(self, reference: str) -> CancelReply:
        """By a migration's id or its VM's name."""
        return await self._calls.ask(
            "POST", f"/v1/migrations/{part(reference)}/cancel", CancelReply, timeout_s=60.0
        )

    async def adjust(self, reference: str, adjustment: Adjustment) -> None:
        """Other limits for a migration under way; raises `Conflict` with the reason when it takes them
        not.
        """
        await self._calls.send("POST", f"/v1/migrations/{part(reference)}/adjust", adjustment, timeout_s=60.0)

    async def revival(self, vm: str) -> Revival:
        """What it would mean to take a VM back from a destination that is lost. Raises `Conflict` with the
        reason when there is nothing to take back.
        """
        return await self._calls.ask("GET", f"/v1/vms/{part(vm)}/revival", Revival)

    async def revive(self, vm: str, despite_disks: bool = False) -> ReviveReply:
        """Take it back, as it was suspended. Raises `Conflict` with the reason when it was not."""
        body = {"despite_disks": despite_disks}
        return await self._calls.ask(
            "POST", f"/v1/vms/{part(vm)}/revival", ReviveReply, body, timeout_s=REVIVE_TIMEOUT_S
        )

    async def follow(self, migration: str, after: int = 0) -> AsyncGenerator[MigrationEvent]:
        """Events until the one that ended it. `HostLost` when the stream breaks: go on with `after`."""
        path = f"/v1/migrations/{part(migration)}/events?after={after}"
        calls = self._calls
        async with open_answer(
            calls.peer, calls.target, calls.tls, "GET", path, None, STREAM_SILENCE_S
        ) as answer:
            if answer.head.status >= 400:
                raise from_problem(
                    answer.head.status, b"".join([piece async for piece in answer.body]), calls.peer
                )
            rest = b""
            async for piece in answer.body:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if not line:
                        continue
                    event = _event(line, calls.peer)
                    yield event
                    if event.migration.outcome is not Outcome.RUNNING:
                        return
        raise HostLost(f"{calls.peer} ended the stream of migration {migration} early")


def _event(line: bytes, peer: str) -> MigrationEvent:
    try:
        return MigrationEvent.model_validate_json(line)
    except ValidationError as error:
        raise PeerProtocolError(
            f"{peer} sent an event that cannot be read; is it of another release?"
        ) from error
