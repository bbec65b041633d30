"""What the address of a store may be, and which part of a wrong one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transhume.model.errors import Refused
from transhume.store.address import EtcdAddress, SqliteAddress, open_store, parse_address
from transhume.store.etcd_http import Endpoint


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("sqlite:///var/lib/farm.sqlite", SqliteAddress(Path("/var/lib/farm.sqlite"))),
        ("sqlite:///var/with%20space", SqliteAddress(Path("/var/with space"))),
        ("etcd://h1", EtcdAddress((Endpoint("h1", 2379),), "/transhume")),
        ("etcd://h1/", EtcdAddress((Endpoint("h1", 2379),), "/transhume")),
        ("etcd://h1:1,h2:2/farm", EtcdAddress((Endpoint("h1", 1), Endpoint("h2", 2)), "/farm")),
        (
            "etcd://[fd00::1]:5,[fd00::2]/a/b/",
            EtcdAddress((Endpoint("fd00::1", 5), Endpoint("fd00::2", 2379)), "/a/b"),
        ),
        ("etcds://h1/farm", EtcdAddress((Endpoint("h1", 2379),), "/farm", ())),
        (
            "etcds://h1/farm?key=/k&ca=/a%20b&cert=/c",
            EtcdAddress((Endpoint("h1", 2379),), "/farm", (("ca", "/a b"), ("cert", "/c"), ("key", "/k"))),
        ),
    ],
)
def test_addresses_are_understood(url: str, address: SqliteAddress | EtcdAddress) -> None:
    assert parse_address(url) == address


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "not the address of a store"),
        ("farm.sqlite", "not the address of a store"),
        ("sqlite:/farm", "not the address of a store"),
        ("http://h1:2379", "not the address of a store"),
        ("ETCD://h1", "not the address of a store"),
        ("sqlite://farm.sqlite", "three slashes"),
        ("sqlite://", "three slashes"),
        ("sqlite:///var/lib/", "a folder"),
        ("etcd://", "not a host and a port"),
        ("etcd:///farm", "not a host and a port"),
        ("etcd://h1,,h2", "not a host and a port"),
        ("etcd://h1:x", "not a host and a port"),
        ("etcd://fd00::1", "not a host and a port"),
        ("etcd://h 1", "not a host and a port"),
        ("etcd://h1:0", "from 1 to 65535"),
        ("etcd://h1:65536", "from 1 to 65535"),
        ("etcd://h1:1,h2,h1:1/farm", "h1:1 twice"),
        ("etcd://me:secret@h1/farm", "password"),
        ("etcd://h1/fa rm", "prefix"),
        ("etcd://h1/a//b", "prefix"),
        ("etcd://h1/farm#x", "prefix"),
        ("etcd://h1/farm?ca=/a", "etcds"),
        ("etcds://h1/farm?ca", "options"),
        ("etcds://h1/farm?ca=a", "absolute path"),
        ("etcds://h1/farm?user=/a", "user"),
        ("etcds://h1/farm?ca=/a&ca=/b", "absolute path"),
        ("etcds://h1/farm?cert=/a", "give both"),
    ],
)
async def test_what_is_wrong_is_named(url: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        await open_store(url)
    assert "secret" not in caught.value.message


@given(st.one_of(st.text(), st.text().map("etcd://".__add__), st.text().map("etcds://".__add__)))
def test_nothing_but_a_refusal_comes_of_nonsense(url: str) -> None:
    try:
        address = parse_address(url)
    except Refused:
        return
    assert isinstance(address, EtcdAddress | SqliteAddress)
