"""What a mover is told by the daemon that starts it, and the lock that makes it the only one."""

from __future__ import annotations

import fcntl
import os
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from transhume.model.migration import Migration
from transhume.model.orders import Prepared
from transhume.model.vm import RamBlock, VmSpec


class Role(StrEnum):
    """The end of the migration that a mover serves."""

    SOURCE = "source"
    DESTINATION = "destination"


class MoverJob(BaseModel):
    """The file `job.json` in a mover's folder.

    `state_dir` is the daemon's; `prepared` tells a source where its destination waits;
    `switchover_cost_s` is what device state and commit cost lately on this host.
    """

    model_config = ConfigDict(frozen=True)

    role: Role
    migration: Migration
    spec: VmSpec
    ram_blocks: tuple[RamBlock, ...]
    state_dir: Path
    prepared: Prepared | None = None
    switchover_cost_s: float = 0.02


class MoverFolder:
    """The folder of one mover: `migrations/<id>-<role>/` below the daemon's state folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, migrations_dir: Path, migration: str, role: Role) -> MoverFolder:
        return cls(migrations_dir / f"{migration}-{role.value}")

    @property
    def job_file(self) -> Path:
        return self.path / "job.json"

    @property
    def journal_file(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def control_socket(self) -> Path:
        return self.path / "mover.sock"

    @property
    def log_file(self) -> Path:
        return self.path / "mover.log"

    @property
    def pid_file(self) -> Path:
        return self.path / "mover.pid"

    def write_job(self, job: MoverJob) -> None:
        """Make the folder and write the job into it, whole or not at all."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self.job_file.with_suffix(".draft")
        draft.write_text(job.model_dump_json())
        draft.chmod(0o600)
        draft.rename(self.job_file)

    def read_job(self) -> MoverJob:
        return MoverJob.model_validate_json(self.job_file.read_text())

    def try_lock(self) -> int | None:
        """Become the folder's only mover: a descriptor to keep open, or None when another one lives.

        The kernel lets go of the lock when the process dies, so a lock that is free is proof of death.
        """
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def mover_lives(self) -> bool:
        """Whether a process holds the lock now."""
        fd = self.try_lock()
        if fd is None:
            return True
        os.close(fd)
        return False
