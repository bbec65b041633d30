"""The movers of one host: started, listened to, and replaced when one dies before its time.

A mover's folder is made before anything else of its migration and removed after the controller has heard
its last word, so whatever happens in between (to the mover, to this daemon, to both) is found in a folder
and brought to its end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from transhume.host.controller_link import ControllerLink
from transhume.migration.driver.job import MoverFolder, MoverJob, Role
from transhume.migration.driver.journal import Journal
from transhume.migration.source import REVIVED
from transhume.model.errors import Conflict, HostLost, NotFound, StoreError, TranshumeError, VmmError
from transhume.model.migration import Outcome, Phase
from transhume.model.orders import (
    Adjustment,
    AdjustReply,
    CancelReply,
    MigrationUpdate,
    Prepared,
    ReviveReply,
)
from transhume.vmm.niceness import LEAST_URGENT, USUAL, set_niceness

FINAL_STATES = frozenset({"done", "aborted"})
LINE_LIMIT_BYTES = 4 << 20
STANDBY = "--standby"
POLL_S = 0.02
"""How often a process that has no event to wait for (a socket not there yet) is looked at again."""

RELAY_RETRY_S = 1.0
SUCCESSOR_PAUSE_S = 0.5
CANCEL_LIMIT_S = 60.0

_CANCELLED, _ADJUSTED, _REVIVED = "cancelled", "adjusted", "revived"
"""What a mover answers to the orders that are given to it while it works."""

_CANCEL_ORDER = {"command": "cancel"}

log = logging.getLogger(__name__)


class Mover:
    """One mover's folder, the process that works in it now, and what it said last."""

    def __init__(self, folder: MoverFolder, job: MoverJob) -> None:
        self.folder = folder
        self.job = job
        self.process: subprocess.Popen[bytes] | None = None
        self.prepared: asyncio.Future[Prepared] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None
        self.connected = asyncio.Event()
        self.asked: dict[str, list[asyncio.Future[Any]]] = {_CANCELLED: [], _ADJUSTED: [], _REVIVED: []}
        self.latest: MigrationUpdate | None = None
        self.relay_wanted = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def lives(self) -> bool:
        """Whether a process works in the folder."""
        if self.process is not None and self.process.poll() is None:
            return True
        return self.folder.mover_lives()


