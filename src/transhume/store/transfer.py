"""All records of a farm in one file, and back: to move to another store, and as a backup.

**A file of lines** (`.jsonl`), readable by people and by any store. The first line says what it is:

    {"format": "transhume-store", "version": 1, "revision": 42, "records": 2, "written_at_s": 1700000000.0}

then each record, in the order of its key's bytes, its value as text if it is UTF-8 and in base64 if not:

    {"key": "hosts/alpha", "text": "{...}"}
    {"key": "odd", "base64": "/wA="}

and the last line is the SHA-256 of every byte before it:

    {"sha256": "..."}

**A SQLite file** (`.sqlite`), made by SQLite's own backup of a store that is one; it can be read back into
any store too. Both are for root alone: the key of the farm's authority is among the records.

An import goes into an empty store, in steps that each store takes. Before the first a record is made that
says so, and after the last it is removed. A store that has it was filled by half, and nobody opens it as a
farm's (`demand_whole`); the mend is to empty it and import again (`discard_half_import`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transhume.model.errors import Conflict, NotFound, Refused, StoreError
from transhume.store.durable_file import new_file
from transhume.store.election import ELECTIONS
from transhume.store.interface import (
    ABSENT,
    MAX_TRANSACTION_BYTES,
    MAX_TRANSACTION_CHANGES,
    Compare,
    Entry,
    Store,
    check_limits,
    transaction_bytes,
)
from transhume.store.sqlite import SqliteStore, read_backup

FORMAT = "transhume-store"
VERSION = 1
IMPORTING = "importing"
"""The record that a store has while it is being filled."""

MAX_FILE_BYTES = 4 << 30
_SQLITE_MAGIC = b"SQLite format 3\0"
_STEP_CHANGES = MAX_TRANSACTION_CHANGES - 1


@dataclass(frozen=True)
class Transferred:
    """What an export or an import has moved. `revision` is that of the store that was read."""

    records: int
    revision: int


async def export_store(store: Store, target: Path) -> Transferred:
    """Write all records of one moment to `target`, which must not exist: `.sqlite` or else lines.

    Who leads is not a record of the farm and left out. After an error there is no `target`. Raises `Conflict`
    when it exists, `Refused` for a `.sqlite` of a store that is none, and `StoreError`.
    """
    await demand_whole(store)
    if target.exists():
        raise Conflict(f"{target} exists already; name another file, or remove it first")
    if target.suffix == ".sqlite":
        if not isinstance(store, SqliteStore):
            raise Refused(f"{target} can only be made from a SQLite store; name a file that ends in .jsonl")
        revision, records = await store.backup(target)
        return Transferred(records, revision)
    snapshot = await store.snapshot("")
    if any(entry.key == IMPORTING for entry in snapshot.entries):
        raise Conflict("an import into this store has begun just now; wait for it")
    entries = [entry for entry in snapshot.entries if _belongs(entry.key)]
    await asyncio.to_thread(_write_lines, target, entries, snapshot.revision)
    return Transferred(len(entries), snapshot.revision)


async def import_store(source: Path, store: Store) -> Transferred:
    """Fill an empty `store` from a file that `export_store` made. The whole file is checked first.

    Raises `NotFound` or `Refused` for the file and `Conflict` for a store that is not empty; nothing was
    changed then. After a `StoreError` on the way the store may be half full, which shows: see
    `discard_half_import`.
    """
    revision, records = await asyncio.to_thread(read_export, source)
    for key, value in records.items():
        check_limits((), {key: value}, ())
    marker = await _begin_import(store, source, len(records))
    await _fill(store, marker, records)
    return Transferred(len(records), revision)


async def replace_store(source: Path, store: Store) -> Transferred:
    """As `import_store`, in place of whatever the store has, who leads included: it is empty in between.

    Raises `Conflict` when somebody leads the farm that the store holds: its controllers must be down.
    """
    revision, records = await asyncio.to_thread(read_export, source)
    for key, value in records.items():
        check_limits((), {key: value}, ())
    leaders = await store.list(ELECTIONS)
    if leaders:
        raise Conflict(
            f"host {leaders[0].value.decode(errors='replace')} leads the farm of this store: stop the daemon "
            "of every host with `transhume down` first, and wait until its lease has run out"
        )
    began = await store.transact(
        compares=[Compare(IMPORTING, ABSENT)], puts={IMPORTING: _words(source, len(records))}
    )
    if began is None:
        raise Conflict("another import into this store has begun just now; wait for it")
    marker = Compare(IMPORTING, began)
    await _empty(store, marker)
    await _fill(store, marker, records)
    return Transferred(len(records), revision)


async def _fill(store: Store, marker: Compare, records: dict[str, bytes]) -> None:
    for step in _steps(records):
        compares = [marker, *(Compare(key, ABSENT) for key in step)]
        if await store.transact(compares=compares, puts=step) is None:
            raise _disturbed()
    found = {entry.key: entry.value for entry in await store.list("") if entry.key != IMPORTING}
    if found != records or await store.transact(compares=[marker], deletes=[IMPORTING]) is None:
        raise _disturbed()


async def demand_whole(store: Store) -> None:
    """Raise `Conflict` for a store that an import has filled by half, and `StoreError`."""
    marker = await store.get(IMPORTING)
    if marker is not None:
        raise Conflict(
            f"an import into this store was begun and not ended ({marker.value.decode(errors='replace')}); "
            "wait for it if it still runs, else discard it and import again"
        )


async def discard_half_import(store: Store) -> int:
    """Empty a store that an import has filled by half, and return how many records it had.

    Raises `Conflict` for a store that is whole, and `StoreError`, after which it can be called again.
    """
    marker = await store.get(IMPORTING)
    if marker is None:
        raise Conflict("no import into this store was begun and not ended; nothing is discarded")
    guard = Compare(IMPORTING, marker.mod_revision)
    removed = await _empty(store, guard)
    if await store.transact(compares=[guard], deletes=[IMPORTING]) is None:
        raise _disturbed()
    return removed


async def _empty(store: Store, guard: Compare) -> int:
    keys = [entry.key for entry in await store.list("") if entry.key != IMPORTING]
    for first in range(0, len(keys), _STEP_CHANGES):
        step = keys[first : first + _STEP_CHANGES]
        if await store.transact(compares=[guard], deletes=step) is None:
            raise _disturbed()
    return len(keys)


def read_export(source: Path) -> tuple[int, dict[str, bytes]]:
    """The revision and all records of a file that `export_store` made, whole and unharmed.

    Raises `NotFound`, and `Refused` which says what is wrong with the file.
    """
    try:
        if source.stat().st_size > MAX_FILE_BYTES:
            raise Refused(f"{source} has over {MAX_FILE_BYTES} bytes; it is no export of a farm's store")
        with source.open("rb") as file:
            if file.read(len(_SQLITE_MAGIC)) != _SQLITE_MAGIC:
                file.seek(0)
                return _parse_lines(source, file.read())
        revision, records = read_backup(source)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {source}") from error
    except OSError as error:
        raise Refused(f"{source} cannot be read: {error.strerror}") from error
    except sqlite3.Error as error:
        raise Refused(f"{source} is not a whole backup of a SQLite store: {error}") from error
    if IMPORTING in records:
        raise Refused(f"{source} is of a store that an import has filled by half; take another backup")
    return revision, {key: value for key, value in records.items() if _belongs(key)}


def _belongs(key: str) -> bool:
    """Whether a record is the farm's, and not only of the processes that run now."""
    return not key.startswith(ELECTIONS) and key != IMPORTING


