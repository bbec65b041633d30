"""Claims 1 and 17: memory travels while the VM executes, and what was modified meanwhile travels again.

"(a) transferring source VM memory to a destination VM on the destination computer while the source VM is
executing on the source computer; (b) suspending execution of the source VM; (c) transferring non-memory
source VM state information to the destination VM; (d) executing the destination VM from the transferred
non-memory source VM state; and (e) retransferring to the destination VM units of the source VM memory that
have been modified since they were previously transferred".
"""

from __future__ import annotations

import pytest
from tests.claims.steered_guest import HELD, HOT_PAGE, SteeredGuest
from tests.e2e.farm import Farm

from transhume.migration.driver.job import Role
from transhume.model.migration import Outcome

pytestmark = pytest.mark.timeout(240)


async def test_claim_1_a_running_vm_is_migrated(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    migration = await farm.begin("vm", "beta", **HELD)
    await guest.precopied(migration)

    # (a) The destination holds what the guest wrote, while the guest goes on writing at the source.
    copied = await guest.until_word("beta", HOT_PAGE, 1)
    executed = await guest.executes("alpha")
    assert executed > copied

    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    report = record.report
    # (b) It was suspended: told to stop, and not running anywhere for a while.
    assert report.downtime.stop_ms > 0
    assert report.downtime.total_ms > report.downtime.stop_ms
    # (c) Device state travelled.
    assert report.state_bytes > 0
    # (e) Passes after the first one sent pages again that it had sent; the RAM was compared by hash.
    assert sum(each.pages for each in report.iterations[1:]) > 0
    assert report.downtime.verify_ms > 0
    # (d) The destination VM executes from where the source stopped; the source is gone.
    assert farm.runs_on("vm") == ["beta"]
    await guest.assert_whole_at("beta", executed)


async def test_claim_17_the_system_of_two_computers_does_it(farm: Farm) -> None:
    """It is "a source VM executing on a source computer; a destination VM configured on a destination
    computer; and computer software executing on the source and destination computers", which does all steps.
    """
    guest = await SteeredGuest.boot(farm)
    migration = await farm.begin("vm", "beta", **HELD)
    await guest.precopied(migration)
    here, there = farm.lab["alpha"].processes(), farm.lab["beta"].processes()
    # The source VM executes on one computer and the destination VM is configured on another.
    assert farm.qemu_pid("vm", "alpha") in here
    assert farm.qemu_pid("vm", "beta") in there
    assert not set(here) & set(there)
    # The software executes on both.
    assert farm.mover_pid(migration, "alpha", Role.SOURCE) in here
    assert farm.mover_pid(migration, "beta", Role.DESTINATION) in there
    # (a) as above, seen on both computers.
    copied = await guest.until_word("beta", HOT_PAGE, 1)
    executed = await guest.executes("alpha")
    assert executed > copied
    record = await guest.released(migration)
    # (b) to (e), as above.
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.downtime.stop_ms > 0
    assert record.report.state_bytes > 0
    assert sum(each.pages for each in record.report.iterations[1:]) > 0
    await guest.assert_whole_at("beta", executed)
    await farm.assert_nothing_left("vm", "alpha")
