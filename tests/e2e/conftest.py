"""A farm of two hosts, started once; each test gets it empty and whole."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.farm import Farm

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab


@pytest.fixture(scope="session")
def running_farm(guest: Guest) -> Iterator[Farm]:
    """Two hosts in network namespaces of their own, joined by a wire."""
    disks = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    disks.chmod(0o755)
    try:
        with Lab() as lab:
            farm = Farm(lab, disks, guest)
            asyncio.run(farm.form())
            yield farm
    finally:
        shutil.rmtree(disks, ignore_errors=True)


@pytest_asyncio.fixture
async def farm(running_farm: Farm) -> AsyncIterator[Farm]:
    """The farm, cleared before and after each test; a test that leaves something fails."""
    await running_farm.clear()
    yield running_farm
    await running_farm.clear()