class Movers:
    """Starts and follows the movers of this host."""

    def __init__(
        self,
        migrations_dir: Path,
        link: ControllerLink,
        completed: Callable[[MoverJob, MigrationUpdate], None],
    ) -> None:
        self._migrations_dir = migrations_dir
        self._link = link
        self._completed = completed
        self._movers: dict[str, Mover] = {}
        self._standby: subprocess.Popen[bytes] | None = None

    def recover(self) -> None:
        """Take up every migration that an earlier daemon left, alive or dead."""
        if not self._migrations_dir.is_dir():
            return
        for path in sorted(self._migrations_dir.iterdir()):
            folder = MoverFolder(path)
            if folder.job_file.exists():
                self._follow(Mover(folder, folder.read_job()))
            else:
                shutil.rmtree(path, ignore_errors=True)  # died before the job was whole: nothing was begun

    def of_vm(self, vm: str) -> Mover | None:
        """The mover that works on a VM here, if there is one."""
        return next((mover for mover in self._movers.values() if mover.job.migration.vm == vm), None)

    def is_moving(self, vm: str) -> bool:
        """Whether a mover still has something to do for a VM here, besides telling how it ended."""
        return any(
            mover.job.migration.vm == vm and not mover.ended.is_set() for mover in self._movers.values()
        )

    async def start_destination(self, job: MoverJob) -> Prepared:
        """Start a destination and wait until it listens. After an error nothing is left."""
        mover = self._start(job)
        ended = asyncio.create_task(mover.ended.wait())
        try:
            await _first_of(ended, mover.prepared)
        finally:
            ended.cancel()
        if mover.prepared.done():
            return mover.prepared.result()
        update = mover.latest
        raise VmmError(
            update.error if update and update.error else f"the destination's mover died: {self._words(mover)}"
        )

    def start_source(self, job: MoverJob) -> None:
        """Start a source; it reports by itself."""
        self._start(job)

    async def cancel(self, migration: str, role: Role) -> CancelReply:
        """Ask a mover to stop, and wait for what came of it."""
        mover = self._movers.get(f"{migration}-{role.value}")
        if mover is None:
            raise NotFound(f"migration {migration} is not under way on this host")
        answer = await self._ask(mover, _CANCELLED, _CANCEL_ORDER)
        if answer is not None:
            return CancelReply.model_validate(answer)
        update = mover.latest
        return CancelReply(
            accepted=update is not None and update.outcome in (Outcome.CANCELLED, Outcome.FAILED),
            runs_at=update.runs_at if update else "unknown until the mover answers",
        )

    async def adjust(self, migration: str, adjustment: Adjustment) -> AdjustReply:
        """Give the source's mover other limits. Raises `NotFound` when it is not here, `HostLost` when it is
        silent.
        """
        mover = self._source_at_work(migration)
        order = {"command": "adjust", "adjustment": adjustment.model_dump(mode="json")}
        answer = await self._ask(mover, _ADJUSTED, order)
        if answer is None:
            raise _no_answer(migration)
        return AdjustReply.model_validate(answer)

    async def revive(self, migration: str) -> ReviveReply:
        """Ask the source's mover to take its VM back, and wait for what came of it. Raises as `adjust`."""
        mover = self._source_at_work(migration)
        answer = await self._ask(mover, _REVIVED, {"command": "revive"})
        if answer is not None:
            return ReviveReply.model_validate(answer)
        update = mover.latest
        if mover.ended.is_set() and update is not None:
            return ReviveReply(
                revived=update.error_code == REVIVED, message=update.error, runs_at=update.runs_at
            )
        raise HostLost(
            f"the mover of migration {migration} has not answered within {CANCEL_LIMIT_S:g} s; "
            f"`transhume migration {migration}` tells what came of it"
        )

    def _source_at_work(self, migration: str) -> Mover:
        mover = self._movers.get(f"{migration}-{Role.SOURCE.value}")
        if mover is None or mover.ended.is_set():
            raise NotFound(f"migration {migration} is not under way on this host")
        if mover.writer is None:
            raise _no_answer(migration)
        return mover

    async def _ask(self, mover: Mover, answer: str, order: dict[str, Any]) -> Any:
        """Give a mover an order; what it says under the name `answer`, None when it ended or was silent."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        mover.asked[answer].append(reply)
        _give(mover, order)
        ended = asyncio.create_task(mover.ended.wait())
        try:
            await _first_of(ended, reply, timeout_s=CANCEL_LIMIT_S)
        finally:
            ended.cancel()
            if reply in mover.asked[answer]:
                mover.asked[answer].remove(reply)
        return reply.result() if reply.done() else None

    async def close(self) -> None:
        """Stop to listen; the movers go on."""
        tasks = [task for mover in self._movers.values() for task in mover.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._standby is not None and self._standby.stdin is not None:
            self._standby.stdin.close()  # that is its word to go
            # It has no work and holds nothing; on a busy host it may still be busy with its own start.
            self._standby.kill()
            await asyncio.to_thread(self._standby.wait)

    def _start(self, job: MoverJob) -> Mover:
        folder = MoverFolder.of(self._migrations_dir, job.migration.id, job.role)
        if folder.path.name in self._movers:
            raise Conflict(f"migration {job.migration.id} is already under way on this host")
        try:
            folder.write_job(job)
        except OSError as error:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise VmmError(f"the mover's folder {folder.path} cannot be written: {error.strerror}") from None
        mover = Mover(folder, job)
        self._spawn(mover)
        self._follow(mover)
        return mover

    def _spawn(self, mover: Mover) -> None:
        """A process in a session of its own: it outlives this daemon. The one that stands by, if it lives."""
        process, self._standby = self._standby, None
        if process is not None and process.poll() is None and _assign(process, mover.folder):
            mover.process = process
        else:
            with mover.folder.log_file.open("ab") as words:
                mover.process = _python_mover(str(mover.folder.path), subprocess.DEVNULL, words)

    def stand_by(self) -> None:
        """Have a mover ready for the next migration, so that it need not wait for Python to start.

        Started when none is at work: its start would take the CPU from a migration under way.
        """
        if self._movers or self._standby is not None:
            return
        self._standby = _python_mover(STANDBY, subprocess.PIPE, subprocess.DEVNULL)
        # Python's start is a second of work, and the guests of this host go first.
        set_niceness(self._standby.pid, LEAST_URGENT)

    def _follow(self, mover: Mover) -> None:
        self._movers[mover.folder.path.name] = mover
        mover.tasks = [
            asyncio.create_task(self._follow_to_the_end(mover), name=f"follow {mover.folder.path.name}"),
            asyncio.create_task(self._relay(mover), name=f"relay {mover.folder.path.name}"),
        ]

    async def _follow_to_the_end(self, mover: Mover) -> None:
        while True:
            await self._listen(mover)
            while mover.lives:
                await asyncio.sleep(POLL_S)
            if mover.process is not None:
                mover.process.wait()
            journal = Journal(mover.folder.journal_file)
            update = journal.last_update()
            if update is not None:
                self._say(mover, update)
            state = journal.last_state()
            if state is None:
                self._say(mover, self._never_began(mover))
                break
            if state in FINAL_STATES:
                break
            await asyncio.sleep(SUCCESSOR_PAUSE_S)
            try:
                self._spawn(mover)
            except OSError as error:
                # A host without memory or room now: the VM has nobody else, so it is tried for ever.
                log.warning("no mover can be started for %s: %s", mover.folder.path.name, error.strerror)
        mover.ended.set()
        mover.relay_wanted.set()

    async def _listen(self, mover: Mover) -> None:
        """Read what a living mover says, until it ends."""
        while mover.lives:
            try:
                reader, writer = await asyncio.open_unix_connection(
                    str(mover.folder.control_socket), limit=LINE_LIMIT_BYTES
                )
            except OSError:
                await asyncio.sleep(POLL_S)
                continue
            mover.writer = writer
            if mover.asked[_CANCELLED]:
                _give(mover, _CANCEL_ORDER)  # an earlier connection may not have brought it
            try:
                while line := await reader.readline():
                    self._hear(mover, json.loads(line))
            except (OSError, ValueError):
                pass  # the mover died in the middle of a line: its journal tells the rest
            finally:
                mover.writer = None
                writer.close()
                for waiting in mover.asked[_ADJUSTED]:
                    if not waiting.done():
                        waiting.set_result(None)
            return

    def _hear(self, mover: Mover, message: dict[str, Any]) -> None:
        if "update" in message:
            self._say(mover, MigrationUpdate.model_validate(message["update"]))
        if "prepared" in message and not mover.prepared.done():
            mover.prepared.set_result(Prepared.model_validate(message["prepared"]))
        for answer, asked in mover.asked.items():
            if answer not in message:
                continue
            # Limits are answered in the order in which they were given, the others once for all who ask.
            for reply in asked[:1] if answer == _ADJUSTED else asked[:]:
                asked.remove(reply)
                if not reply.done():
                    reply.set_result(message[answer])

    def _say(self, mover: Mover, update: MigrationUpdate) -> None:
        mover.latest = update
        mover.relay_wanted.set()

    async def _relay(self, mover: Mover) -> None:
        """Pass the latest word on to the controller; the last one until it was heard."""
        told: MigrationUpdate | None = None
        while True:
            await mover.relay_wanted.wait()
            mover.relay_wanted.clear()
            update = mover.latest
            if update is not None and update is not told:
                if not await self._tell(update):
                    await asyncio.sleep(RELAY_RETRY_S)
                    mover.relay_wanted.set()
                    continue
                told = update
            if mover.ended.is_set() and told is mover.latest:
                break
        if told is not None and told.outcome is Outcome.COMPLETED:
            self._completed(mover.job, told)
        shutil.rmtree(mover.folder.path, ignore_errors=True)
        self._movers.pop(mover.folder.path.name, None)
        self.stand_by()

    async def _tell(self, update: MigrationUpdate) -> bool:
        """Whether the controller has heard it. What it refuses for good counts as heard."""
        try:
            await self._link.report(update)
        except (HostLost, StoreError):
            return False
        except TranshumeError as error:
            log.warning("the controller refused a report on %s: %s", update.migration, error.message)
        except Exception:
            log.exception("a report on %s could not be given", update.migration)
            return False  # untold, the migration would never end
        return True

    def _never_began(self, mover: Mover) -> MigrationUpdate:
        """For a mover that died before it had written a word: nothing was begun, nothing is left."""
        migration = mover.job.migration
        return MigrationUpdate(
            migration=migration.id,
            host=migration.source if mover.job.role is Role.SOURCE else migration.destination,
            phase=Phase.ABORTED,
            outcome=Outcome.FAILED,
            runs_at=f"source host {migration.source}",
            error_code=VmmError.code,
            error=f"the {mover.job.role.value}'s mover could not start: {self._words(mover)}",
        )

    def _words(self, mover: Mover) -> str:
        try:
            lines = mover.folder.log_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "it left no word"
        return lines[-1] if lines else "it left no word"


def _give(mover: Mover, order: dict[str, Any]) -> None:
    if mover.writer is not None:
        mover.writer.write(json.dumps(order).encode() + b"\n")


def _no_answer(migration: str) -> HostLost:
    return HostLost(f"the mover of migration {migration} does not answer now; try again")


async def _first_of(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Wait for whichever comes first, or for the time."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def _python_mover(argument: str, stdin: int, words: IO[bytes] | int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "transhume.mover", argument],
        stdin=stdin,
        stdout=words,
        stderr=words,
        cwd="/",
        start_new_session=True,
    )


def _assign(process: subprocess.Popen[bytes], folder: MoverFolder) -> bool:
    """Give a mover that stands by its folder; False when it died meanwhile."""
    assert process.stdin is not None
    set_niceness(process.pid, USUAL)
    try:
        process.stdin.write(str(folder.path).encode() + b"\n")
        process.stdin.close()
    except OSError:
        return False
    return True
