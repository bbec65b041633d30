"""The mover: one process for each migration and end, which carries the data and drives its machine.

Started by the daemon, it lives in a session of its own and needs the daemon for nothing: it talks to QEMU,
to the other end and to the register by itself, and leaves a journal. A mover that finds an earlier one's
journal is its successor and ends what that one began.

    python -m transhume.mover FOLDER      works in the folder
    python -m transhume.mover --standby   imports everything, then waits for the folder's name on its
                                          standard input: a migration need not wait for Python to start

The lock comes before anything else, so that a folder never has two movers at work.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

from transhume.api.controller_client import ControllerClient
from transhume.host.config import HostConfig
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.destination_driver import DestinationDriver
from transhume.migration.driver.job import MoverFolder, Role
from transhume.migration.driver.journal import Journal
from transhume.migration.driver.source_driver import SourceDriver
from transhume.trust.credentials import Credentials
from transhume.vmm.paths import VmPaths

ANOTHER_LIVES = 7
"""Exit code of a mover that found the folder taken."""

STANDBY = "--standby"

SWITCH_INTERVAL_S = 0.0001
"""How long a thread may keep the interpreter from another: at the switchover a few threads pass the work on
from one to the next, and Python's 5 ms would be a large part of the downtime. While pages are owed, a vCPU
waits for such a turn.
"""


def main() -> int:
    """Run one mover; the exit code is 0 when it came to its end, or when it was never needed."""
    if sys.argv[1] == STANDBY:
        path = sys.stdin.readline().strip()
        if not path:
            return 0  # the daemon has gone
        folder = MoverFolder(Path(path))
        _log_to(folder)
    else:
        folder = MoverFolder(Path(sys.argv[1]))
    lock = folder.try_lock()
    if lock is None:
        return ANOTHER_LIVES
    with suppress(OSError):  # it is for people: a full disk must not keep a successor from its work
        folder.pid_file.write_text(f"{os.getpid()}\n")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # what was imported stays: the collector need not walk through it while a VM stands still
    asyncio.run(_move(folder))
    return 0


def _log_to(folder: MoverFolder) -> None:
    """Say the rest where a mover of this folder says it."""
    log = os.open(folder.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)


async def _move(folder: MoverFolder) -> None:
    job = folder.read_job()
    config = HostConfig.model_validate_json((job.state_dir / "host.json").read_text())
    journal = Journal(folder.journal_file)
    link = ControllerClient(config)
    control = ControlServer(folder.control_socket)
    credentials = Credentials(config.files)
    paths = VmPaths(config.vms_dir / job.migration.vm)
    try:
        if job.role is Role.SOURCE:
            driver: SourceDriver | DestinationDriver = SourceDriver(
                job, paths, journal, link, control, credentials
            )
        else:
            driver = DestinationDriver(
                job,
                paths,
                journal,
                link,
                control,
                config.address,
                config.vm_user,
                credentials,
                config.other_addresses,
            )
        control.cancel = driver.cancel
        if isinstance(driver, SourceDriver):
            control.adjust = driver.adjust
            control.revive = driver.revive
        await control.open()
        await driver.run()
    finally:
        await control.close()
        await link.close()
        journal.close()


if __name__ == "__main__":
    sys.exit(main())