async def _begin_import(store: Store, source: Path, records: int) -> Compare:
    """Make the record that says so, if the store is empty. Its comparison holds as long as it is there."""
    await demand_whole(store)
    present = await store.list("")
    if present:
        raise Conflict(
            f"the store is not empty: it has {len(present)} records, {present[0].key} among them; "
            "import into a new one"
        )
    puts = {IMPORTING: _words(source, records)}
    revision = await store.transact(compares=[Compare(IMPORTING, ABSENT)], puts=puts)
    if revision is None:
        raise Conflict("another import into this store has begun just now; wait for it")
    return Compare(IMPORTING, revision)


def _words(source: Path, records: int) -> bytes:
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"{records} records from {source.name}, begun {began}, {uuid.uuid4().hex[:8]}".encode()


def _steps(records: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    """The records in portions that one transaction takes."""
    step: dict[str, bytes] = {}
    for key, value in records.items():
        one = {key: value}
        full = transaction_bytes(step) + transaction_bytes(one) > MAX_TRANSACTION_BYTES
        if step and (full or len(step) == _STEP_CHANGES):
            yield step
            step = {}
        step |= one
    if step:
        yield step


def _disturbed() -> StoreError:
    return StoreError(
        "somebody else has written to the store during the import, which is not ended: "
        "stop the daemons that use this store, discard the half import and begin again"
    )


def _write_lines(target: Path, entries: Sequence[Entry], revision: int) -> None:
    head = {"format": FORMAT, "version": VERSION, "revision": revision, "records": len(entries)}
    lines = [json.dumps({**head, "written_at_s": time.time()})]
    lines += [_line(entry) for entry in entries]
    body = "".join(f"{line}\n" for line in lines).encode()
    end = json.dumps({"sha256": hashlib.sha256(body).hexdigest()})
    with new_file(target) as partial:
        partial.write_bytes(body + end.encode() + b"\n")


def _line(entry: Entry) -> str:
    try:
        return json.dumps({"key": entry.key, "text": entry.value.decode()})
    except UnicodeDecodeError:
        return json.dumps({"key": entry.key, "base64": base64.b64encode(entry.value).decode()})


def _parse_lines(source: Path, content: bytes) -> tuple[int, dict[str, bytes]]:
    body, end = content, b""
    if content.endswith(b"\n"):
        cut = content[:-1].rfind(b"\n") + 1
        body, end = content[:cut], content[cut:]
    lines = body.splitlines()
    head = _object(source, 1, lines[0] if lines else end)
    if head.get("format") != FORMAT:
        raise Refused(f"{source} is not an export of a farm's store")
    if head.get("version") != VERSION:
        raise Refused(
            f"{source} has version {head.get('version')}, this release reads {VERSION}; use a newer release"
        )
    if _object(source, len(lines) + 1, end).get("sha256") != hashlib.sha256(body).hexdigest():
        raise Refused(f"{source} is cut off or was changed: its checksum is wrong; take another copy of it")
    records: dict[str, bytes] = {}
    for number, line in enumerate(lines[1:], start=2):
        key, value = _record(source, number, _object(source, number, line))
        if key in records or not _belongs(key):
            raise Refused(f"line {number} of {source} has the key {key[:80]!r} that may not be there")
        records[key] = value
    revision = head.get("revision")
    if head.get("records") != len(records) or not isinstance(revision, int):
        raise Refused(f"{source} has {len(records)} records and says that it has {head.get('records')}")
    return revision, records


def _object(source: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        what = "is not an export of a farm's store" if number == 1 else "is cut off or was changed"
        raise Refused(f"{source} {what}: its line {number} cannot be read")
    return parsed


def _record(source: Path, number: int, line: Mapping[str, Any]) -> tuple[str, bytes]:
    key, text, encoded = line.get("key"), line.get("text"), line.get("base64")
    try:
        if isinstance(key, str) and isinstance(text, str) and encoded is None:
            return key, text.encode()
        if isinstance(key, str) and isinstance(encoded, str) and text is None:
            return key, base64.b64decode(encoded, validate=True)
    except (binascii.Error, UnicodeEncodeError):
        pass
    raise Refused(f"line {number} of {source} is not a record")
