"""TLS 1.3 with certificates at both ends, from the files of this host.

What every connection between hosts has in common: TLS 1.3 alone; the farm's authority and no other; the name
of the certificate at the other end is demanded by whoever connects. Errors come back in words, see `refusal`.
"""

from __future__ import annotations

import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from transhume.model.errors import HostLost, PeerProtocolError, Refused, TranshumeError, Unauthorized
from transhume.trust.files import IdentityFiles

_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class ClientTls:
    """How to connect: `server_name` is what the other end's certificate must say."""

    context: ssl.SSLContext
    server_name: str


class Credentials:
    """This host's key and certificate, as they are in the state folder at the moment of use.

    A renewal replaces the files; connections made after it use the new ones, without a restart of anything.
    Threads: each method may be called from any thread.
    """

    def __init__(self, files: IdentityFiles) -> None:
        self._files = files
        self._client: tuple[_Stamp, ssl.SSLContext] | None = None
        self._server: tuple[_Stamp, ssl.SSLContext] | None = None

    def client(self, server_name: str) -> ClientTls:
        """To call whoever has a certificate for `server_name`. Raises `Refused` when the files are broken."""
        stamp = _stamp(self._files)
        if self._client is None or self._client[0] != stamp:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _set_up(context, self._files.authority)
            _load(context, self._files.identity)
            self._client = stamp, context
        return ClientTls(self._client[1], server_name)

    def server(self) -> ssl.SSLContext:
        """To be called. Callers may come without a certificate: who may do what is decided behind.

        The same object each time, with the newest certificate in it. Raises as `client`.
        """
        stamp = _stamp(self._files)
        if self._server is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            _set_up(context, self._files.authority)
            context.verify_mode = ssl.CERT_OPTIONAL
            # Nobody resumes a session; a ticket that comes late would look like an answer to nothing.
            context.num_tickets = 0
            _load(context, self._files.identity)
            self._server = stamp, context
        elif self._server[0] != stamp:
            _load(self._server[1], self._files.identity)
            self._server = stamp, self._server[1]
        return self._server[1]


def joining(authority_pem: str, server_name: str) -> ClientTls:
    """For a server that has no certificate yet, and knows the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _set_up(context, None)
    try:
        context.load_verify_locations(cadata=authority_pem)
    except ssl.SSLError as error:
        raise PeerProtocolError("the certificate of the farm's authority cannot be read") from error
    return ClientTls(context, server_name)


def unproven() -> ClientTls:
    """Believes whoever answers. Only to be told what is checked by other means, and never to tell."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _set_up(context, None)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return ClientTls(context, "")


def refusal(error: ssl.SSLError, peer: str) -> TranshumeError:
    """What a handshake, or the first answer after it, failed of, in words. `peer` names the other end."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Unauthorized(_doubt(error, peer))
    words = _REFUSALS.get(error.reason or "")
    if words is not None:
        return Unauthorized(f"{peer} {words}")
    if error.reason in _NOT_TLS:
        return PeerProtocolError(f"{peer} does not speak TLS 1.3 ({error.reason}); is it of another release?")
    if error.reason in _DAMAGED:
        return HostLost(
            f"what {peer} and this host sent was damaged on its way, or forged; TLS has noticed it"
        )
    return HostLost(f"{peer} does not answer ({error.reason or error})")


_NOT_YET_VALID = 9
_EXPIRED = 10
_HOSTNAME_MISMATCH = 62
"""OpenSSL's X509_V_ERR_..."""


def _doubt(error: ssl.SSLCertVerificationError, peer: str) -> str:
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if error.verify_code == _NOT_YET_VALID:
        return f"the certificate of {peer} is not valid yet: is the clock here, {now}, behind? Set it right"
    if error.verify_code == _EXPIRED:
        return (
            f"the certificate of {peer} has expired: is the clock here, {now}, ahead? If it is right, "
            "that host must join again"
        )
    if error.verify_code == _HOSTNAME_MISMATCH:
        return f"{peer} shows the certificate of another host; does the address still belong to it?"
    return f"{peer} shows a certificate that is not of this farm ({error.verify_message})"


_REFUSALS = {
    "TLSV1_ALERT_UNKNOWN_CA": "does not take this host's certificate: it is of another farm",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "does not take this host's certificate: it has expired by that host's clock; "
        "compare the clocks, and join again if they are right"
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "does not take this host's certificate: it is not valid yet by that host's clock, or broken; "
        "compare the clocks"
    ),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not take this host's certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "demands a certificate, and this host showed none",
}

_DAMAGED = frozenset({"DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "SSLV3_ALERT_BAD_RECORD_MAC"})

_NOT_TLS = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "RECORD_LAYER_FAILURE",
        "UNSUPPORTED_PROTOCOL",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "PACKET_LENGTH_TOO_LONG",
        "BAD_RECORD_TYPE",
        "UNEXPECTED_MESSAGE",
    }
)


def _set_up(context: ssl.SSLContext, authority: Path | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    if authority is None:
        return
    try:
        context.load_verify_locations(cafile=authority)
    except OSError as error:
        raise _broken(authority, error) from error


def _load(context: ssl.SSLContext, identity: Path) -> None:
    try:
        # The empty password keeps OpenSSL from asking at the terminal.
        context.load_cert_chain(identity, password="")
    except OSError as error:
        raise _broken(identity, error) from error


def _stamp(files: IdentityFiles) -> _Stamp:
    try:
        found = os.stat(files.identity)
    except OSError as error:
        raise _broken(files.identity, error) from error
    return found.st_ino, found.st_mtime_ns, found.st_size


def _broken(path: Path, error: OSError) -> Refused:
    # A member cannot mend it alone: only the controller signs.
    return Refused(
        f"{path} cannot be used ({error.strerror or error}); it proves who this host is: let it join again"
    )
