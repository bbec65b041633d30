"""A cluster of etcd members through their JSON gateway: which member is asked, and what a failure means.

Every call says whether it may be made twice. One that may is made with the next member when one fails. One
that may not goes on to the next member only if it certainly was not carried out: it was not sent, or the
member refused it before it was proposed ("no leader"). Otherwise `OutcomeUnknown` is raised, never hidden.

Every request but a stale read demands that the member knows a leader (the gRPC header `hasleader`). A member
that was cut off from the majority then refuses at once instead of waiting for its own time limit. While an
election lasts, that is not yet a failure: calls are tried again for `PATIENCE_S` after the first trouble.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from transhume.model.errors import StoreError, StoreUnavailable
from transhume.store.etcd_http import AnswerLost, Endpoint, EtcdConnection, NotSent

Json = dict[str, Any]

REQUEST_TIMEOUT_S = 2.0
PATIENCE_S = 2.5
"""A little over what an election takes with etcd's default limits."""

MAX_IDLE_CONNECTIONS = 8
MAX_REQUESTS_AT_ONCE = 32
_RETRY_S = 0.1
_GREETING_TIMEOUT_S = 1.0
_NO_LEADER = "etcdserver: no leader"
_UNKNOWN_CODE = 2
_TRANSIENT_CODES = frozenset({1, _UNKNOWN_CODE, 4, 14})
"""gRPC: cancelled, unknown, deadline exceeded, unavailable. For a repeatable call: ask somebody else."""


