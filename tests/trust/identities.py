"""Authorities, and hosts with their certificates, made in no time."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography import x509

from transhume.trust.certificates import HOST_LIFETIME_S, Authority, issue, make_authority, make_request
from transhume.trust.credentials import Credentials
from transhume.trust.files import IdentityFiles


def new_authority(farm: str = "f1", now_s: float | None = None) -> Authority:
    return make_authority(farm, time.time() if now_s is None else now_s)


def credentials(
    folder: Path,
    authority: Authority,
    host: str,
    *,
    controller: bool = False,
    now_s: float | None = None,
    lifetime_s: float = HOST_LIFETIME_S,
    trusting: Authority | None = None,
) -> Credentials:
    """The credentials of `host`, whose files are put into `folder`, which is made.

    `now_s` is the authority's clock as it signs; `trusting` is an authority to trust that is not the signer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key_pem, request_pem = make_request()
    issued = issue(
        authority, host, request_pem, time.time() if now_s is None else now_s, controller, lifetime_s
    )
    files = IdentityFiles(folder)
    files.write(key_pem, issued.certificate_pem, (trusting or authority).certificate_pem)
    return Credentials(files)


def serial_of(certificate_pem: str) -> str:
    return format(x509.load_pem_x509_certificate(certificate_pem.encode()).serial_number, "x")
