"""A QEMU without a machine, started only to be asked, and ended again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from transhume.model.errors import VmmError
from transhume.vmm.command_line import DEFAULT_BINARY
from transhume.vmm.qmp import Qmp
from transhume.vmm.rights import user_rights

_BARE = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S")

LAST_WORDS_BYTES = 600


@asynccontextmanager
async def bare_qemu(
    binary: str = DEFAULT_BINARY,
    options: Sequence[str] = (),
    *,
    user: str | None = None,
    deadline_s: float = 20.0,
) -> AsyncIterator[Qmp]:
    """The monitor of a QEMU with `options` and no machine, which runs as `user` (by default as this process).

    `VmmError`, with QEMU's last words, when there is none or it does not answer within `deadline_s`.
    """
    program = shutil.which(binary)
    if program is None:
        raise VmmError(f"{binary} is not installed on this host: install QEMU for x86 systems")
    rights: dict[str, Any] = {}
    if user is not None:
        rights["user"], rights["group"], rights["extra_groups"] = user_rights(user)
    with tempfile.TemporaryDirectory(prefix="th-") as folder, tempfile.TemporaryFile() as said:
        if user is not None:
            shutil.chown(folder, rights["user"])
        socket_path = Path(folder) / "qmp.sock"
        child = await asyncio.create_subprocess_exec(
            *(program, *_BARE, *options, "-qmp", f"unix:{socket_path},server=on,wait=off"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            **rights,
        )
        try:
            qmp = await _connect(child, socket_path, deadline_s)
            try:
                yield qmp
            finally:
                await qmp.close()
        except VmmError as error:
            said.seek(0)
            words = said.read()[-LAST_WORDS_BYTES:].decode(errors="replace").strip().replace("\n", "; ")
            raise VmmError(f"{error.message}; it said: {words}" if words else error.message) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _connect(child: asyncio.subprocess.Process, path: Path, deadline_s: float) -> Qmp:
    """Connect, or learn at once that the program has ended."""
    connecting = asyncio.create_task(Qmp.connect(path, deadline_s))
    death = asyncio.create_task(child.wait())
    try:
        await asyncio.wait((connecting, death), return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise VmmError(f"nobody listens at {path}: QEMU ended at once with the code {child.returncode}")
        return connecting.result()
    finally:
        for task in (connecting, death):
            task.cancel()
        await asyncio.gather(connecting, death, return_exceptions=True)
