"""A guest that is really run: KVM's device may open on a host that is a guest itself, and guests hang with
it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transhume.model.vm import Accel
from transhume.vmm.command_line import CPU_MODELS, DEFAULT_BINARY
from transhume.vmm.rights import user_rights

TRIAL_LIMIT_S = 8.0

ENDS_WITH = 2 * 0x15 + 1
"""QEMU's exit code when the guest has got to its end: isa-debug-exit makes it of what the guest writes."""

_SECTOR_BYTES = 512
_CODE = bytes.fromhex(
    "fafc31c08ed88ec08ed0bc007cb052e6e9bf0080b9001831c0f3ab66c70600800390000066c706009003a0000066c706"
    "00a08300000066b8008000000f22d866b8200600000f22e066b9800000c00f32660d000100000f3066b8110000800f22"
    "c0660f0116b07c66ea6f7c0000080031c08ed048b8887766554433221166480f6ec0660fd4c066480f7ec34801c04839"
    "c37508b04ce6e9b015e6f4f4ebfd6690000000000000000000000000009a20000f00a07c"
)
BOOT_SECTOR = _CODE.ljust(_SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"
"""What `kvm_guest.S` beside this file is assembled to."""

_SAID_BYTES = 400


@dataclass(frozen=True)
class Trial:
    """How it went. `letters` is what the guest printed: `RL` when it got to 64-bit mode."""

    ran: bool
    letters: str = ""
    hung: bool = False
    said: str = ""
    duration_s: float = 0.0


async def run_guest(
    accel: Accel, vm_user: str, limit_s: float = TRIAL_LIMIT_S, binary: str = DEFAULT_BINARY
) -> Trial:
    """Boot the guest as VMs are run: as `vm_user`, with the CPU that they get. Ends within `limit_s` or
    little more, and leaves nothing behind.

    Raises `Refused` when there is no such user.
    """
    program = shutil.which(binary)
    if program is None:
        return Trial(ran=False, said=f"{binary} is not installed")
    uid, gid, further = user_rights(vm_user)
    began_s = asyncio.get_running_loop().time()
    with tempfile.TemporaryDirectory(prefix="th-") as folder:
        Path(folder).chmod(0o711)
        sector = Path(folder) / "sector"
        sector.write_bytes(BOOT_SECTOR)
        sector.chmod(0o444)
        child = await asyncio.create_subprocess_exec(
            *(program, *_arguments(accel, sector)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            user=uid,
            group=gid,
            extra_groups=further,
        )
        letters, said, hung = await _watch(child, limit_s)
    return Trial(
        ran=child.returncode == ENDS_WITH and letters == "RL",
        letters=letters,
        hung=hung,
        said=said,
        duration_s=asyncio.get_running_loop().time() - began_s,
    )


def _arguments(accel: Accel, sector: Path) -> list[str]:
    return [
        *("-machine", "pc", "-accel", accel.value, "-cpu", CPU_MODELS[accel], "-m", "16"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-drive", f"file={sector},if=floppy,format=raw,readonly=on"),
        *("-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]


async def _watch(child: asyncio.subprocess.Process, limit_s: float) -> tuple[str, str, bool]:
    """What the guest and QEMU said until QEMU ended, and whether it had to be ended."""
    assert child.stdout is not None
    assert child.stderr is not None
    reading = [asyncio.create_task(child.stdout.read()), asyncio.create_task(child.stderr.read())]
    hung = False
    try:
        try:
            async with asyncio.timeout(limit_s):
                await child.wait()
        except TimeoutError:
            hung = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        printed, complaints = await asyncio.gather(*reading)
    words = complaints[-_SAID_BYTES:].decode(errors="replace").strip().replace("\n", "; ")
    return printed[:_SAID_BYTES].decode("ascii", errors="replace"), words, hung