class EtcdRefusal(Exception):
    """etcd answered with an error. `code` is gRPC's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class OutcomeUnknown(Exception):
    """A call that may not be made twice has left, and nobody has said what came of it. The text says why."""


def encode(data: bytes) -> str:
    """Bytes as etcd's JSON has them."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """The bytes of a field of etcd's JSON."""
    return base64.b64decode(text)


class EtcdGateway:
    """Requests to whichever member answers. It opens connections when they are needed and keeps some."""

    def __init__(self, endpoints: Sequence[Endpoint], tls: ssl.SSLContext | None = None) -> None:
        self._endpoints = list(endpoints)
        self._tls = tls
        self._idle: dict[Endpoint, list[EtcdConnection]] = {endpoint: [] for endpoint in endpoints}
        self._turns = asyncio.Semaphore(MAX_REQUESTS_AT_ONCE)
        self._cluster_id = ""
        self._failing_since_s: float | None = None
        self._closed = False

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """All members, the one that answered last first."""
        return tuple(self._endpoints)

    def __str__(self) -> str:
        return "etcd " + ",".join(sorted(str(endpoint) for endpoint in self._endpoints))

    async def call(
        self, path: str, request: Mapping[str, Any], *, repeatable: bool, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> Json:
        """The answer of a member that knows a leader.

        Raises `StoreUnavailable` when no member can be asked: the call was certainly not carried out, or
        may be repeated anyway. Raises `EtcdRefusal` when etcd refuses the request itself, and
        `OutcomeUnknown`, the latter only for a call that is not `repeatable`.
        """
        body = json.dumps(request).encode()
        started_s = time.time()
        while True:
            tried: list[str] = []
            for endpoint in list(self._endpoints):
                try:
                    answer = await self._ask(endpoint, path, body, timeout_s, leader=True)
                except (NotSent, AnswerLost, EtcdRefusal) as error:
                    self._demand_certain(error, endpoint, repeatable)
                    tried.append(f"{endpoint} ({_words(error)})")
                    continue
                self._note_answer(endpoint)
                return answer
            if self._failing_since_s is None:
                self._failing_since_s = started_s
            if time.time() - self._failing_since_s > PATIENCE_S:
                raise StoreUnavailable(self._silence(tried))
            await asyncio.sleep(_RETRY_S)

    async def call_at(
        self, endpoint: Endpoint, path: str, request: Mapping[str, Any], timeout_s: float = REQUEST_TIMEOUT_S
    ) -> Json:
        """The answer of this member alone, whether it knows a leader or not: for reads that may be stale.

        Raises `StoreUnavailable` when it does not answer, or refuses.
        """
        try:
            return await self._ask(endpoint, path, json.dumps(request).encode(), timeout_s, leader=False)
        except (NotSent, AnswerLost, EtcdRefusal) as error:
            raise StoreUnavailable(f"the farm's store at {endpoint} does not answer ({error})") from error

    async def close(self) -> None:
        """Close every connection. Later calls raise `StoreError`."""
        self._closed = True
        for connections in self._idle.values():
            while connections:
                connections.pop().close()

    def _demand_certain(
        self, error: NotSent | AnswerLost | EtcdRefusal, endpoint: Endpoint, repeatable: bool
    ) -> None:
        """Return if the next member may be asked, raise what ends the call if not."""
        if isinstance(error, NotSent):
            return
        if isinstance(error, AnswerLost):
            if not repeatable:
                raise OutcomeUnknown(f"{endpoint}: {error}") from error
            return
        if error.message == _NO_LEADER:
            return
        if error.code not in _TRANSIENT_CODES:
            raise error
        if not repeatable:
            raise OutcomeUnknown(f"{endpoint}: {error}") from error

    def _note_answer(self, endpoint: Endpoint) -> None:
        self._failing_since_s = None
        if self._endpoints[0] != endpoint:
            self._endpoints.remove(endpoint)
            self._endpoints.insert(0, endpoint)

    def _silence(self, tried: Sequence[str]) -> str:
        since_s = self._failing_since_s or time.time()
        clock = time.strftime("%H:%M:%S", time.gmtime(since_s))
        return (
            f"the farm's store (etcd) has no quorum in reach and takes no changes since {clock} UTC "
            f"({time.time() - since_s:.0f} s); nothing was written. Tried: {', '.join(tried)}. "
            "Start its members again or mend the network"
        )

    async def _ask(
        self, endpoint: Endpoint, path: str, body: bytes, timeout_s: float, *, leader: bool
    ) -> Json:
        if self._closed:
            raise StoreError("the farm's store is closed; start the daemon again")
        headers = {"Grpc-Metadata-hasleader": "true"} if leader else {}
        async with self._turns, self._connection(endpoint) as connection:
            status, answer = await connection.exchange(path, body, headers, timeout_s)
        return _parse(status, answer)

    @contextlib.asynccontextmanager
    async def _connection(self, endpoint: Endpoint) -> AsyncIterator[EtcdConnection]:
        connection = None
        idle = self._idle[endpoint]
        while idle and connection is None:
            connection = idle.pop()
            if connection.ended():
                connection.close()
                connection = None
        if connection is None:
            connection = await self._open(endpoint)
        try:
            yield connection
        except BaseException:
            # Also when this was cancelled: a late answer must not be taken for that of the next request.
            connection.close()
            raise
        if connection.ready_for_next() and len(idle) < MAX_IDLE_CONNECTIONS and not self._closed:
            idle.append(connection)
        else:
            connection.close()

    async def _open(self, endpoint: Endpoint) -> EtcdConnection:
        """A new connection, to a member of the same cluster as before. Raises `NotSent`.

        A register that is spread over two clusters by a wrong address would give a VM to two hosts.
        """
        connection = await EtcdConnection.open(endpoint, self._tls)
        try:
            status = _parse(
                *await connection.exchange("/v3/maintenance/status", b"{}", {}, _GREETING_TIMEOUT_S)
            )
            cluster_id = str(status["header"]["cluster_id"])
        except (AnswerLost, EtcdRefusal, KeyError, TypeError) as error:
            connection.close()
            reason = str(error) if isinstance(error, AnswerLost | EtcdRefusal) else "it is not etcd"
            raise NotSent(reason) from error
        except BaseException:
            connection.close()
            raise
        if not connection.ready_for_next():
            connection.close()
            raise NotSent("it closed the connection")
        self._cluster_id = self._cluster_id or cluster_id
        if cluster_id != self._cluster_id:
            connection.close()
            raise NotSent("it belongs to another cluster")
        return connection


def _parse(status: int, body: bytes) -> Json:
    """The object that etcd sent. Of a stream (the gateway's keepalive) only the first message is read."""
    try:
        text = body.decode()
        parsed = json.loads(text if status != 200 else (text.splitlines() or [""])[0])
    except ValueError as error:
        raise AnswerLost(f"its answer (status {status}) is not etcd's JSON") from error
    if not isinstance(parsed, dict):
        raise AnswerLost(f"its answer (status {status}) is not etcd's JSON")
    fault = parsed.get("error")
    if fault is not None:
        inside = fault if isinstance(fault, dict) else parsed
        code = inside.get("grpc_code", inside.get("code"))
        message = str(inside.get("message", fault))
        raise EtcdRefusal(code if isinstance(code, int) else _UNKNOWN_CODE, message)
    if status != 200:
        raise EtcdRefusal(_UNKNOWN_CODE, f"status {status}")
    result = parsed.get("result", parsed)
    if not isinstance(result, dict):
        raise AnswerLost("its answer is not etcd's JSON")
    return result


def _words(error: NotSent | AnswerLost | EtcdRefusal) -> str:
    if isinstance(error, EtcdRefusal) and error.message == _NO_LEADER:
        return "it knows no leader"
    return str(error)
