"""A host's configuration takes further addresses only if they can lead to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from transhume.host.config import HostConfig


def config(*others: str, address: str = "10.0.0.1") -> HostConfig:
    return HostConfig(name="alpha", state_dir=Path("/none"), address=address, other_addresses=others)


def test_a_configuration_from_before_there_were_others() -> None:
    text = config().model_dump_json(exclude={"other_addresses"})
    assert HostConfig.model_validate_json(text).other_addresses == ()


@pytest.mark.parametrize(
    ("others", "address"),
    [
        ((), "10.0.0.1"),
        (("10.1.0.1", "fd00::1"), "10.0.0.1"),
        (("10.1.0.1",), "alpha.example"),
        (("127.0.0.2",), "127.0.0.1"),
        (("127.0.0.2",), "localhost"),
    ],
)
def test_addresses_that_lead_here(others: tuple[str, ...], address: str) -> None:
    made = config(*others, address=address)
    assert HostConfig.model_validate_json(made.model_dump_json()) == made
    assert made.other_addresses == others


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (("beta.example",), "'beta.example' is not an IP address; try 10.1.0.1 or fd00::1"),
        (("",), "'' is not an IP address"),
        (("10.1.0.1:7461",), "'10.1.0.1:7461' is not an IP address"),
        (("10.0.0.1",), "the address 10.0.0.1 is given twice"),
        (("fd00::1", "fd00:0::1"), "the address fd00:0::1 is given twice"),
        (("0.0.0.0",), "0.0.0.0 is not the address of one host"),
        (("224.0.0.1",), "224.0.0.1 is not the address of one host"),
        (("255.255.255.255",), "255.255.255.255 is not the address of one host"),
        (("127.0.0.1",), "the address 127.0.0.1 would lead each other host to itself"),
        (("fe80::1%eth0",), "fe80::1%eth0 means another interface on each host"),
        (tuple(f"10.1.0.{number}" for number in range(1, 7)), "at most 5 other addresses"),
    ],
)
def test_addresses_that_do_not_are_refused_in_words(others: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(*others)
    assert words in str(caught.value)
