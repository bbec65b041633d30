"""A farm of two hosts whose records lie in a real etcd: both carry a controller, and one of them leads."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.farm import Farm, until
from tests.store.etcd_cluster import ETCD, SKIP_REASON

from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab, LabHost
from transhume.model.errors import StoreError, TranshumeError
from transhume.model.migration import MigrationOptions, Outcome

PORT = 2379


def start_etcd(host: LabHost, folder: Path) -> subprocess.Popen[bytes]:
    """One member; it ends with the lab."""
    assert ETCD is not None
    client, peer = f"http://{host.address}:{PORT}", f"http://{host.address}:{PORT + 1}"
    return host.start(
        *(ETCD, "--name", "m0", "--data-dir", str(folder / "etcd")),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"m0={peer}", "--log-level", "error"),
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"),
    )


@pytest_asyncio.fixture
async def clustered(guest: Guest) -> AsyncIterator[tuple[Farm, subprocess.Popen[bytes]]]:
    """Alpha and beta, set up by the commands that a person types."""
    if ETCD is None:
        pytest.skip(SKIP_REASON)
    folder = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with Lab() as lab:
            alpha, beta = lab.hosts
            etcd = start_etcd(beta, folder)
            url = f"etcd://{beta.address}:{PORT}/farm"
            own = ("--name", "alpha", "--address", alpha.address, "--store", url, "--json")

            async def up() -> str | None:
                done = await asyncio.to_thread(alpha.transhume, "up", *own)
                return str(done.json()["token"]) if done.exit_code == 0 else None

            # Until etcd answers, `up` refuses and leaves nothing behind.
            token = await until(up, "alpha is up")
            await asyncio.to_thread(beta.join, alpha.address, token)
            yield Farm(lab, folder, guest), etcd
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def knows(farm: Farm, host: str) -> list[str] | None:
    """The hosts that are heard from, as a person on `host` sees them."""
    try:
        async with farm.client(host) as client:
            return [one.name for one in await client.hosts() if not one.silent]
    except TranshumeError:
        return None


async def test_a_farm_goes_on_without_the_host_that_led_it(
    clustered: tuple[Farm, subprocess.Popen[bytes]],
) -> None:
    farm, etcd = clustered
    alpha, beta = farm.lab.hosts
    assert await knows(farm, "alpha") == await knows(farm, "beta") == ["alpha", "beta"]
    await farm.boot("web")
    assert (await farm.ended(await farm.begin("web", "beta"))).outcome is Outcome.COMPLETED
    newest = await farm.assert_sound("web", "beta")

    os.kill(alpha.daemon_pid(), signal.SIGKILL)

    async def beta_alone() -> bool:
        return await knows(farm, "beta") == ["beta"]

    await until(beta_alone, "beta leads")
    assert farm.runs_on("web") == ["beta"]
    assert "host beta leads the farm" in (beta.state_dir / "daemon.log").read_text()

    await farm.start_daemon("alpha")

    async def both() -> bool:
        return await knows(farm, "alpha") == ["alpha", "beta"]

    await until(both, "alpha is back, and passes on what it is asked")
    async with farm.client("alpha") as client:
        migration = await client.migrate("web", "alpha", MigrationOptions())
    assert (await ended(farm, migration.id)) is Outcome.COMPLETED
    await farm.assert_sound("web", "alpha", newest)
    exported = await asyncio.to_thread(alpha.transhume, "store", "export", str(farm.disks / "farm.jsonl"))
    assert exported.exit_code == 0, exported.stderr

    etcd.kill()

    async def refused() -> bool:
        try:
            async with farm.client("alpha") as client:
                await client.invite()
        except StoreError as error:
            return "cannot be asked" in error.message
        return False

    await until(refused, "changes are refused in words")
    assert farm.runs_on("web") == ["alpha"]


async def ended(farm: Farm, migration: str) -> Outcome:
    """The outcome of a migration, asked of beta."""

    async def over() -> Outcome | None:
        async with farm.client("beta") as client:
            found = await client.migration(migration)
        return found.outcome if found.outcome is not Outcome.RUNNING else None

    outcome: Outcome = await until(over, f"migration {migration} is over")
    return outcome
