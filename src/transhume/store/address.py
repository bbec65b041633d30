"""Which store a farm has, as its operator writes it, and how it is opened.

    sqlite:///var/lib/transhume/farm.sqlite      one file; three slashes, because the path is absolute
    etcd://10.0.0.1:2379,10.0.0.2:2379/farm      a cluster, and where in it this farm's records lie
    etcds://10.0.0.1/farm?ca=/ca.pem&cert=/me.pem&key=/me.key
                                                 the same over TLS: the cluster's CA, our certificate

Without a port etcd's 2379 is meant, an address in brackets is IPv6's, and without a path etcd's records lie
under /transhume. Every part of a URL that is not understood is refused, never passed over.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from transhume.model.errors import Refused, StoreError
from transhume.store.election import Election, LocalElection
from transhume.store.etcd import EtcdStore
from transhume.store.etcd_election import EtcdElection
from transhume.store.etcd_gateway import EtcdGateway
from transhume.store.etcd_http import Endpoint
from transhume.store.interface import Store
from transhume.store.sqlite import SqliteStore
from transhume.store.transfer import demand_whole

DEFAULT_PORT = 2379
DEFAULT_PREFIX = "/transhume"
FORMS = "sqlite:///path/to/farm.sqlite or etcd://host:2379,host:2379/prefix"

_ENDPOINT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._-]+)+")
_TLS_OPTIONS = ("ca", "cert", "key")


@dataclass(frozen=True)
class SqliteAddress:
    """A store in one file."""

    path: Path


@dataclass(frozen=True)
class EtcdAddress:
    """A store in a cluster. `tls` has the paths of `ca`, `cert` and `key`, if given; None is plain HTTP."""

    endpoints: tuple[Endpoint, ...]
    prefix: str
    tls: tuple[tuple[str, str], ...] | None = None


def parse_address(url: str) -> SqliteAddress | EtcdAddress:
    """What `url` names. Raises `Refused` and says which part is wrong."""
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and separator:
        return _parse_sqlite(url, rest)
    if scheme in ("etcd", "etcds") and separator:
        return _parse_etcd(url, scheme, rest)
    raise Refused(f"{url!r} is not the address of a store; write {FORMS}")


async def open_store(url: str, *, half_imported: bool = False) -> Store:
    """Open the store that `url` names.

    Raises `Refused` for a URL that is wrong, `StoreError` when the store cannot be opened, and `Conflict` for
    one that an import has filled by half, unless that is asked for. Nothing is open after an error.
    """
    address = parse_address(url)
    store: Store
    if isinstance(address, SqliteAddress):
        store = await SqliteStore.open(address.path)
    else:
        tls = None if address.tls is None else _tls_context(dict(address.tls))
        store = await EtcdStore.open(EtcdGateway(address.endpoints, tls), address.prefix)
    try:
        if not half_imported:
            await demand_whole(store)
    except BaseException:
        await store.close()
        raise
    return store


def open_election(store: Store, candidate: str) -> Election:
    """The election that goes with a store. `candidate` names this host to the others."""
    return EtcdElection(store, candidate) if isinstance(store, EtcdStore) else LocalElection(store, candidate)


def _parse_sqlite(url: str, rest: str) -> SqliteAddress:
    path = unquote(rest)
    if not path.startswith("/"):
        raise Refused(
            f"the path in {url!r} is not absolute; write three slashes: sqlite:///var/lib/transhume/farm.sqlite"
        )
    if path.endswith("/") or "\0" in path:
        raise Refused(f"{url!r} names a folder; write the path of a file")
    return SqliteAddress(Path(path))


def _parse_etcd(url: str, scheme: str, rest: str) -> EtcdAddress:
    rest, question, query = rest.partition("?")
    hosts, slash, path = rest.partition("/")
    if "@" in hosts:
        raise Refused(
            "a password in the address of a store is seen by everybody who may list processes; "
            "use etcds:// with a certificate (?cert=...&key=...)"
        )
    endpoints = tuple(_parse_endpoint(url, host) for host in hosts.split(","))
    twice = {endpoint for endpoint in endpoints if endpoints.count(endpoint) > 1}
    if twice:
        raise Refused(f"{url!r} names {min(map(str, twice))} twice; write each member once")
    prefix = (slash + path).rstrip("/") or DEFAULT_PREFIX
    if not _PREFIX.fullmatch(prefix):
        raise Refused(f"the prefix {prefix!r} in {url!r} has other characters than letters, digits and ._-/")
    if scheme == "etcd" and question:
        raise Refused(f"{url!r} has options that only etcds:// takes; write etcds://, or leave them out")
    return EtcdAddress(endpoints, prefix, _parse_tls(url, query) if scheme == "etcds" else None)


def _parse_endpoint(url: str, text: str) -> Endpoint:
    match = _ENDPOINT.fullmatch(text)
    if match is None:
        raise Refused(
            f"{text!r} in {url!r} is not a host and a port, such as 10.0.0.1:2379 or [fd00::1]:2379"
        )
    port = DEFAULT_PORT if match["port"] is None else int(match["port"])
    if not 0 < port < 1 << 16:
        raise Refused(f"{port} in {url!r} is no port; ports are from 1 to 65535")
    return Endpoint(match["v6"] or match["name"], port)


def _parse_tls(url: str, query: str) -> tuple[tuple[str, str], ...]:
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise Refused(f"the options in {url!r} cannot be read; write ?ca=PATH&cert=PATH&key=PATH") from error
    names = [name for name, _ in options]
    for name, value in options:
        if name not in _TLS_OPTIONS or names.count(name) > 1 or not value.startswith("/"):
            raise Refused(
                f"the option {name}={value} in {url!r} is not one of ca, cert and key with an absolute path"
            )
    if ("cert" in names) != ("key" in names):
        raise Refused(f"{url!r} has a certificate or a key without the other; give both")
    return tuple(sorted(options))


def _tls_context(files: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=files.get("ca"))
        if "cert" in files:
            context.load_cert_chain(files["cert"], files["key"])
    except (OSError, ssl.SSLError) as error:
        raise StoreError(
            f"the certificates of the farm's store ({', '.join(files.values())}) cannot be used: {error}"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
