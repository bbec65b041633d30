"""A farm's records in a file and back, with what only the farm knows to refuse: another farm's."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from transhume.farm.records import AUTHORITY_KEY, AuthorityRecord, FarmRecords
from transhume.model.errors import Conflict, Refused
from transhume.store.interface import Store
from transhume.store.transfer import read_export
from transhume.trust.files import IdentityFiles
from transhume.trust.token import fingerprint


def demand_farm(source: Path) -> AuthorityRecord:
    """The authority of the farm whose records are in the file.

    Raises as `read_export`, and `Refused` for an export that is of no farm.
    """
    _, records = read_export(source)
    try:
        return AuthorityRecord.model_validate_json(records[AUTHORITY_KEY])
    except (KeyError, ValidationError) as error:
        raise Refused(
            f"{source} is an export, but not of a farm: it has no authority that its hosts could trust"
        ) from error


def demand_own(source: Path, identity: IdentityFiles) -> None:
    """Raise `Conflict` when this server is a host of another farm than the file's."""
    record = demand_farm(source)
    if identity.authority.exists() and not identity.is_of(fingerprint(record.certificate_pem)):
        raise Conflict(
            f"{source} is of farm {record.farm}, and this server is a host of another: its hosts would not "
            "know each other any more. Bring it back on a host of that farm, or on a new server"
        )


async def demand_same_farm(source: Path, store: Store) -> None:
    """Raise `Conflict` when the store holds another farm than the file's. Raises `StoreError`."""
    record = demand_farm(source)
    held = await FarmRecords(store).authority()
    if held is not None and held.record.farm != record.farm:
        raise Conflict(
            f"the store holds farm {held.record.farm}, and {source} is of farm {record.farm}: "
            "name another store, or another prefix in it"
        )
