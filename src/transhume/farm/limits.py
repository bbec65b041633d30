"""How long the controller waits for what. One record, so that a simulator or a test can shorten all of it."""

from __future__ import annotations

from dataclasses import dataclass

from transhume.model.host import LEASE_S


@dataclass(frozen=True)
class Limits:
    """`silent_after_s`: a host that was not heard from for so long is shown as silent and gets no new VM.

    `unclaimed_s`: a migration that no mover has reported on is given up after so long (the controller
    restarted while it was being set up). `overdue_s`: one whose movers reported and then fell silent is
    given up so long after its own deadline. `last_word_s`: a destination that says how a migration ended is
    believed after so long if the source, which has measured most of it, says nothing.
    """

    silent_after_s: float = LEASE_S
    unclaimed_s: float = 60.0
    overdue_s: float = 120.0
    last_word_s: float = 10.0
    sweep_interval_s: float = 5.0
    token_ttl_s: float = 3600.0
    sample_s: float = 1.0
