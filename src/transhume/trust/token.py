"""The token that lets one server join: a secret, and what the authority must look like.

    th1.<secret>.<fingerprint of the authority's certificate>

Whoever joins compares the fingerprint first: an impostor at the controller's address never hears the secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import ssl
from dataclasses import dataclass

from transhume.model.errors import PeerProtocolError, Refused

_VERSION = "th1"
_SECRET_BYTES = 24
_FINGERPRINT_BYTES = 32
_SECRET_CHARACTERS = 32


@dataclass(frozen=True)
class Token:
    """`secret` is what is told to the controller; the store keeps its hash alone."""

    secret: str
    fingerprint: bytes

    @classmethod
    def make(cls, fingerprint: bytes) -> Token:
        return cls(secrets.token_urlsafe(_SECRET_BYTES), fingerprint)

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises `Refused` for what is no token, so that a part of one that was copied is told at once."""
        version, _, rest = text.partition(".")
        secret, _, encoded = rest.partition(".")
        try:
            fingerprint = base64.urlsafe_b64decode(encoded + "=")
        except (binascii.Error, ValueError):
            fingerprint = b""
        whole = len(fingerprint) == _FINGERPRINT_BYTES and len(secret) == _SECRET_CHARACTERS
        if version != _VERSION or not whole:
            raise Refused(
                "this is not a whole token; `transhume token` on a host of the farm prints a command with one"
            )
        return cls(secret, fingerprint)

    def __str__(self) -> str:
        encoded = base64.urlsafe_b64encode(self.fingerprint).decode().rstrip("=")
        return f"{_VERSION}.{self.secret}.{encoded}"

    def __repr__(self) -> str:
        return "Token(...)"  # a traceback must not tell it


def hash_of(secret: str) -> str:
    """What the store keeps instead of the secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def fingerprint(certificate_pem: str) -> bytes:
    """The SHA-256 of a certificate: 32 bytes that stand for it."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate_pem.strip() + "\n")).digest()
    except ValueError as error:
        raise PeerProtocolError("what should be the authority's certificate is none") from error


def is_certificate_of(certificate_pem: str, expected: bytes) -> bool:
    """Whether a certificate is the one with this fingerprint."""
    return hmac.compare_digest(fingerprint(certificate_pem), expected)
