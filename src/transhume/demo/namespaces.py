"""Network namespaces and the wires between them, made with iproute2.

The `ip` and `tc` programs are called rather than a netlink library, because the lab is used from threads
and from inside running event loops alike, and a program works in both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transhume.model.errors import KernelError, TimedOut

INTERFACE = "eth0"
"""The name of the wire that each host has."""

SECOND_INTERFACE = "eth1"
"""The name of the second one, where there are two."""

_NAMESPACES_DIR = Path("/run/netns")
_NOBODY_MAC = "02:00:00:00:00:fe"
_QUEUE_MS = 50
_END_LIMIT_S = 10.0


@dataclass(frozen=True)
class Shape:
    """What a wire is like in each direction: None means as fast as the kernel is, and without delay."""

    rate_bits_s: int | None = None
    delay_ms: float | None = None


def ip(*arguments: str, namespace: str | None = None) -> str:
    """Run one `ip` command. Raises `KernelError` with its words."""
    return _run("ip", arguments, namespace)


def tc(*arguments: str, namespace: str | None = None) -> str:
    """Run one `tc` command. Raises `KernelError` with its words."""
    return _run("tc", arguments, namespace)


def create(name: str) -> None:
    ip("netns", "add", name)
    ip("link", "set", "lo", "up", namespace=name)


def exists(name: str) -> bool:
    return (_NAMESPACES_DIR / name).exists()


def remove(name: str) -> None:
    """End every process that runs inside and remove the namespace with its wires, if it exists.

    Only what was started inside can be there: a network namespace is entered on purpose. Raises
    `TimedOut` when a process does not end; the namespace stays then.
    """
    if not exists(name):
        return
    end_processes(name)
    ip("netns", "delete", name)


def command_inside(name: str, command: Sequence[str]) -> list[str]:
    """The command that runs `command` inside: it becomes the very process, so its pid is the same."""
    return ["nsenter", f"--net={_NAMESPACES_DIR / name}", "--", *command]


def join_two(first: str, second: str, interface: str = INTERFACE) -> None:
    """A wire from one host straight to another."""
    ip("link", "add", interface, "type", "veth", "peer", "name", interface, "netns", second, namespace=first)


def join_by_switch(hosts: Sequence[str], switch: str) -> None:
    """A wire from each host to a bridge in the namespace `switch`, which must exist."""
    ip("link", "add", "bridge", "type", "bridge", namespace=switch)
    ip("link", "set", "bridge", "up", namespace=switch)
    for number, host in enumerate(hosts):
        port = f"port{number}"
        ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host, namespace=switch)
        ip("link", "set", port, "master", "bridge", "up", namespace=switch)


def set_address(host: str, address: str, interface: str = INTERFACE) -> None:
    ip("address", "add", f"{address}/24", "dev", interface, namespace=host)
    ip("link", "set", interface, "up", namespace=host)


def take_down(host: str, interface: str) -> None:
    """Switch an interface off, as a person or a driver would: the kernel knows, and uses it no more."""
    ip("link", "set", interface, "down", namespace=host)


def bring_up(host: str, interface: str) -> None:
    """The end of `take_down`. The addresses were kept."""
    ip("link", "set", interface, "up", namespace=host)


def shape(host: str, wanted: Shape) -> None:
    """Make what `host` sends slow and late. Raises `KernelError` when the kernel lacks tbf or netem."""
    # A wire that was never shaped has no queue of ours to remove.
    with suppress(KernelError):
        tc("qdisc", "delete", "dev", INTERFACE, "root", namespace=host)
    parent = ["root"]
    if wanted.delay_ms is not None:
        delay = ["netem", "delay", f"{wanted.delay_ms}ms", "limit", "100000"]
        tc("qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", *delay, namespace=host)
        parent = ["parent", "1:1"]
    if wanted.rate_bits_s is not None:
        # The bucket must hold what the rate sends between two timer ticks, and one segment of 64 KiB.
        burst_bytes = max(65536, wanted.rate_bits_s // 8 // 100)
        bucket = ["tbf", "rate", f"{wanted.rate_bits_s}bit", "burst", str(burst_bytes)]
        queue = ["latency", f"{_QUEUE_MS}ms"]
        tc("qdisc", "add", "dev", INTERFACE, *parent, "handle", "2:", *bucket, *queue, namespace=host)


def lose_everything(host: str, to_address: str, interface: str = INTERFACE) -> None:
    """From now on what `host` sends to `to_address` is lost without a word, as in a broken switch.

    The frames are addressed to nobody. Taking the interface down would be noticed at once.
    """
    neighbour = ["neighbour", "replace", to_address, "lladdr", _NOBODY_MAC, "dev", interface]
    ip(*neighbour, "nud", "permanent", namespace=host)


def lose_nothing(host: str, to_address: str, interface: str = INTERFACE) -> None:
    """The end of `lose_everything`: the true address is asked for again."""
    with suppress(KernelError):  # nothing was lost before
        ip("neighbour", "delete", to_address, "dev", interface, namespace=host)


def end_processes(name: str) -> None:
    """Kill every process inside, and wait until none is left. Raises `TimedOut` when one stays."""
    deadline_s = time.monotonic() + _END_LIMIT_S
    while pids := list(processes(name)):
        for pid in pids:
            _kill_inside(name, pid)
        if time.monotonic() > deadline_s:
            raise TimedOut(
                f"processes {pids} in network namespace {name} do not end: see /proc/{pids[0]}/stack"
            )
        time.sleep(0.01)


def processes(name: str) -> Iterator[int]:
    """The process ids inside; what ended and only waits for its parent is not counted."""
    inside = (_NAMESPACES_DIR / name).stat()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and _is_inside(int(entry.name), inside):
            yield int(entry.name)


def _is_inside(pid: int, inside: os.stat_result) -> bool:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:  # it has ended
        return False
    return (status.st_dev, status.st_ino) == (inside.st_dev, inside.st_ino)


def _kill_inside(name: str, pid: int) -> None:
    """Kill one process, and never another one that got its number in the meantime."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _is_inside(pid, (_NAMESPACES_DIR / name).stat()):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def _run(program: str, arguments: Sequence[str], namespace: str | None) -> str:
    command = [program, *(["-netns", namespace] if namespace else []), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise KernelError(f"{program} is missing: apt install iproute2") from error
    if done.returncode != 0:
        raise KernelError(
            f"'{' '.join(command)}' failed: {done.stderr.strip()}"
            " (network namespaces, veth and tc need root and a kernel that has them)"
        )
    return done.stdout
