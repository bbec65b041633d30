"""The network: ports, the interface towards the farm, and whether large packets pass."""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from transhume.model.finding import Finding, error, note, ok, warning

SMALLEST_MTU = 1280
LARGEST_PACKET_BYTES = 65535
"""Of IP; the loopback's MTU is larger by one."""

FEW_PORTS = 2000
PROBE_BYTES = 32 << 10
PROBE_LIMIT_S = 2.0
CONNECT_LIMIT_S = 3.0
POLL_S = 0.01

_SIOCGIFADDR = 0x8915
_SIOCGIFMTU = 0x8921
_IP_MTU = 14
_IPV6_MTU = 24

_NETWORKS = Path("/sys/class/net")
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class PortFacts:
    """`refusal` is why nothing can listen at `address`:`port`, empty when it can. `first_free` and
    `last_free` bound the ports that the kernel chooses from.
    """

    address: str
    port: int
    refusal: str
    first_free: int
    last_free: int


@dataclass(frozen=True)
class WayFacts:
    """The way to the controller. `refusal` is why it cannot be connected to. `large_passed` is None when that
    could not be found out; `path_mtu` is the kernel's knowledge after large packets were sent, 0 if unknown.
    """

    controller: str
    interface: str = ""
    interface_mtu: int = 0
    path_mtu: int = 0
    large_passed: bool | None = None
    refusal: str = ""


def gather_ports(address: str, port: int) -> PortFacts:
    """Try to listen, for a moment."""
    first, last = (int(word) for word in _PORT_RANGE.read_text().split())
    return PortFacts(address, port, _listen_refusal(address, port), first, last)


def judge_ports(facts: PortFacts, *, daemon_runs: bool = False) -> list[Finding]:
    where = f"{facts.address} port {facts.port}" if facts.address else f"port {facts.port}"
    findings = []
    if daemon_runs:
        findings.append(ok("ports", f"this host's daemon answers at {where}"))
    elif facts.refusal:
        findings.append(
            error(
                "ports",
                f"the daemon cannot listen at {where}: {facts.refusal}",
                "end what listens there (`ss -ltnp`; another daemon?), or choose other values for --port and "
                "--address (an address of this machine)",
            )
        )
    else:
        findings.append(ok("ports", f"{where} is free"))
    count = facts.last_free - facts.first_free + 1
    if count < FEW_PORTS:
        findings.append(
            warning(
                "ports",
                f"the kernel has {count} ports to choose from, and each migration needs one",
                "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
            )
        )
    if facts.first_free <= facts.port <= facts.last_free:
        findings.append(
            note(
                "ports",
                f"port {facts.port} is among those that the kernel gives to others ({facts.first_free} to "
                f"{facts.last_free})",
                f"sysctl -w net.ipv4.ip_local_reserved_ports={facts.port}",
            )
        )
    return findings


def gather_way(target: tuple[str, int]) -> WayFacts:
    """Connect to the controller, and send it what fills whole packets. Blocks, for a few seconds at most.

    What is sent is no request: the far kernel's acknowledgement tells that large packets arrive, whatever the
    program above it thinks of them.
    """
    name = f"{target[0]} port {target[1]}"
    try:
        connection = socket.create_connection(target, CONNECT_LIMIT_S)
    except OSError as failure:
        return WayFacts(name, refusal=failure.strerror or str(failure))
    with connection:
        interface, mtu = _interface_of(connection.getsockname()[0])
        mtu = min(mtu, LARGEST_PACKET_BYTES)
        passed = _large_pass(connection)
        level, option = (
            (socket.IPPROTO_IPV6, _IPV6_MTU)
            if connection.family is socket.AF_INET6
            else (socket.IPPROTO_IP, _IP_MTU)
        )
        try:
            path_mtu = connection.getsockopt(level, option)
        except OSError:
            path_mtu = 0  # the peer has closed it already
    return WayFacts(name, interface, mtu, path_mtu, passed)


