"""Two hosts with two links: what breaks on the first while pages are owed goes on over the second.

Alpha carries the controller and is the source, so that what is told of the migration arrives although the
hosts' daemons, which know only the first link, cannot hear each other.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.farm import Farm, until

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab
from transhume.migration.driver.job import Role
from transhume.model.errors import TranshumeError
from transhume.model.migration import Migration, Mode, Outcome, Phase

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

SLOW_BYTES_S = 128 << 10
SILENCE_LIMIT_S = 2.0
BREAKS = {"lost without a word": Lab.cut_first, "switched off": Lab.take_down_first}


@pytest.fixture(scope="module")
def running_farm_with_two_links(guest: Guest) -> Iterator[Farm]:
    disks = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    disks.chmod(0o755)
    try:
        with Lab(second_link=True) as lab:
            lab.form_farm()
            yield Farm(lab, disks, guest)
    finally:
        shutil.rmtree(disks, ignore_errors=True)


@pytest_asyncio.fixture
async def two_links(running_farm_with_two_links: Farm) -> AsyncIterator[Farm]:
    farm = running_farm_with_two_links
    await farm.clear()
    yield farm
    farm.lab.restore()
    await _heard_again(farm)
    await farm.clear()


async def _heard_again(farm: Farm) -> None:
    """Until then the controller does not know of the other host's VMs."""

    async def heard() -> bool:
        async with farm.client() as client:
            return not any(host.silent for host in await client.hosts())

    await until(heard, "the controller hears from all hosts")


async def _paging(farm: Farm, **options: bool) -> str:
    await farm.boot("vm")
    migration = await farm.begin(
        "vm",
        "beta",
        mode=Mode.POST_COPY,
        bandwidth_bytes_s=SLOW_BYTES_S,
        peer_silence_limit_s=SILENCE_LIMIT_S,
        **options,
    )
    await farm.in_phase(migration, Phase.PAGING)
    return migration


async def _record(farm: Farm, migration: str) -> Migration:
    async with farm.client() as client:
        return await client.migration(migration)


async def _completed(farm: Farm, migration: str) -> Migration:
    """The record as soon as it says that the migration has ended; `Farm.ended` also waits for the movers, and
    beta's cannot tell the controller yet.
    """

    async def over() -> Migration | None:
        record = await _record(farm, migration)
        return None if record.outcome is Outcome.RUNNING else record

    found: Migration = await until(over, f"migration {migration} has ended")
    assert found.outcome is Outcome.COMPLETED, f"{found.error}\n{farm.traces()}"
    return found


async def _first_link_is_broken(farm: Farm) -> bool:
    """Whether the members' own traffic, which goes over the first link, is lost."""
    async with farm.client("beta") as client:
        try:
            await asyncio.wait_for(client.hosts(), 1.0)
        except (TranshumeError, TimeoutError):
            return True
    return False


def test_the_farm_knows_each_host_s_other_address(running_farm_with_two_links: Farm) -> None:
    lab = running_farm_with_two_links.lab
    hosts = lab["beta"].transhume("hosts", "--json").require_success().json()
    assert [host["inventory"]["other_addresses"] for host in hosts] == [["10.78.0.1"], ["10.78.0.2"]]


@pytest.mark.parametrize("how", BREAKS)
async def test_pages_that_are_owed_come_over_the_second_link(two_links: Farm, how: str) -> None:
    farm, beta = two_links, two_links.lab["beta"]
    migration = await _paging(farm, verify=True)
    BREAKS[how](farm.lab)

    async def came_by_the_second() -> bool:
        paging = (await _record(farm, migration)).report.paging
        return paging is not None and paging.path == beta.other_address

    await until(came_by_the_second, "the source has found its destination on the second link")
    await farm.hurry(migration)
    record = await _completed(farm, migration)
    assert await _first_link_is_broken(farm)
    paging = record.report.paging
    assert paging is not None
    assert paging.path == beta.other_address
    assert paging.link_losses > 0
    assert paging.link_lost_ms > 0
    assert paging.fetched_pages + paging.pushed_pages >= paging.owed_pages > 0
    assert paging.verified_pages > 0
    newest = await farm.assert_sound("vm", "beta")
    assert newest > 2
    farm.lab.restore()
    await farm.ended(migration)
    await farm.assert_nothing_left("vm", "alpha")
    await _heard_again(farm)
    back = await farm.migrate("vm", "alpha", verify=True)
    assert back.outcome is Outcome.COMPLETED, back.error
    await farm.assert_sound("vm", "alpha", at_least=newest)


@pytest.mark.parametrize("role", list(Role))
async def test_a_successor_knows_the_second_link_too(two_links: Farm, role: Role) -> None:
    """The mover of one end dies while the first link is broken, and who follows it was told of both."""
    farm, beta = two_links, two_links.lab["beta"]
    migration = await _paging(farm)
    host = "alpha" if role is Role.SOURCE else "beta"
    victim = farm.mover_pid(migration, host, role)
    farm.lab.cut_first()
    os.kill(victim, signal.SIGKILL)

    async def came_by_the_second() -> bool:
        assert await _first_link_is_broken(farm)
        paging = (await _record(farm, migration)).report.paging
        return (
            farm.mover_pid(migration, host, role) != victim
            and paging is not None
            and paging.path == beta.other_address
        )

    await until(came_by_the_second, "the ends have found each other on the second link")
    await farm.hurry(migration)
    if role is Role.DESTINATION:
        # Who takes over there asks the register, beyond the broken link, before it tells of the end.
        async def all_sent() -> bool:
            progress = (await _record(farm, migration)).progress
            return progress is not None and progress.remaining_bytes == 0

        await until(all_sent, "all pages have gone")
        assert await _first_link_is_broken(farm)
        farm.lab.restore()
    record = await _completed(farm, migration)
    assert record.report.paging is not None
    assert record.report.paging.path == beta.other_address
    await farm.assert_sound("vm", "beta")
    farm.lab.restore()
    await farm.ended(migration)


async def test_a_link_that_holds_is_not_left(two_links: Farm) -> None:
    farm = two_links
    migration = await _paging(farm)
    await farm.hurry(migration)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.paging is not None
    assert record.report.paging.path == farm.lab["beta"].address
