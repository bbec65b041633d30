"""Making keys, requests and certificates. Daemons and `join` do; movers only use what was made.

All keys are on the curve P-256, which every TLS 1.3 has, and certificates are valid from a day before they
were made: a host whose clock is hours behind takes a fresh one.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from transhume.model.errors import Refused
from transhume.trust.names import CONTROLLER_NAME, MAX_PEM_BYTES, server_name

HOST_LIFETIME_S = 30 * 86400
AUTHORITY_LIFETIME_S = 20 * 365 * 86400
BACKDATED_S = 86400

_ORGANIZATION = "Transhume farm"


@dataclass(frozen=True)
class Authority:
    """A farm's authority: whoever has its key can make hosts."""

    key_pem: str = field(repr=False)
    certificate_pem: str


@dataclass(frozen=True)
class Issued:
    """A certificate that was made; `serial` in hex, as `Peer` has it."""

    certificate_pem: str
    serial: str
    expires_at_s: float


def make_authority(farm: str, now_s: float) -> Authority:
    """A new authority for the farm with the id `farm`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(farm)
    builder = _certificate(name, name, key.public_key(), now_s, AUTHORITY_LIFETIME_S)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    signed = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(_key_pem(key), _certificate_pem(signed))


def make_request() -> tuple[str, str]:
    """A new key, and the request for a certificate that proves its possession; both as PEM.

    The request names nobody: whose certificate it becomes is decided by whoever signs it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM).decode()


def issue(
    authority: Authority,
    host: str,
    request_pem: str,
    now_s: float,
    controller: bool,
    lifetime_s: float = HOST_LIFETIME_S,
) -> Issued:
    """Sign a request for `host`. Raises `Refused` for what is no sound request with a P-256 key."""
    public_key = _requested_key(request_pem)
    signer = serialization.load_pem_private_key(authority.key_pem.encode(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    root = x509.load_pem_x509_certificate(authority.certificate_pem.encode())
    names = [server_name(host), *([CONTROLLER_NAME] if controller else [])]
    builder = _certificate(x509.Name([]), root.subject, public_key, now_s, lifetime_s)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    signed = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # An empty subject makes the alternative names the critical ones.
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=True)
        .add_extension(_usage_at_both_ends(), critical=False)
        .add_extension(identifier, critical=False)
        .sign(signer, hashes.SHA256())
    )
    return Issued(
        _certificate_pem(signed),
        format(signed.serial_number, "x"),
        signed.not_valid_after_utc.timestamp(),
    )


@dataclass(frozen=True)
class Held:
    """What a certificate in a file says about itself."""

    names: Sequence[str]
    issued_at_s: float
    expires_at_s: float

    def due_at_s(self) -> float:
        """When to renew it: two thirds of its life are over."""
        return self.issued_at_s + (self.expires_at_s - self.issued_at_s) * 2 / 3


def read_held(identity_pem: str) -> Held | None:
    """The certificate in the text of `identity.pem`, or None when there is none to be read."""
    try:
        found = x509.load_pem_x509_certificate(identity_pem.encode())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    return Held(
        names=tuple(names.get_values_for_type(x509.DNSName)),
        issued_at_s=found.not_valid_before_utc.timestamp() + BACKDATED_S,
        expires_at_s=found.not_valid_after_utc.timestamp(),
    )


def is_signed_by(identity_pem: str, authority_pem: str) -> bool:
    """Whether the authority signed the certificate in the text of `identity.pem`."""
    try:
        root = x509.load_pem_x509_certificate(authority_pem.encode())
        x509.load_pem_x509_certificate(identity_pem.encode()).verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _requested_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    if len(request_pem) > MAX_PEM_BYTES:
        raise Refused("the request for a certificate is too large")
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        sound = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Refused("the request for a certificate cannot be read; is it of another release?") from error
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused("the request for a certificate must prove the possession of a key on the curve P-256")
    return key


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now_s: float,
    lifetime_s: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_s - BACKDATED_S))
        .not_valid_after(_time(now_s + lifetime_s))
    )


def _usage_at_both_ends() -> x509.ExtendedKeyUsage:
    return x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


def _name(farm: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, farm),
        ]
    )


def _time(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).replace(microsecond=0)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _certificate_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
