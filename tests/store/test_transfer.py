"""Export and import: the same records in every store, and nothing cut off, changed or half is ever taken."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import stat
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import pytest
from tests.store.etcd_cluster import EtcdCluster

from transhume.model.errors import Conflict, NotFound, Refused, StoreError
from transhume.store.address import open_election, open_store
from transhume.store.interface import MAX_VALUE_BYTES, Compare, Store
from transhume.store.memory import MemoryStore
from transhume.store.transfer import (
    IMPORTING,
    Transferred,
    demand_whole,
    discard_half_import,
    export_store,
    import_store,
)

RECORDS = {
    **{f"vms/{number:04}": f'{{"number": {number}}}'.encode() for number in range(300)},
    "empty": b"",
    "big": b"x" * MAX_VALUE_BYTES,
    "bigger": b"y" * (MAX_VALUE_BYTES - 100_000),
    "odd": bytes(range(256)),
    "words/ü\n": "two\nlines, …".encode(),
}


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        made: Store = MemoryStore()
    elif request.param == "sqlite":
        made = await open_store(f"sqlite://{tmp_path}/target.sqlite")
    else:
        etcd: EtcdCluster = request.getfixturevalue("etcd")
        made = await open_store(etcd.url(f"transfer/{uuid.uuid4().hex}"))
    yield made
    await made.close()


async def fill(store: Store) -> Store:
    for key, value in RECORDS.items():
        await store.transact(puts={key: value})
    return store


@pytest.fixture
async def export(tmp_path: Path) -> Path:
    """An export of a few records."""
    source = MemoryStore()
    await source.transact(puts={"vms/a": b"1", "vms/b": b"\xff", "hosts/a": b"3"})
    await export_store(source, tmp_path / "few.jsonl")
    return tmp_path / "few.jsonl"


async def held(store: Store) -> dict[str, bytes]:
    return {entry.key: entry.value for entry in await store.list("")}


async def test_what_is_exported_from_any_store_is_imported_into_any(store: Store, tmp_path: Path) -> None:
    await fill(store)
    exported = await export_store(store, tmp_path / "all.jsonl")
    assert exported.records == len(RECORDS)
    assert exported.revision == (await store.snapshot("")).revision
    target = MemoryStore()
    assert await import_store(tmp_path / "all.jsonl", target) == exported
    assert await held(target) == RECORDS


async def test_an_import_fills_any_store(store: Store, tmp_path: Path) -> None:
    await export_store(await fill(MemoryStore()), tmp_path / "all.jsonl")
    await import_store(tmp_path / "all.jsonl", store)
    assert await held(store) == RECORDS
    await demand_whole(store)


async def test_a_sqlite_farm_moves_to_etcd_and_back(etcd: EtcdCluster, tmp_path: Path) -> None:
    source = await fill(await open_store(f"sqlite://{tmp_path}/farm.sqlite"))
    await export_store(source, tmp_path / "there.jsonl")
    await source.close()
    cluster = await open_store(etcd.url(f"transfer/{uuid.uuid4().hex}"))
    await import_store(tmp_path / "there.jsonl", cluster)
    await export_store(cluster, tmp_path / "back.jsonl")
    await cluster.close()
    target = await open_store(f"sqlite://{tmp_path}/again.sqlite")
    await import_store(tmp_path / "back.jsonl", target)
    assert await held(target) == RECORDS
    await target.close()


async def test_an_export_is_of_one_moment(store: Store, tmp_path: Path) -> None:
    """Two records are always written together; the export has both from one transaction."""
    await store.transact(puts={"a": b"0", "z": b"0"})
    exported: list[Path] = []

    async def write() -> None:
        for number in itertools.count(1):
            await store.transact(puts={"a": f"{number}".encode(), "z": f"{number}".encode()})
            await asyncio.sleep(0)
            if len(exported) == 3:
                return

    async def read() -> None:
        for number in range(3):
            await export_store(store, tmp_path / f"{number}.jsonl")
            exported.append(tmp_path / f"{number}.jsonl")

    await asyncio.gather(write(), read())
    for path in exported:
        target = MemoryStore()
        await import_store(path, target)
        records = await held(target)
        assert records["a"] == records["z"]


async def test_who_leads_is_left_out(store: Store, tmp_path: Path) -> None:
    leadership = await open_election(store, "alpha").campaign("drain", 5.0)
    await store.transact(puts={"a": b"1"})
    assert (await export_store(store, tmp_path / "all.jsonl")).records == 1
    await leadership.resign()
    target = MemoryStore()
    await import_store(tmp_path / "all.jsonl", target)
    assert await held(target) == {"a": b"1"}


async def test_an_export_is_for_its_user_alone_and_writes_over_nothing(export: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(export.stat().st_mode) == 0o600
    before = export.read_bytes()
    for name in ("few.jsonl", "few.sqlite"):
        (tmp_path / "few.sqlite").write_bytes(b"precious")
        with pytest.raises(Conflict, match="exists already"):
            await export_store(MemoryStore(), tmp_path / name)
    assert export.read_bytes() == before
    with pytest.raises(Refused, match="cannot be written"):
        await export_store(MemoryStore(), tmp_path / "none" / "all.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"few.jsonl", "few.sqlite"}


async def test_a_backup_of_sqlite_is_made_beside_the_running_store_and_read_back(
    store: Store, tmp_path: Path
) -> None:
    source = await fill(await open_store(f"sqlite://{tmp_path}/farm.sqlite"))
    made = await export_store(source, tmp_path / "backup.sqlite")
    assert made.records == len(RECORDS)
    assert made.revision == (await source.snapshot("")).revision
    assert await source.transact(puts={"later": b"1"}) is not None
    await source.close()
    assert stat.S_IMODE((tmp_path / "backup.sqlite").stat().st_mode) == 0o600
    assert await import_store(tmp_path / "backup.sqlite", store) == made
    assert await held(store) == RECORDS


async def test_a_backup_can_also_be_put_in_the_place_of_the_store(tmp_path: Path) -> None:
    source = await fill(await open_store(f"sqlite://{tmp_path}/farm.sqlite"))
    made = await export_store(source, tmp_path / "backup.sqlite")
    await source.close()
    opened = await open_store(f"sqlite://{tmp_path}/backup.sqlite")
    assert await held(opened) == RECORDS
    assert await opened.transact(puts={"a": b"1"}) == made.revision + 1
    await opened.close()


async def test_only_a_sqlite_store_has_a_sqlite_backup(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="jsonl"):
        await export_store(MemoryStore(), tmp_path / "all.sqlite")


async def test_a_broken_backup_is_refused(tmp_path: Path) -> None:
    source = await fill(await open_store(f"sqlite://{tmp_path}/farm.sqlite"))
    await export_store(source, tmp_path / "backup.sqlite")
    await source.close()
    whole = (tmp_path / "backup.sqlite").read_bytes()
    broken = tmp_path / "broken.sqlite"
    sqlite3.connect(tmp_path / "other.sqlite").executescript("CREATE TABLE t (x)").connection.close()
    contents = (whole[: len(whole) // 2], whole[:100], (tmp_path / "other.sqlite").read_bytes())
    for content in contents:
        broken.write_bytes(content)
        with pytest.raises(Refused, match=r"broken\.sqlite"):
            await import_store(broken, MemoryStore())


async def test_an_import_needs_an_empty_store(store: Store, export: Path) -> None:
    await store.transact(puts={"here": b"1"})
    with pytest.raises(Conflict, match="not empty"):
        await import_store(export, store)
    assert await held(store) == {"here": b"1"}


def _cut(content: bytes) -> bytes:
    return content[:-20]


def _without_last_line(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def _without_a_record(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:2], *lines[3:]])


def _changed(content: bytes) -> bytes:
    return content.replace(b"vms/a", b"vms/c")


def _of_the_future(content: bytes) -> bytes:
    return content.replace(b'"version": 1', b'"version": 2')


def _something_else(content: bytes) -> bytes:
    return b'{"hello": "world"}\n'


def _nothing(content: bytes) -> bytes:
    return b""


def _no_text(content: bytes) -> bytes:
    return b"\x00\xff" * 100


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_cut, "cut off or was changed"),
        (_without_last_line, "cut off or was changed"),
        (_without_a_record, "checksum"),
        (_changed, "checksum"),
        (_of_the_future, "newer release"),
        (_something_else, "not an export"),
        (_nothing, "not an export"),
        (_no_text, "not an export"),
    ],
)
async def test_a_file_that_is_not_whole_changes_nothing(
    export: Path, harm: Callable[[bytes], bytes], words: str
) -> None:
    export.write_bytes(harm(export.read_bytes()))
    store = MemoryStore()
    with pytest.raises(Refused, match=words):
        await import_store(export, store)
    assert await held(store) == {}


async def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await import_store(tmp_path / "none.jsonl", MemoryStore())


async def test_records_that_no_store_takes_are_refused_before_anything_is_written(
    export: Path, tmp_path: Path
) -> None:
    source = MemoryStore()
    await source.transact(puts={"a": b"1"})
    entry = source._entries.pop("a")
    source._entries["k" * 600] = entry.__class__("k" * 600, entry.value, entry.mod_revision)
    await export_store(source, tmp_path / "odd.jsonl")
    store = MemoryStore()
    with pytest.raises(Refused, match="shorter names"):
        await import_store(tmp_path / "odd.jsonl", store)
    assert await held(store) == {}


class FailingStore(MemoryStore):
    """Its disk breaks after some transactions."""

    left = 3

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        if self.left == 0:
            raise StoreError("the disk broke")
        self.left -= 1
        return await super().transact(compares, puts, deletes)


async def test_a_half_import_shows_is_refused_and_can_be_discarded(tmp_path: Path) -> None:
    await export_store(await fill(MemoryStore()), tmp_path / "all.jsonl")
    store = FailingStore()
    with pytest.raises(StoreError, match="broke"):
        await import_store(tmp_path / "all.jsonl", store)
    store.left = 100
    assert 1 < len(await held(store)) < len(RECORDS)
    for refused in (
        demand_whole(store),
        export_store(store, tmp_path / "half.jsonl"),
        import_store(tmp_path / "all.jsonl", store),
    ):
        with pytest.raises(Conflict, match=r"begun and not ended.*all\.jsonl"):
            await refused
    assert await discard_half_import(store) > 0
    assert await held(store) == {}
    assert await import_store(tmp_path / "all.jsonl", store) == Transferred(len(RECORDS), len(RECORDS))
    with pytest.raises(Conflict, match="nothing is discarded"):
        await discard_half_import(store)
    assert await held(store) == RECORDS


async def test_a_half_imported_store_is_not_opened_as_a_farm(tmp_path: Path, etcd: EtcdCluster) -> None:
    for url in (f"sqlite://{tmp_path}/half.sqlite", etcd.url(f"half/{uuid.uuid4().hex}")):
        store = await open_store(url)
        await store.transact(puts={IMPORTING: b"5 records", "a": b"1"})
        await store.close()
        with pytest.raises(Conflict, match="5 records"):
            await open_store(url)
        store = await open_store(url, half_imported=True)
        assert await discard_half_import(store) == 1
        await store.close()
        await (await open_store(url)).close()


async def test_two_imports_at_once_do_not_mix(store: Store, export: Path, tmp_path: Path) -> None:
    other = MemoryStore()
    await other.transact(puts={"vms/z": b"other"})
    await export_store(other, tmp_path / "other.jsonl")
    answers = await asyncio.gather(
        import_store(export, store), import_store(tmp_path / "other.jsonl", store), return_exceptions=True
    )
    done = [answer for answer in answers if isinstance(answer, Transferred)]
    refused = [answer for answer in answers if isinstance(answer, Conflict)]
    assert len(done) == len(refused) == 1
    assert len(await held(store)) == done[0].records
    await demand_whole(store)


class DisturbedStore(MemoryStore):
    """Somebody else writes to it as soon as the import has begun."""

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        revision = await super().transact(compares, puts, deletes)
        if puts and IMPORTING in puts:
            await super().transact(puts={"vms/b": b"mine"})
        return revision


async def test_a_record_of_somebody_else_is_never_written_over(export: Path) -> None:
    store = DisturbedStore()
    with pytest.raises(StoreError, match="somebody else"):
        await import_store(export, store)
    assert (await held(store))["vms/b"] == b"mine"
    with pytest.raises(Conflict):
        await demand_whole(store)


def test_the_format_is_the_one_that_is_written_down(export: Path) -> None:
    lines = [json.loads(line) for line in export.read_text().splitlines()]
    assert (lines[0]["format"], lines[0]["version"], lines[0]["records"]) == ("transhume-store", 1, 3)
    assert lines[1:-1] == [
        {"key": "hosts/a", "text": "3"},
        {"key": "vms/a", "text": "1"},
        {"key": "vms/b", "base64": "/w=="},
    ]
    assert list(lines[-1]) == ["sha256"]
