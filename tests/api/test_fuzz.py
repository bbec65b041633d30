"""Requests made from the OpenAPI document, right and wrong ones, against the served application.

Whatever comes: no error of the daemon's own, no hang, nothing left open, and each error is a problem document
with a known code. The requests go over the local socket of the controller's host, as root's do.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.api.daemons import two_daemons

from transhume.api.document import openapi
from transhume.api.problem import CONTENT_TYPE
from transhume.model.errors import ERRORS_BY_CODE, PreflightFailed

EXAMPLES = 6
"""For each request and each way to make it. There are some fifty requests; all of it is to take seconds."""

ANSWER_LIMIT_S = 20.0

_CODES = {*ERRORS_BY_CODE, PreflightFailed.code}
_BUGS = {"internal", "kernel"}
_STREAMS = ("text/event-stream", "application/x-ndjson")
_KNOWN = {"/v1/vms/": {"name": "web"}, "/v1/hosts/": {"name": "beta"}}
"""What really is in the farm, by where it is asked for."""

DOCUMENT: Any = schemathesis.openapi.from_dict(openapi())
OPERATIONS = {found.ok().label: found.ok() for found in DOCUMENT.get_all_operations()}


class Served:
    """Two daemons in a thread of their own, and a client of the first one's local socket."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="daemons")
        self._thread.start()
        assert self._ready.wait(60)
        if self._failure is not None:
            raise self._failure
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)),
            base_url="http://localhost",
            timeout=ANSWER_LIMIT_S,
        )

    def close(self) -> None:
        self.http.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def open_files(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def tasks(self) -> int:
        """How many tasks the daemons' event loop has."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(10)

    def judge(self, operation: Any, case: Any) -> None:
        """Send a request that was made from the document, and look whether the answer is one that may be."""
        prepared: Any = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
        request = self.http.build_request(
            prepared.method, prepared.url, headers=dict(prepared.headers), content=prepared.body
        )
        try:
            answer = self.http.send(request, stream=True)
        except httpx.LocalProtocolError:
            reject()  # no client can send this
        try:
            kind = answer.headers.get("content-type", "").split(";")[0]
            if kind in _STREAMS:
                next(answer.iter_raw())
                return
            content = answer.read()
            if answer.status_code >= 400:
                assert kind == CONTENT_TYPE
                problem = json.loads(content)
                assert problem["code"] in _CODES - _BUGS, problem
                assert (problem["status"], problem["detail"] != "") == (answer.status_code, True)
            else:
                operation.validate_response(answer)
        finally:
            answer.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:  # noqa: BLE001 - told in the test's own thread
            self._failure = error
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        async with two_daemons() as daemons:
            await daemons.running_vm()
            self.socket: Path = daemons.alpha_config.api_socket
            self._ready.set()
            await self._stop.wait()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    try:
        yield served
    finally:
        served.close()


def ways(label: str) -> list[dict[str, Any]]:
    """How the requests of one kind are made: wrong ones, right ones, and right ones about what there is."""
    found: list[dict[str, Any]] = [
        {"generation_mode": GenerationMode.NEGATIVE},
        {"generation_mode": GenerationMode.POSITIVE},
    ]
    for prefix, names in _KNOWN.items():
        if f" {prefix}{{name}}" in label and not label.startswith("DELETE"):
            found.append({"generation_mode": GenerationMode.POSITIVE, "path_parameters": names})
    return found


@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_every_answer_is_one_that_may_be_given(label: str, served: Served) -> None:
    operation = OPERATIONS[label]

    @settings(
        max_examples=EXAMPLES * len(ways(label)),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of([operation.as_strategy(**way) for way in ways(label)]))
    def ask(case: Any) -> None:
        served.judge(operation, case)

    ask()


def test_nothing_is_left_open(served: Served) -> None:
    """The tests above have made many requests and left many streams; a few more show whether it grows."""
    for _ in range(2):
        before = served.open_files(), served.tasks()
        for _ in range(20):
            with served.http.stream("GET", "/v1/events?after=0") as answer:
                next(answer.iter_raw())
            served.http.post("/v1/vms", content=b"{")
    limit_s = time.monotonic() + 20
    while (
        served.open_files() > before[0] + 2 or served.tasks() > before[1] + 2
    ) and time.monotonic() < limit_s:
        time.sleep(0.05)
    assert served.open_files() <= before[0] + 2
    assert served.tasks() <= before[1] + 2


MALFORMED = {
    "nothing": b"",
    "half": b'{"spec": ',
    "not text": b"\xff\xfe\x00",
    "no object": b"[]",
    "a number": b"1e999",
    "not a number": b'{"cpu_overcommit": NaN}',
    "deep": b"[" * 200_000,
    "deep objects": b'{"spec":' * 100_000,
    "a long number": b'{"memory_bytes": ' + b"9" * 10_000 + b"}",
    "half a character": b'{"name": "\\ud800"}',
    "a zero": b'{"name": "a\\u0000b"}',
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
@pytest.mark.parametrize(
    "path", ["/v1/vms", "/v1/vms/web/memory", "/v1/farm/settings", "/v1/rules", "/v1/join", "/v1/tokens"]
)
def test_malformed_json_is_refused(name: str, path: str, served: Served) -> None:
    answer = served.http.post(path, content=MALFORMED[name], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == CONTENT_TYPE
    problem = answer.json()
    assert problem["code"] == "refused"
    assert "does not know" not in problem["detail"]
    assert len(answer.content) < 10_000


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_100_megabytes_is_refused_before_it_is_read(announced: bool, served: Served) -> None:
    length = "Content-Length: 100000000" if announced else "Transfer-Encoding: chunked"
    head = f"POST /v1/vms HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode()
    piece = bytes(1 << 16) if announced else b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    taken = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
        sender.settimeout(ANSWER_LIMIT_S)
        sender.connect(str(served.socket))
        sender.sendall(head)
        try:
            while taken < 100_000_000:
                taken += sender.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        said = sender.recv(65536)
    assert said.startswith(b"HTTP/1.1 413" if announced else b"HTTP/1.1 411"), said
    assert taken < 4_000_000
