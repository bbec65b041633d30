"""A cluster that speaks TLS and asks its clients for certificates."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.store.etcd_cluster import ADDRESS, ETCD, SKIP_REASON, EtcdCluster, cluster

from transhume.model.errors import StoreError, StoreUnavailable
from transhume.store.address import open_store


@dataclass(frozen=True)
class Certificates:
    """PEM files of one authority and of one certificate that it has signed, for this address."""

    ca: Path
    cert: Path
    key: Path

    @property
    def query(self) -> str:
        return f"?ca={self.ca}&cert={self.cert}&key={self.key}"


def make_certificates(folder: Path) -> Certificates:
    folder.mkdir()
    made = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    _openssl(
        "req", "-x509", *new_key, "-subj", "/CN=ca", "-keyout", str(folder / "ca.key"), "-out", str(made.ca)
    )
    request = ("-subj", "/CN=etcd", "-keyout", str(made.key), "-out", str(made.cert))
    names = ("-addext", f"subjectAltName=IP:{ADDRESS}", "-addext", "extendedKeyUsage=serverAuth,clientAuth")
    signer = ("-CA", str(made.ca), "-CAkey", str(folder / "ca.key"))
    _openssl("req", "-x509", *new_key, *request, *names, "-addext", "basicConstraints=CA:FALSE", *signer)
    return made


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def secured(certificates: Certificates) -> Iterator[EtcdCluster]:
    if ETCD is None:
        pytest.skip(SKIP_REASON)
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.load_cert_chain(certificates.cert, certificates.key)
    options = (
        *("--cert-file", str(certificates.cert), "--key-file", str(certificates.key)),
        *("--trusted-ca-file", str(certificates.ca), "--client-cert-auth"),
    )
    with cluster(1, *options, tls=context) as made:
        yield made


def url(secured: EtcdCluster, query: str) -> str:
    return f"etcds://{secured.endpoints}/farm{query}"


async def test_who_has_a_certificate_is_let_in(secured: EtcdCluster, certificates: Certificates) -> None:
    store = await open_store(url(secured, certificates.query))
    for number in range(3):
        assert await store.transact(puts={"a": f"{number}".encode()}) is not None
    entry = await store.get("a")
    await store.close()
    assert entry is not None
    assert entry.value == b"2"


async def test_who_has_none_is_not(secured: EtcdCluster, certificates: Certificates) -> None:
    with pytest.raises(StoreUnavailable, match=r"(?i)certificate|closed the connection|broke"):
        await open_store(url(secured, f"?ca={certificates.ca}"))


async def test_a_foreign_cluster_is_not_trusted(secured: EtcdCluster, tmp_path: Path) -> None:
    foreign = make_certificates(tmp_path / "foreign")
    with pytest.raises(StoreUnavailable, match="its certificate is not valid"):
        await open_store(url(secured, foreign.query))


async def test_plain_words_to_a_secured_cluster_are_an_error(secured: EtcdCluster) -> None:
    with pytest.raises(StoreUnavailable):
        await open_store(secured.url("farm"))


async def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("not a certificate")
    for name in ("bad.pem", "none.pem"):
        with pytest.raises(StoreError, match=f"certificates of the farm's store .*{name}"):
            await open_store(f"etcds://127.0.0.1/farm?ca={tmp_path}/{name}")
