"""A drain as the store has it: what was asked, what becomes of each VM, and where each was before.

The same record tells of a drain (every VM off one host) and of a restoration (the VMs of an earlier drain
back to it). It is written before anything is done for a VM and after it is known what came of it, so that
whoever takes the farm over goes on where the last one stopped.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from transhume.model.migration import MigrationOptions

DEFAULT_PARALLEL = 2
MAX_PARALLEL = 32
MAX_ATTEMPTS = 2
"""A VM that did not move is tried once more, on another host if there is one."""


class DrainKind(StrEnum):
    """Away from a host, or back to it."""

    DRAIN = "drain"
    RESTORE = "restore"


class DrainState(StrEnum):
    """How far a drain is. Those from `DONE` on are over."""

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    DONE = "done"
    INCOMPLETE = "incomplete"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (DrainState.DONE, DrainState.INCOMPLETE, DrainState.CANCELLED)


class StepKind(StrEnum):
    """How a VM goes: while it runs, or, stopped, by the register alone."""

    LIVE = "live"
    REHOME = "rehome"


class StepState(StrEnum):
    """What becomes of one VM. `LEFT`: it stays where it is, and that is no failure; `reason` says why."""

    WAITING = "waiting"
    MOVING = "moving"
    MOVED = "moved"
    FAILED = "failed"
    BLOCKED = "blocked"
    LEFT = "left"

    @property
    def over(self) -> bool:
        return self not in (StepState.WAITING, StepState.MOVING)


class DrainOptions(BaseModel):
    """What the operator limits.

    At most `parallel` VMs go at once, at most `per_host` of them to one host and `per_link` between two
    (None: as many as `parallel`). No VM begins after `deadline_s` from the request, and what is under way
    then has had that as its own deadline. `migration` holds for each move.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parallel: int = Field(default=DEFAULT_PARALLEL, ge=1, le=MAX_PARALLEL)
    per_host: int | None = Field(default=None, ge=1, le=MAX_PARALLEL)
    per_link: int | None = Field(default=None, ge=1, le=MAX_PARALLEL)
    deadline_s: float | None = Field(default=None, gt=0)
    migration: MigrationOptions = MigrationOptions()


class DrainStep(BaseModel):
    """One VM of a drain. `source` is where it was and `destination` where it goes, empty until that is
    chosen.

    `wave` counts from 1 and is what was planned; 0: nothing was. `wire_bytes` and `seconds` are predicted
    until it has moved. `tried` are the destinations where it did not get to, `reason` the last words about
    it.
    """

    model_config = ConfigDict(frozen=True)

    vm: str
    kind: StepKind = StepKind.LIVE
    source: str
    destination: str = ""
    wave: int = 0
    state: StepState = StepState.WAITING
    memory_bytes: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    migration: str = ""
    attempts: int = 0
    tried: tuple[str, ...] = ()
    reason: str = ""
    progress: float = 0.0


class Drain(BaseModel):
    """A drain of `host`, or a restoration to it. `notes` are sentences for whoever looks at it.

    `wire_bytes` and `seconds` are what the whole was predicted to take.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    kind: DrainKind = DrainKind.DRAIN
    state: DrainState = DrainState.RUNNING
    options: DrainOptions = DrainOptions()
    steps: tuple[DrainStep, ...] = ()
    notes: tuple[str, ...] = ()
    wire_bytes: int = 0
    seconds: float = 0.0
    created_at_s: float = 0.0
    ended_at_s: float | None = None

    @property
    def waiting(self) -> tuple[DrainStep, ...]:
        return tuple(step for step in self.steps if step.state is StepState.WAITING)

    @property
    def moving(self) -> tuple[DrainStep, ...]:
        return tuple(step for step in self.steps if step.state is StepState.MOVING)
