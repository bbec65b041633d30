"""What a switchover cost lately on this host: the part of the predicted downtime that is not memory."""

from __future__ import annotations

import json
from pathlib import Path

from transhume.model.migration import DowntimeReport

FIRST_GUESS_S = 0.02
WEIGHT_OF_LATEST = 0.3


class SwitchoverCost:
    """A moving average, kept in a file so that it survives the daemon. Losing it costs only precision."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def expected_s(self) -> float:
        try:
            return float(json.loads(self._path.read_text())["switchover_cost_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return FIRST_GUESS_S

    def learn(self, downtime: DowntimeReport) -> None:
        """Take a finished migration into account."""
        if downtime.total_ms <= 0:
            return
        measured_s = max(0.0, downtime.total_ms - downtime.last_pages_ms - downtime.verify_ms) / 1000
        average_s = (1 - WEIGHT_OF_LATEST) * self.expected_s() + WEIGHT_OF_LATEST * measured_s
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"switchover_cost_s": average_s}))
        draft.rename(self._path)
