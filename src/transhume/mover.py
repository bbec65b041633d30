"""The mover: one process for each migration and end, which carries the data and drives its machine.

Started by the daemon as `python -m transhume.mover FOLDER`, it lives in a session of its own and
needs the daemon for nothing: it talks to QEMU, to the other end and to the register by itself, and leaves a
journal. A mover that finds an earlier one's journal is its successor and ends what that one began.

The lock comes before the imports that take time, so that a folder never has two movers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transhume.migration.driver.job import MoverFolder

ANOTHER_LIVES = 7
"""Exit code of a mover that found the folder taken."""


def main() -> int:
    """Run the mover of the folder named on the command line; the exit code is 0 when it came to its end."""
    folder = MoverFolder(Path(sys.argv[1]))
    lock = folder.try_lock()
    if lock is None:
        return ANOTHER_LIVES
    folder.pid_file.write_text(f"{os.getpid()}\n")
    import asyncio

    asyncio.run(_move(folder))
    return 0


async def _move(folder: MoverFolder) -> None:
    from transhume.api.controller_client import ControllerClient
    from transhume.host.config import HostConfig
    from transhume.migration.driver.control import ControlServer
    from transhume.migration.driver.destination_driver import DestinationDriver
    from transhume.migration.driver.job import Role
    from transhume.migration.driver.journal import Journal
    from transhume.migration.driver.source_driver import SourceDriver
    from transhume.vmm.paths import VmPaths

    job = folder.read_job()
    config = HostConfig.model_validate_json((job.state_dir / "host.json").read_text())
    journal = Journal(folder.journal_file)
    link = ControllerClient(config)
    control = ControlServer(folder.control_socket)
    paths = VmPaths(config.vms_dir / job.migration.vm)
    try:
        if job.role is Role.SOURCE:
            driver: SourceDriver | DestinationDriver = SourceDriver(job, paths, journal, link, control)
        else:
            driver = DestinationDriver(job, paths, journal, link, control, config.address, config.vm_user)
        control.cancel = driver.cancel
        await control.open()
        await driver.run()
    finally:
        await control.close()
        await link.close()
        journal.close()


if __name__ == "__main__":
    sys.exit(main())
