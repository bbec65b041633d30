"""A real etcd cluster on loopback, whose members can be killed and started again one by one."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ETCD = shutil.which("etcd")
ADDRESS = "127.0.0.1"
READY_LIMIT_S = 40.0
SKIP_REASON = "etcd is not installed: apt install etcd-server"


@dataclass
class Member:
    """One member: its ports and its process, None while it is dead."""

    name: str
    client_port: int
    peer_port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None


@dataclass
class EtcdCluster:
    """Members that are started with `start` and ended, whatever happens, by `cluster` below."""

    folder: Path
    members: list[Member]
    options: Sequence[str] = ()
    tls: ssl.SSLContext | None = None
    """How this file's own questions are asked; its members speak TLS by `options`."""

    stopped: set[str] = field(default_factory=set)

    @property
    def endpoints(self) -> str:
        """As a store's URL has them."""
        return ",".join(f"{ADDRESS}:{member.client_port}" for member in self.members)

    def url(self, prefix: str) -> str:
        """The URL of a store of its own in this cluster."""
        return f"etcd://{self.endpoints}/{prefix}"

    def start(self, *members: Member) -> None:
        """Start these members, on whatever is in their folders."""
        peers = ",".join(f"{one.name}=http://{ADDRESS}:{one.peer_port}" for one in self.members)
        for member in members:
            client = f"{'https' if self.tls else 'http'}://{ADDRESS}:{member.client_port}"
            peer = f"http://{ADDRESS}:{member.peer_port}"
            assert ETCD is not None
            with (self.folder / f"{member.name}.log").open("ab") as log:
                member.process = subprocess.Popen(
                    [
                        # Members end with the tests even if these are killed and clean nothing up.
                        *("setpriv", "--pdeathsig", "KILL", ETCD),
                        *("--name", member.name, "--data-dir", str(member.folder)),
                        *("--listen-client-urls", client, "--advertise-client-urls", client),
                        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                        *("--initial-cluster", peers, *self.options),
                    ],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def kill(self, *members: Member) -> None:
        """End these members as a loss of power would, and wait until they are gone."""
        for member in members:
            if member.process is not None:
                member.process.kill()
        for member in members:
            if member.process is not None:
                member.process.wait()
            member.process = None
            self.stopped.discard(member.name)

    def stop(self, member: Member) -> None:
        """Let a member stand still: its port takes connections and nobody answers."""
        assert member.process is not None
        member.process.send_signal(signal.SIGSTOP)
        self.stopped.add(member.name)

    def wait_ready(self) -> None:
        """Wait until every living member knows a leader and answers reads that need one."""
        deadline_s = time.monotonic() + READY_LIMIT_S
        for member in self.members:
            while member.process is not None and not self._is_ready(member):
                assert time.monotonic() < deadline_s, f"{member.name} is not ready: {self._tail(member)}"
                assert member.process.poll() is None, f"{member.name} has ended: {self._tail(member)}"
                time.sleep(0.05)

    def leader(self) -> Member:
        """The member that leads now."""
        for member in self.members:
            if member.process is not None and member.name not in self.stopped:
                status = self._ask(member, "/v3/maintenance/status", {})
                if status and status.get("leader") == status["header"]["member_id"]:
                    return member
        raise AssertionError("no member leads")

    def mend(self) -> None:
        """Bring every member back and wait until the cluster is whole."""
        for member in self.members:
            if member.name in self.stopped and member.process is not None:
                member.process.send_signal(signal.SIGCONT)
        self.stopped.clear()
        self.start(*(member for member in self.members if member.process is None))
        self.wait_ready()

    def _tail(self, member: Member) -> str:
        return (self.folder / f"{member.name}.log").read_text()[-2000:]

    def _is_ready(self, member: Member) -> bool:
        return self._ask(member, "/v3/kv/range", {"key": "AA=="}) is not None

    def _ask(self, member: Member, path: str, request: dict[str, str]) -> dict[str, Any] | None:
        if self.tls is None:
            connection = http.client.HTTPConnection(ADDRESS, member.client_port, timeout=2.0)
        else:
            connection = http.client.HTTPSConnection(
                ADDRESS, member.client_port, timeout=2.0, context=self.tls
            )
        try:
            connection.request("POST", path, json.dumps(request))
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if answer.status != 200:
            return None
        parsed: dict[str, Any] = json.loads(body)
        return parsed


@contextlib.contextmanager
def cluster(size: int, *options: str, tls: ssl.SSLContext | None = None) -> Iterator[EtcdCluster]:
    """A cluster of `size` members in a folder of its own; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="th-etcd-", dir="/tmp"))
    ports = _free_ports(2 * size)
    members = [
        Member(f"m{number}", ports[2 * number], ports[2 * number + 1], folder / f"m{number}")
        for number in range(size)
    ]
    made = EtcdCluster(folder, members, options, tls)
    try:
        made.start(*members)
        made.wait_ready()
        yield made
    finally:
        made.kill(*members)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((ADDRESS, 0))
        return [probe.getsockname()[1] for probe in probes]
