"""The farm's store in one SQLite file.

A transaction is one append to the write-ahead log and one fsync (WAL, synchronous=FULL): it is on the disk
when the call returns, and a VM's downtime contains exactly one. Copying the log back into the file costs
more fsyncs, so that happens after the answer was given, never inside a transaction.

The connection is exclusive: a second daemon on the same state folder is turned away, and SQLite keeps its
index of the log in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from transhume.model.errors import Refused, StoreError, StoreFull
from transhume.store.durable_file import new_file
from transhume.store.interface import ABSENT, Compare, Entry, Snapshot, check_limits

Answer = TypeVar("Answer")

FORMAT_VERSION = 1
"""Kept in `PRAGMA user_version`. A file of a later version is refused, never guessed at."""

CHECKPOINT_TRANSACTIONS = 200
"""How many transactions the log holds before it is copied back into the file."""

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries "
    "(key BLOB PRIMARY KEY, value BLOB NOT NULL, mod_revision INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS counter "
    "(only INTEGER PRIMARY KEY CHECK (only = 1), revision INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO counter VALUES (1, 0)",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)


class SqliteStore:
    """Satisfies `Store`. All of SQLite happens in one thread of its own, in the order of the calls."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None
        self._since_checkpoint = 0
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Open the file, made with mode 0600 if it is missing. After a `StoreError` nothing is open."""
        store = cls(path)
        try:
            await store._run(store._demand_connection)
        except StoreError:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> Entry | None:
        return await self._run(lambda: self._get(key))

    async def list(self, prefix: str) -> Sequence[Entry]:
        return await self._run(lambda: self._list(prefix))

    async def snapshot(self, prefix: str, *, may_be_stale: bool = False) -> Snapshot:
        # One step of the one thread that writes: nothing changes between the two readings.
        return await self._run(lambda: Snapshot(self._list(prefix), self._revision()))

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        wanted = dict(puts or {})
        check_limits(compares, wanted, deletes)
        revision = await self._run(lambda: self._transact(compares, wanted, deletes))
        if revision is not None:
            self._since_checkpoint += 1
            if self._since_checkpoint >= CHECKPOINT_TRANSACTIONS:
                self._since_checkpoint = 0
                # Behind the answer: whoever made the transaction does not wait for this.
                self._thread.submit(self._checkpoint)
        return revision

    async def backup(self, target: Path) -> tuple[int, int]:
        """Copy this store into a new file, with SQLite's own means, and return its revision and records.

        Transactions wait meanwhile: milliseconds for a thousand VMs. Raises `Conflict` when `target` exists
        and `Refused` when it cannot be written; there is no `target` then.
        """
        return await self._run(lambda: self._backup(target))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        if self._closed:
            raise StoreError("the farm's store is closed; start the daemon again")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._translate_errors, work)

    def _translate_errors(self, work: Callable[[], Answer]) -> Answer:
        try:
            return work()
        except sqlite3.Error as error:
            raise self._recover(error) from error
        except OSError as error:
            raise StoreError(f"the farm's store {self._path} cannot be opened: {error.strerror}") from error

    def _recover(self, error: sqlite3.Error) -> StoreError:
        """Put the connection back into a known state, and say in words what happened."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL and self._rolled_back():
            return StoreFull(
                f"the disk of the farm's store {self._path} is full and nothing was written; make room there"
            )
        # What the log holds after a failed write or fsync is only known from the file itself: the next
        # call opens it again and reads the truth.
        self._disconnect()
        if code == sqlite3.SQLITE_BUSY:
            return StoreError(
                f"the farm's store {self._path} is in use by another process; is a second daemon running?"
            )
        return StoreError(f"the farm's store {self._path} failed: {error}; look at its disk")

    def _rolled_back(self) -> bool:
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            return False
        return True

    def _demand_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=2.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > FORMAT_VERSION:
                raise StoreError(
                    f"the farm's store {self._path} has format {version}, this release knows "
                    f"{FORMAT_VERSION}; start a newer release"
                )
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
        except (sqlite3.Error, StoreError):
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _get(self, key: str) -> Entry | None:
        row = (
            self._demand_connection()
            .execute("SELECT value, mod_revision FROM entries WHERE key = ?", (key.encode(),))
            .fetchone()
        )
        return None if row is None else Entry(key, row[0], row[1])

    def _list(self, prefix: str) -> Sequence[Entry]:
        first = prefix.encode()
        # No UTF-8 text holds the byte 0xff, so this bound is above every key with the prefix.
        rows = self._demand_connection().execute(
            "SELECT key, value, mod_revision FROM entries WHERE key >= ? AND key < ? ORDER BY key",
            (first, first + b"\xff"),
        )
        return [Entry(bytes(key).decode(), value, revision) for key, value, revision in rows.fetchall()]

    def _revision(self) -> int:
        (revision,) = self._demand_connection().execute("SELECT revision FROM counter").fetchone()
        return int(revision)

    def _transact(
        self, compares: Sequence[Compare], puts: Mapping[str, bytes], deletes: Sequence[str]
    ) -> int | None:
        connection = self._demand_connection()
        connection.execute("BEGIN IMMEDIATE")
        if not all(self._holds(connection, compare) for compare in compares):
            connection.execute("ROLLBACK")
            return None
        ((revision,),) = connection.execute(
            "UPDATE counter SET revision = revision + 1 RETURNING revision"
        ).fetchall()
        connection.executemany(
            "INSERT INTO entries VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET value = excluded.value, mod_revision = excluded.mod_revision",
            [(key.encode(), value, revision) for key, value in puts.items()],
        )
        connection.executemany("DELETE FROM entries WHERE key = ?", [(key.encode(),) for key in deletes])
        connection.execute("COMMIT")
        return int(revision)

    def _backup(self, target: Path) -> tuple[int, int]:
        connection = self._demand_connection()
        with new_file(target) as partial, contextlib.closing(sqlite3.connect(partial)) as copy:
            try:
                connection.backup(copy)
                # The copy must be one file, also for who opens it without the right to write.
                copy.execute("PRAGMA journal_mode = DELETE")
                (records,) = copy.execute("SELECT count(*) FROM entries").fetchone()
            except sqlite3.Error as error:
                # Most likely the other disk's trouble: the store goes on as it is.
                raise Refused(f"the backup {target} could not be made: {error}; look at its disk") from error
            return self._revision(), int(records)

    @staticmethod
    def _holds(connection: sqlite3.Connection, compare: Compare) -> bool:
        row = connection.execute(
            "SELECT mod_revision FROM entries WHERE key = ?", (compare.key.encode(),)
        ).fetchone()
        return (ABSENT if row is None else row[0]) == compare.mod_revision

    def _checkpoint(self) -> None:
        try:
            if self._connection is not None:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            # The log stays as it is, only longer; the next transaction meets the trouble and reports it.
            self._recover(error)


def read_backup(path: Path) -> tuple[int, dict[str, bytes]]:
    """The revision and all records of a file that `SqliteStore.backup` made.

    Raises `Refused` for a file that is not a store's, or of a later release, and `sqlite3.Error` for one
    that is broken.
    """
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        tables = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if verdict != "ok" or not {"entries", "counter"} <= tables:
            raise Refused(f"{path} is not a whole store of a farm ({verdict}); take another copy of it")
        if version > FORMAT_VERSION:
            raise Refused(f"{path} has format {version}, this release knows {FORMAT_VERSION}")
        (revision,) = connection.execute("SELECT revision FROM counter").fetchone()
        rows = connection.execute("SELECT key, value FROM entries ORDER BY key").fetchall()
    return int(revision), {bytes(key).decode(): bytes(value) for key, value in rows}
