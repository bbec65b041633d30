"""A look at how fast the guest writes, taken in the middle of the first pass."""

from __future__ import annotations

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs
from transhume.memory.tracker import DirtyTracker
from transhume.migration.policy import HOPELESS_SHARE
from transhume.model.vm import PAGE_BYTES

PROBE_S = 0.25
LEAST_PAGES = 2048
"""A guest that wrote less than 8 MiB meanwhile is left to the usual passes."""


class DirtyProbe:
    """One sample for one pass, in the data thread.

    The scan clears the marks of what it finds, so its caller adds `found` to what the pass left.
    """

    def __init__(self, tracker: DirtyTracker, began_s: float) -> None:
        self.found: list[Runs] = []
        self.written_bytes_s: float | None = None
        self._tracker = tracker
        self._began_s = began_s

    def take(self, now_s: float, sent_bytes: int) -> bool:
        """Take the sample when it is time; whether the guest writes about as fast as the link carries."""
        if self.found or now_s - self._began_s < PROBE_S:
            return False
        self.found = self._tracker.collect()
        pages = sum(page_runs.page_count(runs) for runs in self.found)
        elapsed_s = now_s - self._began_s
        self.written_bytes_s = pages * PAGE_BYTES / elapsed_s
        return pages >= LEAST_PAGES and self.written_bytes_s >= HOPELESS_SHARE * sent_bytes / elapsed_s
