"""Claim 34: modifications are detected by write-protecting memory and sensing the faults of writes.

"detecting modification of VM source memory units, by write-protecting selected VM source memory units to
form write-protected memory units; sensing faults generated upon any source VM attempt to write to the write
protected memory units; allowing the source VM to write to the protected memory units; and retransferring to
the destination VM one or more write-protected memory units written to by the source VM."
"""

from __future__ import annotations

import os
import signal

import pytest
from tests.claims.steered_guest import HELD, QUIET_PAGE, SteeredGuest
from tests.e2e.farm import Farm

from transhume.migration.driver.job import Role
from transhume.model.migration import Outcome

pytestmark = pytest.mark.timeout(240)

BOOT_PAGE = 0x7
"""The firmware loaded the guest's own code to here; the guest writes nothing into it."""


async def test_claim_34_by_write_protection_and_faults(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    guest.key("alpha", b"w")
    first = await guest.until_word("alpha", QUIET_PAGE, 1)
    assert not guest.write_protected(QUIET_PAGE)
    migration = await farm.begin("vm", "beta", **HELD)
    # Pre-copied: the destination has the quiet page.
    await guest.precopied(migration)
    assert guest.word("beta", QUIET_PAGE) == first
    # While the mover stands still nobody scans, and what the kernel notes can be looked at.
    mover = farm.mover_pid(migration, "alpha", Role.SOURCE)
    os.kill(mover, signal.SIGSTOP)
    try:
        # Write-protected.
        assert guest.write_protected(QUIET_PAGE)
        assert guest.write_protected(BOOT_PAGE)
        # The write is allowed: the guest goes on, and its page has the new content...
        guest.key("alpha", b"w")
        second = await guest.until_word("alpha", QUIET_PAGE, first + 1)
        await guest.executes("alpha")
        # ... and its fault was sensed: the page's protection is gone, and only that of what was written.
        assert not guest.write_protected(QUIET_PAGE)
        assert guest.write_protected(BOOT_PAGE)
        assert guest.word("beta", QUIET_PAGE) == first
    finally:
        os.kill(mover, signal.SIGCONT)
    # The page that was written is transferred again.
    assert await guest.until_word("beta", QUIET_PAGE, first + 1) == second
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await guest.assert_whole_at("beta", second)
