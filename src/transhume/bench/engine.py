"""The group `engine`: this project's engine next to QEMU's, in one run, on the same guests."""

from __future__ import annotations

from transhume.bench.bulk import large_guest
from transhume.bench.moves import busy_guest, idle_guest
from transhume.bench.play import Part
from transhume.bench.scan import one_gib
from transhume.bench.slowdown import tracked_guest

ENGINE: tuple[Part, ...] = (busy_guest, idle_guest, large_guest, tracked_guest, one_gib)
