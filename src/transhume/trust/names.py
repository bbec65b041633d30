"""The names that the farm's certificates carry.

A certificate names its host as `NAME.host.transhume.internal`, and with `controller.transhume.internal`
that the controller may be there. Nobody looks these names up: they are what a caller demands of the
certificate that it is shown, so that the TLS library compares them in its handshake, before anything is said.
(`internal` is reserved for private use, so they can be nobody's real names.)
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from typing import Any

from transhume.model.vm import NAME_PATTERN

CONTROLLER_NAME = "controller.transhume.internal"
_HOST_SUFFIX = ".host.transhume.internal"

MAX_PEM_BYTES = 8 << 10
"""A certificate, or the request for one, that is larger is none of ours."""


def server_name(host: str) -> str:
    """What a caller demands that the certificate of `host` says."""
    return f"{host}{_HOST_SUFFIX}"


@dataclass(frozen=True)
class Peer:
    """Who has shown a certificate that the farm's authority signed; `serial` is its number, in hex."""

    host: str
    controller: bool
    serial: str


def peer_of(connection: ssl.SSLObject | ssl.SSLSocket) -> Peer | None:
    """Who is at the other end, or None for a caller without a certificate.

    Only for connections of `Credentials`, whose handshake has verified the certificate.
    """
    found = connection.getpeercert()
    return _peer(found) if found else None


def _peer(certificate: dict[str, Any]) -> Peer | None:
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    hosts = [name.removesuffix(_HOST_SUFFIX) for name in names if name.endswith(_HOST_SUFFIX)]
    if len(hosts) != 1 or not re.fullmatch(NAME_PATTERN, hosts[0]):
        return None
    serial = format(int(str(certificate["serialNumber"]), 16), "x")
    return Peer(hosts[0], CONTROLLER_NAME in names, serial)
