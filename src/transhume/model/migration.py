"""A migration: what was asked, how far it is, and what came of it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEAST_BANDWIDTH_BYTES_S = 64 << 10
"""A migration that is paced further down hardly moves."""


class Engine(StrEnum):
    """Who moves the memory: this project's engine, or QEMU's own."""

    TRANSHUME = "transhume"
    QEMU = "qemu"


class OnDeadline(StrEnum):
    """What happens when a migration has not converged at its deadline."""

    SWITCH = "switch"
    ABORT = "abort"


class Mode(StrEnum):
    """In which order memory and the switchover come (claims 1 to 13).

    `AUTO` begins as `PRE_COPY` and leaves the rest for after the resume when it will not converge.
    """

    AUTO = "auto"
    PRE_COPY = "pre-copy"
    POST_COPY = "post-copy"
    HYBRID = "hybrid"


class Rest(StrEnum):
    """When the pages that are left at the suspension travel.

    Before or after the device state while the VM is suspended (claims 2 to 7 and 11), or after the resume
    (claims 8 to 10): when a vCPU needs them, by themselves in the background, or both.
    """

    BEFORE_STATE = "before-state"
    AFTER_STATE = "after-state"
    ON_DEMAND = "on-demand"
    BACKGROUND = "background"
    BOTH = "both"

    @property
    def after_resume(self) -> bool:
        """Whether pages are owed while the VM already runs at the destination."""
        return self in (Rest.ON_DEMAND, Rest.BACKGROUND, Rest.BOTH)


class Phase(StrEnum):
    """The patent's steps (FIG. 3) as phases of one migration.

    `QUEUED` comes before them: an earlier migration of the VM still owes pages.
    """

    QUEUED = "queued"
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


NOWHERE = "nowhere"
"""How `runs_at` begins where no host runs the VM, for the moment or for good."""


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
    `wait_limit_s` how long a prepared destination waits for its source (step 3A). `verify` compares
    hashes of the RAM at both ends: of all of it at the switchover, which lengthens the downtime by the time
    to read it; or, when pages are owed after the resume, of every page not written since, once all are there.

    `mode` and `rest` choose the order of transfer; `rest` is None when the mode decides. `iterations` ends
    the pre-copy after so many passes, whatever is left then. `post_copy` False keeps every page from being
    owed after the resume. `give_up_after_s` is how long a destination that lacks pages waits for a lost
    source (None: for ever). `safe_dir` is a folder on storage that both hosts reach: while pages are owed the
    source writes them there too, and a destination that has lost it goes on from there. `residual_limit_s`
    bounds how long pages may be owed: none are left for after the resume before so few are left that they are
    expected to be there within it, and the push then goes as fast as that takes, whatever the bandwidth.
    `ignore_rules` moves the VM to where a rule of the farm would not have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Engine = Engine.TRANSHUME
    max_downtime_ms: float = Field(default=50.0, gt=0)
    deadline_s: float = Field(default=600.0, gt=0)
    on_deadline: OnDeadline = OnDeadline.SWITCH
    bandwidth_bytes_s: int | None = Field(default=None, ge=LEAST_BANDWIDTH_BYTES_S)
    threshold_pages: int | None = Field(default=None, ge=0)
    threshold_fraction: float | None = Field(default=None, ge=0, le=1)
    max_iterations: int = Field(default=60, ge=1)
    peer_silence_limit_s: float = Field(default=10.0, gt=0)
    wait_limit_s: float = Field(default=60.0, gt=0)
    verify: bool = False
    mode: Mode = Mode.AUTO
    rest: Rest | None = None
    iterations: int | None = Field(default=None, ge=1)
    post_copy: bool = True
    give_up_after_s: float | None = Field(default=None, gt=0)
    safe_dir: str | None = Field(default=None, pattern=r"^/[^\x00]*$", max_length=512)
    residual_limit_s: float | None = Field(default=None, gt=0)
    ignore_rules: bool = False

    @property
    def may_page(self) -> bool:
        """Whether pages may be owed after the resume, so that the destination prepares for faults."""
        if self.engine is Engine.QEMU:
            return False
        if self.rest is not None:
            return self.rest.after_resume
        if self.mode is Mode.AUTO:
            return self.post_copy
        return self.mode in (Mode.POST_COPY, Mode.HYBRID)

    @model_validator(mode="after")
    def _contradictions(self) -> MigrationOptions:
        after_resume = self.rest is not None and self.rest.after_resume
        if not self.post_copy and (self.mode in (Mode.POST_COPY, Mode.HYBRID) or after_resume):
            raise ValueError(
                f"post-copy is forbidden, and {self.rest or self.mode} needs it: "
                "allow it, or choose another order"
            )
        if self.mode in (Mode.POST_COPY, Mode.HYBRID) and self.rest is not None and not after_resume:
            raise ValueError(
                f"mode {self.mode} leaves pages for after the resume, and rest {self.rest} does not"
            )
        if self.safe_dir is not None and not self.may_page:
            raise ValueError(
                "safe keeps a copy of pages that are owed, and this order owes none: leave it out"
            )
        if self.residual_limit_s is not None:
            self._bound_residual()
        if self.mode is Mode.POST_COPY and self.iterations is not None:
            raise ValueError("mode post-copy makes no pass before the switchover: leave the iterations out")
        if self.engine is Engine.QEMU and (
            self.mode in (Mode.POST_COPY, Mode.HYBRID) or self.rest is not None or self.iterations is not None
        ):
            raise ValueError(
                "QEMU's own engine knows pre-copy only: choose engine transhume, or mode pre-copy"
            )
        return self

    def _bound_residual(self) -> None:
        """Raise `ValueError` where pages would be owed for longer than any limit, or are never owed."""
        if not self.may_page:
            raise ValueError(
                "the residual limit bounds how long pages are owed, and this order owes none: leave it out"
            )
        if self.mode is Mode.POST_COPY or self.rest is Rest.ON_DEMAND or self.iterations is not None:
            raise ValueError(
                "the residual limit needs passes until few enough pages are left, and a push of those: "
                "choose mode auto or hybrid, without iterations, and not rest on-demand"
            )


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


class PagingReport(BaseModel):
    """What happened while the VM ran at the destination and pages were still owed.

    A fault is a vCPU (or QEMU) that needed a page which had not come: its latency is the time from the
    kernel's notice to the page's placing; `round_trip_p50_us` is the part of it between the request for one
    page and its last byte. `latency_us_histogram` counts faults under each power of two of
    microseconds. Faults that waited while the link was lost are counted apart: `interrupted_faults` of all
    `faults`, which waited `interrupted_ms` together, are in no percentile and not in the histogram.
    `waited_ms` sums up the latencies of all; `residual_ms` is the time during which the destination
    needed the source. `sent_twice_bytes` came once on demand and once in the background. `complete`: the
    destination itself has said that it lacks nothing. `link_lost_ms` is
    the time without a connection, `link_losses` how often that began, and `path` the destination's address
    that the source came to last (empty: its host has only one). `safe_copy_pages` were written to the
    safe copy, which was complete `safe_copy_ms` after the resume (None: it was not), and `restored_pages`
    came from there; `safe_copy_error` says why there was none.

    With `verify`: `verified_pages`, empty ones too, were not written since the switchover and equal the
    source's by hash; `written_pages` were written at the destination before that was known, so that nobody
    can compare them. Without any verified page nothing was verified. `to_compare`: the destination lacks
    nothing, and needs the source for that alone.
    """

    model_config = ConfigDict(frozen=True)

    complete: bool = False
    owed_pages: int = 0
    faults: int = 0
    interrupted_faults: int = 0
    interrupted_ms: float = 0.0
    fetched_pages: int = 0
    pushed_pages: int = 0
    zero_filled_pages: int = 0
    fault_p50_us: float = 0.0
    fault_p99_us: float = 0.0
    fault_max_us: float = 0.0
    round_trip_p50_us: float = 0.0
    latency_us_histogram: dict[int, int] = {}
    waited_ms: float = 0.0
    residual_ms: float = 0.0
    sent_twice_bytes: int = 0
    restored_pages: int = 0
    safe_copy_pages: int = 0
    safe_copy_ms: float | None = None
    safe_copy_error: str = ""
    link_losses: int = 0
    link_lost_ms: float = 0.0
    path: str = ""
    verified_pages: int = 0
    written_pages: int = 0
    to_compare: bool = False


class MigrationReport(BaseModel):
    """What was measured. Complete when the migration has ended; what is unknown is absent or zero.

    `suspended_at_s` is the time of day of the switchover, noted when pages are owed from then on.
    """

    model_config = ConfigDict(frozen=True)

    iterations: tuple[IterationReport, ...] = ()
    downtime: DowntimeReport = DowntimeReport()
    predicted_downtime_ms: float | None = None
    wire_bytes: int = 0
    ram_bytes: int = 0
    state_bytes: int = 0
    suspended_at_s: float | None = None
    total_ms: float = 0.0
    converged: bool | None = None
    switch_reason: str = ""
    order: str = ""
    paging: PagingReport | None = None


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

    `behind` is the id of the migration that it waited for, or empty. As long as it waits, `source` and
    `epoch` are what that one will leave, and `destination` is empty when it is still to be chosen.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    vm: str
    source: str
    destination: str
    epoch: int
    options: MigrationOptions = MigrationOptions()
    phase: Phase = Phase.REQUESTED
    behind: str = ""
    outcome: Outcome = Outcome.RUNNING
    runs_at: str = ""
    error_code: str = ""
    error: str = ""
    created_at_s: float = 0.0
    ended_at_s: float | None = None
    progress: Progress | None = None
    report: MigrationReport = MigrationReport()


class DryRun(BaseModel):
    """What a migration would meet: the reasons against it, and a prediction from a dirty-rate sample.

    `behind` is the migration under way that it would wait for, or empty; all else is as of now.
    """

    model_config = ConfigDict(frozen=True)

    vm: str
    source: str
    destination: str
    behind: str = ""
    reasons: tuple[str, ...] = ()
    wire_bytes: int | None = None
    total_ms: float | None = None
    downtime_ms: float | None = None
    dirty_rate_bytes_s: float | None = None
    link_rate_bytes_s: float | None = None
    sample_ms: float | None = None
    verdict: str = ""
