"""What a daemon must know to start: written by `up` and `join`, read by the daemon and its movers."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, model_validator

from transhume.model.vm import NAME_PATTERN
from transhume.trust.files import IdentityFiles

DEFAULT_STATE_DIR = Path("/var/lib/transhume")
DEFAULT_PORT = 7461
DEFAULT_VM_USER = "transhume-vm"
MOST_OTHER_ADDRESSES = 5
"""All of them are tried, one after the other, within the time that a migration may take to connect."""


class HostConfig(BaseModel):
    """The file `host.json` in the state folder. What proves who the host is lies beside it (`files`).

    A host whose `controller_address` is empty carries the controller itself. `other_addresses` lead to this
    host by other ways; only movers use them. `store` is the address of the farm's store, as
    `store.address` reads it; empty: the file `store_file`. With a cluster as its store, every host of the
    farm carries a controller, and one of them leads.
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    state_dir: Path
    address: str
    port: int = DEFAULT_PORT
    controller_address: str = ""
    controller_port: int = DEFAULT_PORT
    vm_user: str = DEFAULT_VM_USER
    other_addresses: tuple[str, ...] = ()
    store: str = ""

    @model_validator(mode="after")
    def _others_lead_here(self) -> Self:
        if len(self.other_addresses) > MOST_OTHER_ADDRESSES:
            raise ValueError(f"at most {MOST_OTHER_ADDRESSES} other addresses can be used")
        seen = {_same_in_any_spelling(self.address)}
        for text in self.other_addresses:
            address = _parsed(text)
            if address in seen:
                raise ValueError(f"the address {text} is given twice")
            if address.is_loopback and not _is_loopback(self.address):
                raise ValueError(f"the address {text} would lead each other host to itself")
            seen.add(address)
        return self

    @property
    def carries_controller(self) -> bool:
        return not self.controller_address

    @property
    def on_cluster(self) -> bool:
        """Whether other hosts use the same store, so that only one of them may act."""
        return self.store.startswith(("etcd://", "etcds://"))

    @property
    def store_url(self) -> str:
        """The address of the farm's store, of a host that carries a controller."""
        return self.store or f"sqlite://{quote(str(self.store_file))}"

    @property
    def controllers_file(self) -> Path:
        """Where the other controllers of the farm answer; kept by the daemon for the movers of this host."""
        return self.state_dir / "controllers.json"

    @property
    def api_socket(self) -> Path:
        """Where this machine's daemon answers local commands; root alone may connect."""
        return self.state_dir / "api.sock"

    @property
    def files(self) -> IdentityFiles:
        """The host's key and certificate."""
        return IdentityFiles(self.state_dir)

    @property
    def store_file(self) -> Path:
        return self.state_dir / "farm.sqlite"

    @property
    def vms_dir(self) -> Path:
        return self.state_dir / "vms"

    @property
    def migrations_dir(self) -> Path:
        return self.state_dir / "migrations"


def _parsed(text: str) -> IPv4Address | IPv6Address:
    """Raises `ValueError` in words for what is no address of one host."""
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address; try 10.1.0.1 or fd00::1") from None
    if address.is_unspecified or address.is_multicast or text == "255.255.255.255":
        raise ValueError(f"{text} is not the address of one host")
    if isinstance(address, IPv6Address) and address.is_link_local:
        raise ValueError(f"{text} means another interface on each host; use an address that all of them can")
    return address


def _same_in_any_spelling(text: str) -> IPv4Address | IPv6Address | str:
    """A host's first address may be a name."""
    try:
        return ip_address(text)
    except ValueError:
        return text


def _is_loopback(text: str) -> bool:
    address = _same_in_any_spelling(text)
    return address == "localhost" if isinstance(address, str) else address.is_loopback
