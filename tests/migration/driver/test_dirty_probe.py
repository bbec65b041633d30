"""The look at the guest's writes in the middle of the first pass."""

from __future__ import annotations

from tests.memory.processes import needs_tracking
from tests.migration.paging.guest import guest_process

from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestRam
from transhume.memory.tracker import DirtyTracker
from transhume.migration.driver.dirty_probe import PROBE_S, DirtyProbe

pytestmark = needs_tracking


def test_it_looks_once_when_it_is_time_and_keeps_what_its_scan_cleared() -> None:
    with guest_process([32]) as guest:
        ram = GuestRam.of_process(guest.child.pid)
        scanner = Scanner(guest.child.pid)
        try:
            tracker = DirtyTracker(guest.uffd, scanner, ram)
            tracker.arm()
            probe = DirtyProbe(tracker, 10.0)
            guest.write_later(0, 7)
            assert guest.wrote()
            assert not probe.take(10.0 + PROBE_S / 2, 1 << 20)
            assert probe.found == []
            assert not probe.take(10.0 + PROBE_S, 1 << 20)
            (found,) = probe.found
            assert found.tolist() == [[7, 1]]
            assert probe.written_bytes_s == 4096 / PROBE_S
            guest.write_later(0, 9)
            assert guest.wrote()
            assert not probe.take(99.0, 1 << 20)
            assert [runs.tolist() for runs in tracker.collect()] == [[[9, 1]]]
        finally:
            scanner.close()
            ram.close()
