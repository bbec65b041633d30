"""Hosts of the previous release and of this one are one farm: VMs move both ways, then one is upgraded."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.compatibility.previous_release import SUFFIX, PreviousRelease, unpack
from tests.e2e.farm import Farm, until

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab
from transhume.model.errors import TranshumeError
from transhume.model.migration import Engine, Outcome

pytestmark = pytest.mark.timeout(400)


class MixedFarm(Farm):
    """A farm some of whose daemons, and with them their movers, are of the previous release."""

    def __init__(self, lab: Lab, disks: Path, guest: Guest, previous: PreviousRelease) -> None:
        super().__init__(lab, disks, guest)
        self.previous = previous
        self.older: set[str] = set()

    async def start_daemon(self, name: str) -> None:
        if name not in self.older:
            await super().start_daemon(name)
            return
        host = self.lab[name]
        environment = {key: value for key, value in os.environ.items() if key != "TRANSHUME_STATE_DIR"}
        with (host.state_dir / "daemon.log").open("ab") as log:
            host.start(
                *host.transhume_command()[:2],
                "transhume.daemon",
                "--state-dir",
                str(host.state_dir),
                stderr=log,
                start_new_session=True,
                env={**environment, "PYTHONPATH": str(self.previous.sources)},
            )

        async def answers() -> bool:
            try:
                return (await self.release(name)).endswith(SUFFIX)
            except TranshumeError:
                return False

        await until(answers, f"the daemon of {name}, of the previous release, answers")

    async def release(self, name: str) -> str:
        """What the daemon says that it is."""
        async with self.client(name) as client:
            return (await client.ping()).version

    async def upgrade(self, name: str) -> None:
        """Restart one host's daemon as this release; its VMs go on."""
        self.kill_daemon(name, signal.SIGTERM)
        await self.daemon_gone(name)
        self.older.discard(name)
        await self.start_daemon(name)
        assert not (await self.release(name)).endswith(SUFFIX)


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> PreviousRelease:
    found = unpack(tmp_path_factory.mktemp("previous"))
    if found is None:
        pytest.skip("this tree is not in git, so there is no previous release to take from it")
    return found


@pytest.fixture
def mixed(previous: PreviousRelease, guest: Guest) -> Iterator[MixedFarm]:
    disks = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    disks.chmod(0o755)
    try:
        with Lab() as lab:
            yield MixedFarm(lab, disks, guest, previous)
    finally:
        shutil.rmtree(disks, ignore_errors=True)


@pytest.mark.parametrize("older", ["alpha", "beta"], ids=["older-controller", "newer-controller"])
async def test_a_vm_moves_between_both_and_outlives_the_upgrade(mixed: MixedFarm, older: str) -> None:
    mixed.older = {older}
    await mixed.form()
    await mixed.boot("vm")
    newest = 0
    for there, engine in (("beta", Engine.TRANSHUME), ("alpha", Engine.TRANSHUME), ("beta", Engine.QEMU)):
        record = await mixed.migrate("vm", there, engine=engine)
        assert record.outcome is Outcome.COMPLETED, record.error
        newest = await mixed.assert_sound("vm", there, newest)
    await mixed.upgrade(older)
    await mixed.assert_sound("vm", "beta", newest)
    record = await mixed.migrate("vm", "alpha")
    assert record.outcome is Outcome.COMPLETED, record.error
    await mixed.assert_sound("vm", "alpha", newest)
