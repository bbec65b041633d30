"""What a switchover cost lately on this host: the part of the predicted downtime that is not memory."""

from __future__ import annotations

import json
from pathlib import Path

from transhume.model.migration import DowntimeReport
from transhume.model.vm import VmSpec

FIRST_GUESS_S = 0.02
WEIGHT_OF_LATEST = 0.3


class SwitchoverCost:
    """A moving average for each kind of VM, kept in a file. Losing it costs only precision.

    VMs are of one kind when their device state is: the frame buffer makes the largest difference.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def expected_s(self, spec: VmSpec) -> float:
        """Seconds for such a VM, from the latest migrations that left this host."""
        return self._read().get(_kind(spec), FIRST_GUESS_S)

    def learn(self, spec: VmSpec, downtime: DowntimeReport) -> None:
        """Take a finished migration into account, if the disk has room for it."""
        if downtime.total_ms <= 0:
            return
        measured_s = max(0.0, downtime.total_ms - downtime.last_pages_ms - downtime.verify_ms) / 1000
        average_s = (1 - WEIGHT_OF_LATEST) * self.expected_s(spec) + WEIGHT_OF_LATEST * measured_s
        draft = self._path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps({**self._read(), _kind(spec): average_s}))
            draft.rename(self._path)
        except OSError:
            draft.unlink(missing_ok=True)

    def _read(self) -> dict[str, float]:
        try:
            return {str(kind): float(cost_s) for kind, cost_s in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


def _kind(spec: VmSpec) -> str:
    return f"{spec.accel.value}, {spec.cpus} vCPUs, display {spec.display.value}"
