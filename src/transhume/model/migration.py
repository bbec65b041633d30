"""A migration: what was asked, how far it is, and what came of it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class Engine(StrEnum):
    """Who moves the memory: this project's engine, or QEMU's own."""

    TRANSHUME = "transhume"
    QEMU = "qemu"


class OnDeadline(StrEnum):
    """What happens when a migration has not converged at its deadline."""

    SWITCH = "switch"
    ABORT = "abort"


class Phase(StrEnum):
    """The patent's steps (FIG. 3) as phases of one migration."""

    REQUESTED = "requested"
    PREPARED = "prepared"
    PRECOPY = "precopy"
    SUSPENDED = "suspended"
    STATE_SENT = "state-sent"
    COMMITTED = "committed"
    RUNNING_AT_DESTINATION = "running-at-destination"
    PAGING = "paging"
    DONE = "done"
    ABORTED = "aborted"


class Outcome(StrEnum):
    """How a migration ended; `RUNNING` while it has not."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MigrationOptions(BaseModel):
    """What the operator promised and limited.

    The pre-copy ends when the predicted downtime is at most `max_downtime_ms`, or at most
    `threshold_pages` or `threshold_fraction` (of all RAM pages) are left (claim 13), or no progress
    is made. `bandwidth_bytes_s` paces the pre-copy (None: as fast as possible). `deadline_s` counts
    from the request. `peer_silence_limit_s` is how long the other end may say nothing;
    `wait_limit_s` how long a prepared destination waits for its source (step 3A). `verify` compares a
    hash of all RAM at the switchover, which lengthens the downtime by the time to read it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Engine = Engine.TRANSHUME
    max_downtime_ms: float = Field(default=50.0, gt=0)
    deadline_s: float = Field(default=600.0, gt=0)
    on_deadline: OnDeadline = OnDeadline.SWITCH
    bandwidth_bytes_s: int | None = Field(default=None, ge=65536)
    threshold_pages: int | None = Field(default=None, ge=0)
    threshold_fraction: float | None = Field(default=None, ge=0, le=1)
    max_iterations: int = Field(default=60, ge=1)
    peer_silence_limit_s: float = Field(default=10.0, gt=0)
    wait_limit_s: float = Field(default=60.0, gt=0)
    verify: bool = False


class IterationReport(BaseModel):
    """One pass over the memory. `pages` were sent in full, `zero_pages` only named.

    `dirty_pages_after` were found modified when the pass ended; the last entry of a report is the
    set that went while the VM was suspended.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    pages: int
    zero_pages: int
    wire_bytes: int
    duration_ms: float
    dirty_pages_after: int
    suspended: bool = False


class DowntimeReport(BaseModel):
    """The downtime (no vCPU runs anywhere) in its parts, in order, each timed on the host that did it.

    `total_ms` is measured by the source's clock alone, from the request to stop until word came that
    the destination runs, so it is an upper bound that includes half a round trip.
    """

    model_config = ConfigDict(frozen=True)

    stop_ms: float = 0.0
    last_pages_ms: float = 0.0
    verify_ms: float = 0.0
    state_out_ms: float = 0.0
    load_ms: float = 0.0
    commit_ms: float = 0.0
    resume_ms: float = 0.0
    total_ms: float = 0.0


class MigrationReport(BaseModel):
    """What was measured. Complete when the migration has ended; what is unknown is absent or zero."""

    model_config = ConfigDict(frozen=True)

    iterations: tuple[IterationReport, ...] = ()
    downtime: DowntimeReport = DowntimeReport()
    predicted_downtime_ms: float | None = None
    wire_bytes: int = 0
    ram_bytes: int = 0
    state_bytes: int = 0
    total_ms: float = 0.0
    converged: bool | None = None
    switch_reason: str = ""


class Progress(BaseModel):
    """A snapshot of a migration under way. `fraction` never falls; None means not known yet."""

    model_config = ConfigDict(frozen=True)

    migration: str
    vm: str
    phase: Phase
    elapsed_s: float
    fraction: float = 0.0
    iteration: int = 0
    wire_bytes: int = 0
    rate_bytes_s: float | None = None
    dirty_rate_bytes_s: float | None = None
    remaining_bytes: int | None = None
    eta_s: float | None = None
    predicted_downtime_ms: float | None = None
    verdict: str = ""


class Migration(BaseModel):
    """The record of one migration in the store.

    `epoch` is the VM's ownership epoch when it began: its commit is the swap
    `(source, epoch) -> (destination, epoch + 1)`. `runs_at` says in words where the VM runs.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    vm: str
    source: str
    destination: str
    epoch: int
    options: MigrationOptions = MigrationOptions()
    phase: Phase = Phase.REQUESTED
    outcome: Outcome = Outcome.RUNNING
    runs_at: str = ""
    error_code: str = ""
    error: str = ""
    created_at_s: float = 0.0
    ended_at_s: float | None = None
    progress: Progress | None = None
    report: MigrationReport = MigrationReport()


class DryRun(BaseModel):
    """What a migration would meet: the reasons against it, and a prediction from a dirty-rate sample."""

    model_config = ConfigDict(frozen=True)

    vm: str
    source: str
    destination: str
    reasons: tuple[str, ...] = ()
    wire_bytes: int | None = None
    total_ms: float | None = None
    downtime_ms: float | None = None
    dirty_rate_bytes_s: float | None = None
    link_rate_bytes_s: float | None = None
    sample_ms: float | None = None
    verdict: str = ""
