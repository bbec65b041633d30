"""What only a file can show: modes, restarts, a full disk, a second daemon."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from transhume.model.errors import StoreError, StoreFull
from transhume.store.interface import Compare
from transhume.store.sqlite import CHECKPOINT_TRANSACTIONS, FORMAT_VERSION, SqliteStore


async def test_only_its_user_may_read_the_file(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "farm.sqlite")
    await store.transact(puts={"a": b"secret"})
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    await store.close()
    assert modes == {"farm.sqlite": 0o600, "farm.sqlite-wal": 0o600}


async def test_a_restart_finds_everything(tmp_path: Path) -> None:
    path = tmp_path / "farm.sqlite"
    store = await SqliteStore.open(path)
    first = await store.transact(puts={"a": b"1"})
    await store.close()
    store = await SqliteStore.open(path)
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.mod_revision) == (b"1", first)
    second = await store.transact(puts={"a": b"2"})
    assert first is not None
    assert second is not None
    assert second > first
    await store.close()


async def test_what_was_answered_is_in_the_files_at_once(tmp_path: Path) -> None:
    """A copy of the files without any closing, as after the loss of power, holds the transaction."""
    store = await SqliteStore.open(tmp_path / "farm.sqlite")
    await store.transact(puts={"a": b"1"})
    lost = tmp_path / "lost"
    lost.mkdir()
    for name in ("farm.sqlite", "farm.sqlite-wal"):
        (lost / name).write_bytes((tmp_path / name).read_bytes())
    await store.close()
    copy = await SqliteStore.open(lost / "farm.sqlite")
    entry = await copy.get("a")
    await copy.close()
    assert entry is not None
    assert entry.value == b"1"


async def test_a_full_store_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "farm.sqlite"
    store = await SqliteStore.open(path)
    await store.transact(puts={"a": b"1"})
    connection = store._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreFull, match="nothing was written"):
        await store.transact(puts={"a": b"2", "big": b"x" * 100_000})
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"1"
    assert await store.get("big") is None
    assert await store.transact(compares=[Compare("a", entry.mod_revision)], puts={"a": b"3"}) is not None
    await store.close()


async def test_a_second_daemon_is_turned_away(tmp_path: Path) -> None:
    path = tmp_path / "farm.sqlite"
    store = await SqliteStore.open(path)
    await store.transact(puts={"a": b"1"})
    with pytest.raises(StoreError, match="another process"):
        await SqliteStore.open(path)
    await store.close()


async def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "farm.sqlite"
    await (await SqliteStore.open(path)).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    connection.close()
    with pytest.raises(StoreError, match="newer release"):
        await SqliteStore.open(path)


async def test_a_file_of_another_kind_and_a_missing_folder_are_errors_in_words(tmp_path: Path) -> None:
    (tmp_path / "farm.sqlite").write_bytes(b"this is not a database, whatever its name says" * 20)
    with pytest.raises(StoreError, match=r"farm\.sqlite"):
        await SqliteStore.open(tmp_path / "farm.sqlite")
    with pytest.raises(StoreError, match="cannot be opened"):
        await SqliteStore.open(tmp_path / "none" / "farm.sqlite")


async def test_after_a_failure_the_file_is_read_again(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "farm.sqlite")
    await store.transact(puts={"a": b"1"})
    connection = store._connection
    assert connection is not None
    connection.close()
    with pytest.raises(StoreError):
        await store.get("a")
    entry = await store.get("a")
    await store.close()
    assert entry is not None
    assert entry.value == b"1"


async def test_the_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "farm.sqlite")
    for number in range(CHECKPOINT_TRANSACTIONS * 3):
        await store.transact(puts={"a": f"{number}".encode()})
    wal_bytes = (tmp_path / "farm.sqlite-wal").stat().st_size
    await store.close()
    assert wal_bytes < CHECKPOINT_TRANSACTIONS * 2 * 4 * 4096
