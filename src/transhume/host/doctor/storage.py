"""The state folder: its file system, its room, and what it must allow."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from transhume.memory.syscalls import punch_hole
from transhume.model.errors import KernelError, Refused
from transhume.model.finding import Finding, error, note, ok, warning
from transhume.vmm.paths import VmPaths
from transhume.vmm.rights import user_rights

_MOUNTINFO = Path("/proc/self/mountinfo")

TOO_LITTLE_BYTES = 64 << 20
LITTLE_BYTES = 1 << 30
FEW_FILES = 1000

OVER_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "fuse.sshfs", "fuse.glusterfs"})
IN_MEMORY = frozenset({"tmpfs", "ramfs"})

_LONGEST_NAME = "n" * 63
_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Mount:
    """One mounted file system. `options` are those of the mount and of the file system."""

    point: str
    kind: str
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StorageFacts:
    """What is known of `folder`, or of the nearest folder above it that exists.

    `free_files` is None where the file system has no limit. `punches_holes` and `direct` are None when it
    could not be tried. `no_way` is why QEMU's user cannot pass through to it, empty when it can.
    """

    folder: str
    mount: Mount
    free_bytes: int
    free_files: int | None = None
    punches_holes: bool | None = None
    direct: bool | None = None
    write_refusal: str = ""
    no_way: str = ""
    longest_name_fits: bool = True


async def gather(state_dir: Path, vm_user: str) -> StorageFacts:
    """Look at the folder. A nameless file is written in it and goes by itself; nothing else changes."""
    existing = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    room = os.statvfs(existing)
    refusal, holes, direct = _try_file(existing)
    return StorageFacts(
        folder=str(state_dir),
        mount=mount_of(existing.resolve(), _MOUNTINFO.read_text()),
        free_bytes=room.f_bavail * room.f_frsize,
        free_files=room.f_favail if room.f_files else None,
        punches_holes=holes,
        direct=direct,
        write_refusal=refusal,
        no_way=await _no_way(existing, vm_user),
        longest_name_fits=_fits(state_dir),
    )


def mount_of(path: Path, mountinfo: str) -> Mount:
    """The mount that `path` is on, of the text of /proc/self/mountinfo: the longest point that leads to
    it, and of two on one point the later.
    """
    best = Mount("", "unknown")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, further = before.split(), after.split()
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
        if path.is_relative_to(point) and len(point) >= len(best.point):
            best = Mount(point, further[0], frozenset(f"{words[5]},{further[-1]}".split(",")))
    return best


def judge(facts: StorageFacts) -> list[Finding]:
    findings = [*_judge_kind(facts), *_judge_room(facts)]
    if facts.no_way:
        findings.append(
            error(
                "storage",
                f"QEMU could not reach its files: {facts.no_way}",
                "let everybody pass through the folders above (chmod o+x), or choose another --state-dir",
            )
        )
    if not facts.longest_name_fits:
        findings.append(
            note(
                "storage",
                f"the path {facts.folder} is so long that VMs with long names do not start",
                "choose a shorter --state-dir, or short names",
            )
        )
    if facts.punches_holes is False:
        findings.append(
            note(
                "storage",
                f"{facts.mount.kind} makes no holes in files: disk images there take their whole size",
            )
        )
    if facts.direct is False:
        findings.append(note("storage", f"{facts.mount.kind} does not read past the page cache (O_DIRECT)"))
    if all(finding.level == "note" for finding in findings):
        room = f"{facts.free_bytes >> 20} MiB free on {facts.mount.kind}"
        findings.insert(0, ok("storage", f"{facts.folder}: {room}"))
    return findings


def _judge_kind(facts: StorageFacts) -> list[Finding]:
    kind, where = facts.mount.kind, facts.folder
    if "ro" in facts.mount.options:
        return [
            error("storage", f"{where} is on a file system that is mounted read-only", "mount it writable")
        ]
    if facts.write_refusal:
        return [
            error(
                "storage",
                f"nothing can be written in {where}: {facts.write_refusal}",
                "mend that, or choose another --state-dir",
            )
        ]
    if kind in OVER_NETWORK:
        return [
            error(
                "storage",
                f"{where} is on {kind}, and the farm's records need the locks and the fsync of a local "
                f"file system",
                "choose a folder on a local disk with --state-dir; disk images of VMs may stay on "
                "shared storage",
            )
        ]
    if kind in IN_MEMORY:
        return [
            warning(
                "storage",
                f"{where} is on {kind}: a restart of this server forgets the farm",
                "choose a folder on a disk with --state-dir",
            )
        ]
    return []


def _judge_room(facts: StorageFacts) -> list[Finding]:
    free = f"{facts.free_bytes >> 20} MiB are free for {facts.folder}"
    findings = []
    if facts.free_bytes < TOO_LITTLE_BYTES:
        findings.append(error("storage", f"only {free}", "make room, or choose another --state-dir"))
    elif facts.free_bytes < LITTLE_BYTES:
        findings.append(
            warning("storage", f"only {free}, where records and the logs of VMs are kept", "make room")
        )
    if facts.free_files is not None and facts.free_files < FEW_FILES:
        findings.append(
            warning(
                "storage",
                f"only {facts.free_files} more files can be made on the file system of {facts.folder}",
                "remove small files, or choose another --state-dir",
            )
        )
    return findings


def _try_file(folder: Path) -> tuple[str, bool | None, bool | None]:
    """Why nothing can be written in `folder`, and whether holes and direct reading work there."""
    try:
        # Nameless: it is gone when it is closed, even if this process dies.
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except IsADirectoryError:
        return "", None, None
    except OSError as refusal:
        # Not every file system has nameless files; whether one may write is another question.
        return ("", None, None) if os.access(folder, os.W_OK) else (refusal.strerror or "", None, None)
    try:
        os.pwrite(fd, b"x" * _BLOCK_BYTES, 0)
        return "", _punches(fd), _reads_directly(fd)
    except OSError as refusal:
        return refusal.strerror or str(refusal), None, None
    finally:
        os.close(fd)


def _punches(fd: int) -> bool:
    try:
        punch_hole(fd, 0, _BLOCK_BYTES)
    except (KernelError, OSError):
        return False
    return True


def _reads_directly(fd: int) -> bool:
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, _BLOCK_BYTES) as aligned:
            os.preadv(again, [aligned], 0)
    except OSError:
        return False
    finally:
        os.close(again)
    return True


async def _no_way(folder: Path, vm_user: str) -> str:
    try:
        uid, gid, further = user_rights(vm_user)
    except Refused:
        return ""  # told by another check
    child = await asyncio.create_subprocess_exec(
        *("/usr/bin/test", "-x", str(folder)),
        stdin=subprocess.DEVNULL,
        cwd="/",
        user=uid,
        group=gid,
        extra_groups=further,
    )
    return f"{vm_user} may not pass through {folder}" if await child.wait() else ""


def _fits(state_dir: Path) -> bool:
    try:
        VmPaths(state_dir / "vms" / _LONGEST_NAME).check_lengths()
    except Refused:
        return False
    return True