def judge_way(facts: WayFacts) -> list[Finding]:
    if facts.refusal:
        return [
            error(
                "network",
                f"the controller at {facts.controller} cannot be reached: {facts.refusal}",
                "look at the address, the daemon there (`transhume status`) and the firewalls on the way",
            )
        ]
    through = f"{facts.interface or 'an interface'} (MTU {facts.interface_mtu or 'unknown'})"
    if facts.large_passed is False:
        return [
            error(
                "mtu",
                f"large packets do not arrive at the controller through {through}, though small ones do",
                "set the same MTU on both hosts and on every switch and tunnel between them",
            )
        ]
    if 0 < facts.path_mtu < min(facts.interface_mtu, SMALLEST_MTU):
        return [
            warning(
                "mtu",
                f"the way to the controller carries packets of {facts.path_mtu} bytes only",
                "look at the MTU of the tunnels between the hosts",
            )
        ]
    if 0 < facts.path_mtu < facts.interface_mtu:
        return [
            warning(
                "mtu",
                f"{through} sends larger packets than the way to the controller carries ({facts.path_mtu} "
                "bytes)",
                "set the same MTU on both hosts and on what is between them",
            )
        ]
    if facts.large_passed is None:
        return [note("mtu", f"through {through}; the controller ended the trial with large packets early")]
    return [ok("mtu", f"large packets reach the controller through {through}")]


def bridges(networks: Path = _NETWORKS) -> tuple[str, ...]:
    """The names of this machine's bridges. `networks` may show those of another network namespace too."""
    here = {name for _, name in socket.if_nameindex()}
    found = [path.parent.name for path in networks.glob("*/bridge")]
    return tuple(sorted(name for name in found if name in here or networks != _NETWORKS))


def judge_bridges(names: tuple[str, ...]) -> list[Finding]:
    if names:
        return [ok("bridges", f"bridges: {', '.join(names)}")]
    return [note("bridges", "this host has no bridge; VMs have no networks in this release")]


def _listen_refusal(address: str, port: int) -> str:
    try:
        (family, kind, protocol, _, where), *_ = socket.getaddrinfo(
            address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            # Two may bind with SO_REUSEADDR; only one can listen.
            listening.listen(1)
    except OSError as failure:
        if failure.errno == errno.EADDRNOTAVAIL:
            return "that is no address of this machine"
        return failure.strerror or str(failure)
    return ""


def _interface_of(address: str) -> tuple[str, int]:
    """The interface that has an address, with its MTU; an empty name and 0 when none is found.

    The kernel is asked about the names in this process's own network namespace: /sys may show another's.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            if address in (_ipv4_of(asking, name), *_ipv6_of(name)):
                return name, _mtu_of(asking, name)
    return "", 0


def _ipv4_of(asking: socket.socket, name: str) -> str:
    try:
        answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("16s24x", name.encode()))
    except OSError:
        return ""
    return socket.inet_ntop(socket.AF_INET, answer[20:24])


def _ipv6_of(name: str) -> list[str]:
    try:
        lines = Path("/proc/self/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[5] == name]


def _mtu_of(asking: socket.socket, name: str) -> int:
    (mtu,) = struct.unpack_from(
        "=i", fcntl.ioctl(asking, _SIOCGIFMTU, struct.pack("16s24x", name.encode())), 16
    )
    return int(mtu)


def _large_pass(connection: socket.socket) -> bool | None:
    """Whether the far kernel acknowledged whole packets; None when the connection ended before it could."""
    # The begin of a request that never ends, so that a server waits for more of it.
    data = b"GET / HTTP/1.1\r\nX: ".ljust(PROBE_BYTES, b"x")
    connection.setblocking(False)
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    give_up_s = time.monotonic() + PROBE_LIMIT_S
    sent_bytes = 0
    try:
        while time.monotonic() < give_up_s:
            if sent_bytes < len(data) and poll.poll(0):
                sent_bytes += connection.send(data[sent_bytes:])
            (unacknowledged_bytes,) = struct.unpack(
                "=i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4)
            )
            if sent_bytes - unacknowledged_bytes >= len(data):
                return True
            time.sleep(POLL_S)  # the kernel tells nobody when an acknowledgement comes
    except (ConnectionError, BrokenPipeError):
        return None
    return False
