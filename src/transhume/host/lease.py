"""How long a host may go without the register, and what it does then with the VMs that are marked strict.

Pure: the time is an argument. A strict VM stands still from the moment when the farm may take its host for
lost until the register has answered again and still gives it to this host. All others run on.
"""

from __future__ import annotations

from dataclasses import dataclass

from transhume.model.host import LEASE_S


@dataclass(frozen=True)
class Holding:
    """What a host knows when it looks. Times are seconds of a clock that never goes back.

    `answered_s` is when the last question was sent that the controller answered. `held` were stopped for the
    lease and not let go since. `moving` are VMs on which a mover works: a mover asks the register itself
    before it suspends or resumes anything, and stopping its VM under it would be undone or taken for its own.
    """

    answered_s: float
    strict: frozenset[str]
    running: frozenset[str]
    held: frozenset[str]
    moving: frozenset[str]


@dataclass(frozen=True)
class Steps:
    """VMs to stop now, and VMs to let go on if the register says at this moment that they are this host's."""

    hold: frozenset[str] = frozenset()
    let_go: frozenset[str] = frozenset()


def decide(now_s: float, holding: Holding, lease_s: float = LEASE_S) -> Steps:
    """What is to be done now. The same facts give the same answer; nothing is stopped twice."""
    if now_s - holding.answered_s > lease_s:
        return Steps(hold=(holding.strict & holding.running) - holding.held - holding.moving)
    return Steps(let_go=holding.held - holding.moving)
