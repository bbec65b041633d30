"""Where the benchmarks play: two hosts joined by a wire, and one guest at a time that moves between them.

Driven through the command line, as a person would. A migration is asked for with `--detach` and its end is
seen by its movers' folders, so that nothing runs beside it that is only there to watch it, but the observer
of the guest's heart beat.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transhume.demo.guest.build import Guest, Workload
from transhume.demo.lab import Lab, LabHost
from transhume.demo.observer import Observer
from transhume.demo.serial_log import Timeline
from transhume.migration.driver.job import MoverFolder, Role
from transhume.model.errors import MigrationError, TimedOut, TranshumeError
from transhume.model.migration import Engine, Migration, Outcome

BOOT_LIMIT_S = 120.0
MOVE_LIMIT_S = 180.0
VERIFY_LIMIT_S = 120.0
_LOOK_S = 0.02
_FIRST_SIGN_LIMIT_S = 5.0


class PagesWrong(TranshumeError):
    """The guest found pages that differ from what it had written: the worst that can happen."""


@dataclass(frozen=True)
class Move:
    """What one migration came to.

    `gap_ms` is the guest's longest silence from the request to the end, seen from outside the VM.
    `mover_kib` is the peak of resident memory of the source's and the destination's mover.
    """

    migration: Migration
    gap_ms: float
    began_s: float
    ended_s: float
    mover_kib: dict[Role, int]

    @property
    def total_ms(self) -> float:
        """From the request to the end, as the farm's record has it."""
        return (self.ended_s - self.began_s) * 1000


@dataclass
class Player:
    """A running guest with the workload, and its observer. It knows where it is."""

    name: str
    lab: Lab
    observer: Observer
    workload: Workload
    at: int = 0
    _corrupt_pages: int = field(default=0)

    @property
    def host(self) -> LabHost:
        return self.lab.hosts[self.at]

    @property
    def elsewhere(self) -> LabHost:
        return self.lab.hosts[1 - self.at]

    def begin_move(self, engine: Engine, *options: str) -> str:
        """Ask for a migration to the other host; gives its id."""
        words = ("migrate", self.name, "--to", self.elsewhere.name, "--engine", engine.value, *options)
        answer = self._asked.transhume(*words, "--detach", "--json").require_success().json_lines()
        return Migration.model_validate(answer[-1]["migration"]).id

    def move(self, engine: Engine, *options: str) -> Move:
        """Move to the other host and wait for the end.

        Raises `MigrationError` when the guest did not move, `TimedOut` when there was no end.
        """
        identity = self.begin_move(engine, *options)
        movers = _Movers(identity, self.host, self.elsewhere)
        self._wait_for_end(identity, movers)
        migration = self.record(identity)
        if migration.outcome is not Outcome.COMPLETED:
            raise MigrationError(
                f"migration {identity} of {self.name} by {engine.value} {migration.outcome.value}:"
                f" {migration.error} (it runs at: {migration.runs_at})"
            )
        self.at = 1 - self.at
        assert migration.ended_at_s is not None
        # The records have the time of day, the observer the monotonic clock of the same machine.
        offset_s = time.monotonic() - time.time()
        began_s, ended_s = migration.created_at_s + offset_s, migration.ended_at_s + offset_s
        gap_ms = self.observer.longest_silence_ms(began_s, ended_s)
        return Move(migration, gap_ms, began_s, ended_s, movers.peak_kib)

    def record(self, identity: str) -> Migration:
        return Migration.model_validate(
            self._asked.transhume("migration", identity, "--json").require_success().json()
        )

    def cancel(self, identity: str) -> None:
        """Give a migration up and wait until its movers have gone."""
        movers = _Movers(identity, self.host, self.elsewhere)
        self._asked.transhume("cancel", identity).require_success()
        self._wait_for_end(identity, movers)

    def verify_all(self) -> None:
        """Wait until the guest has verified every page. Raises `PagesWrong` when one was not right."""
        self.observer.wait_for_full_verification(VERIFY_LIMIT_S)
        found = self.observer.ask(Timeline.corrupt_pages)
        if found > self._corrupt_pages:
            fresh, self._corrupt_pages = found - self._corrupt_pages, found
            raise PagesWrong(f"{fresh} pages of {self.name} were wrong after a migration")

    def rest(self, duration_s: float) -> float:
        """Let the guest work undisturbed for a while; its longest silence meanwhile, in ms: the floor."""
        start_s = time.monotonic()
        end_s = start_s + duration_s
        self.observer.wait_for(lambda timeline: timeline.beats_s[-1:] > [end_s], duration_s + BOOT_LIMIT_S)
        return self.observer.longest_silence_ms(start_s, end_s)

    @property
    def _asked(self) -> LabHost:
        return self.lab.hosts[0]

    def _wait_for_end(self, identity: str, movers: _Movers) -> None:
        began_s = time.monotonic()
        while time.monotonic() < began_s + MOVE_LIMIT_S:
            if movers.work():
                time.sleep(_LOOK_S)
            elif movers.seen or time.monotonic() > began_s + _FIRST_SIGN_LIMIT_S:
                if self.record(identity).outcome is not Outcome.RUNNING:
                    return
                time.sleep(_FIRST_SIGN_LIMIT_S / 10)
            else:
                time.sleep(_LOOK_S)
        raise TimedOut(f"migration {identity} of {self.name} did not end within {MOVE_LIMIT_S:g} s")


class _Movers:
    """The movers of one migration, seen by their folders."""

    def __init__(self, migration: str, source: LabHost, destination: LabHost) -> None:
        self._folders = {
            Role.SOURCE: _folder(source, migration, Role.SOURCE),
            Role.DESTINATION: _folder(destination, migration, Role.DESTINATION),
        }
        self.peak_kib: dict[Role, int] = {}
        self.seen = False

    def work(self) -> bool:
        """Whether a mover is still there; notes how much memory each has needed."""
        there = False
        for role, folder in self._folders.items():
            if folder.path.exists():
                there = self.seen = True
                used_kib = peak_resident_kib(folder.pid_file)
                if used_kib:
                    self.peak_kib[role] = max(self.peak_kib.get(role, 0), used_kib)
        return there


def _folder(host: LabHost, migration: str, role: Role) -> MoverFolder:
    return MoverFolder.of(host.state_dir / "migrations", migration, role)


def peak_resident_kib(pid_file: Path) -> int:
    """The most memory that the process named in the file ever had resident; 0 when it is gone."""
    try:
        status = Path(f"/proc/{int(pid_file.read_text())}/status").read_text()
    except (OSError, ValueError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


@contextmanager
def playing(lab: Lab, guest: Guest, name: str, memory_mib: int, workload: Workload) -> Iterator[Player]:
    """Boot a guest with one vCPU on the lab's first host; it is removed with the end of the block."""
    home = lab.hosts[0]
    files = ("--kernel", str(guest.kernel), "--initrd", str(guest.initrd))
    size = ("--memory", f"{memory_mib}M", "--cpus", "1", "--host", home.name)
    home.transhume("vm", "create", name, *size, *files, "--append", workload.arguments()).require_success()
    try:
        with Observer([host.vm_dir(name) / "serial.log" for host in lab.hosts]) as observer:
            home.transhume("vm", "start", name).require_success()
            observer.wait_until_ready(BOOT_LIMIT_S)
            yield Player(name, lab, observer, workload)
    finally:
        home.transhume("vm", "kill", name)
        home.transhume("vm", "delete", name)
