"""The farm from Python: `transhume.Client`, and `transhume.AsyncClient` for programs with an event loop.

Both are the client that the command line uses, with the same verbs. They speak to the daemon of this machine
through its local socket, which is root's. Errors are those of `transhume.model.errors`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from transhume.api.client import FarmClient
from transhume.api.operations_client import FeedClient, OperationsClient
from transhume.api.pool_client import PoolClient
from transhume.api.user_client import UserClient
from transhume.host.config import DEFAULT_STATE_DIR

P = ParamSpec("P")
R = TypeVar("R")
Inner = TypeVar("Inner")


class AsyncClient(FarmClient):
    """The farm, asked through the daemon whose state folder is given. Use it with `async with`.

    `feed` is what happens in the farm, `operations` are long actions, `pool` are rules, settings
    and drains, `users` who may do what.
    """

    def __init__(self, state_dir: Path | str = DEFAULT_STATE_DIR) -> None:
        super().__init__(Path(state_dir) / "api.sock")


class _Blocking(Generic[Inner]):
    """Some verbs of a client, each run to its end on an event loop of its own."""

    def __init__(self, inner: Inner, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner


def _verb(
    verb: Callable[Concatenate[Inner, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[_Blocking[Inner], P], R]:
    """A verb that returns when it is done."""

    @wraps(verb)
    def call(self: _Blocking[Inner], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._runner.run(verb(self._inner, *args, **kwargs))

    return call


def _stream(
    verb: Callable[Concatenate[Inner, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[_Blocking[Inner], P], Iterator[R]]:
    """A verb whose answers come one by one. Closing the iterator ends it."""

    @wraps(verb)
    def call(self: _Blocking[Inner], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        answers = verb(self._inner, *args, **kwargs)

        async def upcoming() -> tuple[R, ...]:
            # An end by exception would not come through a task.
            return tuple([answer async for answer in _first(answers)])

        try:
            while found := self._runner.run(upcoming()):
                yield found[0]
        finally:
            self._runner.run(answers.aclose())

    return call


async def _first(answers: AsyncGenerator[R, None]) -> AsyncGenerator[R, None]:
    try:
        yield await anext(answers)
    except StopAsyncIteration:
        return


class Pool(_Blocking[PoolClient]):
    """Rules, settings and drains: `transhume.api.pool_client.PoolClient`, blocking."""

    view = _verb(PoolClient.view)
    set_farm = _verb(PoolClient.set_farm)
    set_host = _verb(PoolClient.set_host)
    set_vm = _verb(PoolClient.set_vm)
    set_vm_memory = _verb(PoolClient.set_vm_memory)
    fence_report = _verb(PoolClient.fence_report)
    fence = _verb(PoolClient.fence)
    rules = _verb(PoolClient.rules)
    add_rule = _verb(PoolClient.add_rule)
    remove_rule = _verb(PoolClient.remove_rule)
    plan_drain = _verb(PoolClient.plan_drain)
    begin_drain = _verb(PoolClient.begin_drain)
    drain = _verb(PoolClient.drain)
    pause_drain = _verb(PoolClient.pause_drain)
    resume_drain = _verb(PoolClient.resume_drain)
    cancel_drain = _verb(PoolClient.cancel_drain)
    undrain = _verb(PoolClient.undrain)


class Users(_Blocking[UserClient]):
    """Users and the audit log: `transhume.api.user_client.UserClient`, blocking."""

    add = _verb(UserClient.add)
    everybody = _verb(UserClient.everybody)
    show = _verb(UserClient.show)
    remove = _verb(UserClient.remove)
    token = _verb(UserClient.token)
    change_grant = _verb(UserClient.change_grant)
    audit = _verb(UserClient.audit)


class Operations(_Blocking[OperationsClient]):
    """Long actions: `transhume.api.operations_client.OperationsClient`, blocking."""

    list = _verb(OperationsClient.list)
    show = _verb(OperationsClient.show)
    cancel = _verb(OperationsClient.cancel)
    wait = _verb(OperationsClient.wait)


class Events(_Blocking[FeedClient]):
    """What happens in the farm: `transhume.api.operations_client.FeedClient`, blocking."""

    history = _verb(FeedClient.history)
    follow = _stream(FeedClient.follow)


class Client(_Blocking[FarmClient]):
    """`AsyncClient` for programs without an event loop: each verb returns when it is done.

    Use it with `with`, from one thread, and not where an event loop runs.
    """

    def __init__(self, state_dir: Path | str = DEFAULT_STATE_DIR) -> None:
        super().__init__(AsyncClient(state_dir), asyncio.Runner())
        self.pool = Pool(self._inner.pool, self._runner)
        self.users = Users(self._inner.users, self._runner)
        self.operations = Operations(self._inner.operations, self._runner)
        self.feed = Events(self._inner.feed, self._runner)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections. The client cannot be used any more."""
        try:
            self._runner.run(self._inner.close())
        finally:
            self._runner.close()

    ping = _verb(FarmClient.ping)
    hosts = _verb(FarmClient.hosts)
    invite = _verb(FarmClient.invite)
    clock_s = _verb(FarmClient.clock_s)
    preview_join = _verb(FarmClient.preview_join)
    baseline = _verb(FarmClient.baseline)
    export_store = _verb(FarmClient.export_store)
    remove_host = _verb(FarmClient.remove_host)
    vms = _verb(FarmClient.vms)
    vm = _verb(FarmClient.vm)
    create_vm = _verb(FarmClient.create_vm)
    start_vm = _verb(FarmClient.start_vm)
    stop_vm = _verb(FarmClient.stop_vm)
    kill_vm = _verb(FarmClient.kill_vm)
    delete_vm = _verb(FarmClient.delete_vm)
    vm_log = _verb(FarmClient.vm_log)
    screendump = _verb(FarmClient.screendump)
    migrate = _verb(FarmClient.migrate)
    dry_run = _verb(FarmClient.dry_run)
    migrations = _verb(FarmClient.migrations)
    migration = _verb(FarmClient.migration)
    cancel = _verb(FarmClient.cancel)
    adjust = _verb(FarmClient.adjust)
    revival = _verb(FarmClient.revival)
    revive = _verb(FarmClient.revive)
    follow = _stream(FarmClient.follow)
