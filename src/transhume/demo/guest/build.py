"""Make the guest that the demo, the tests and the benchmarks boot.

    cache folder/
      kernel-<key>/vmlinuz          Debian's cloud kernel
      kernel-<key>/modules/*.ko     the modules that the guest may insert
      initrd-<key>.img              busybox, the workload and /init, as an initramfs
      lock

A key is a hash of everything that the thing is made from, so what is there is never stale, and what is
made is renamed into place only when it is complete. QEMU opens the files as an unprivileged user, so all
may read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transhume.demo.guest import cpio, kernel_package
from transhume.model.errors import Refused

CACHE_VARIABLE = "TRANSHUME_CACHE_DIR"
DEFAULT_CACHE_DIR = Path("/var/cache/transhume")

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=0 edd=off mitigations=off tsc=reliable no_timer_check"
    " random.trust_cpu=on cryptomgr.notests"
)
"""What makes the kernel boot fast and quietly; a panic stops the guest, so that it is seen."""

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "evdev",
    "button",
)

_SOURCES = Path(__file__).parent
_BUSYBOX = Path("/bin/busybox")
_PROGRAMS = {"workload": ("-fno-tree-vectorize", "-pthread"), "powerd": ()}
"""The guest's own programs, with what their compilation needs besides the common flags. Vector
instructions are emulated slowly, so the workload does without."""

_COMPILER = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-s")


@dataclass(frozen=True)
class Guest:
    """The files that `-kernel` and `-initrd` take."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Workload:
    """What the guest does: see `workload.c` for the meaning of each word."""

    memory_mib: int = 64
    rate_pages_s: int = 0
    hot_mib: int = 0
    verify: bool = True
    verify_pages_s: int = 16384
    beat_ms: int = 2
    spoil_page: int | None = None

    def arguments(self) -> str:
        """The guest kernel's command line for this workload."""
        words = [
            KERNEL_ARGUMENTS,
            f"workload.memory_mib={self.memory_mib}",
            f"workload.rate_pages_s={self.rate_pages_s}",
            f"workload.hot_mib={self.hot_mib}",
            f"workload.verify={int(self.verify)}",
            f"workload.verify_pages_s={self.verify_pages_s}",
            f"workload.beat_ms={self.beat_ms}",
        ]
        if self.spoil_page is not None:
            words.append(f"workload.spoil_page={self.spoil_page}")
        return " ".join(words)


def shell_arguments() -> str:
    """The guest kernel's command line for a guest with a shell on its console and no workload."""
    return f"{KERNEL_ARGUMENTS} guest.mode=shell"


def default_cache_dir() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE, "") or DEFAULT_CACHE_DIR)


def ensure_guest(cache_dir: Path | None = None) -> Guest:
    """Make the guest's kernel and initramfs unless they are there already.

    `cache_dir` must be reachable for QEMU's user, so a home folder will not do; without it the folder
    named in TRANSHUME_CACHE_DIR or /var/cache/transhume is used. Safe to call from several processes at
    once. Raises `Refused` when a tool or the kernel package is missing; what was complete before stays.
    """
    folder = cache_dir or default_cache_dir()
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)  # whatever the umask: QEMU's user must reach the files
        with _lock(folder):
            kernel_dir = _ensure_kernel(folder)
            initrd = _ensure_initrd(folder, kernel_dir)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise Refused(
            f"{folder} cannot be used to keep the guest ({error.strerror}): run as root, or set"
            f" {CACHE_VARIABLE} to a folder that QEMU's user can read"
        ) from error
    return Guest(kernel_dir / "vmlinuz", initrd)


def compile_program(name: str, target: Path) -> None:
    """Compile one of the guest's programs as a static binary. Raises `Refused` with gcc's words."""
    source = _SOURCES / f"{name}.c"
    command = [*_COMPILER, *_PROGRAMS[name], "-o", str(target), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refused("gcc is missing; it compiles the guest's workload: apt install gcc") from error
    if done.returncode != 0:
        raise Refused(f"gcc could not compile {source.name} (is libc6-dev installed?): {done.stderr.strip()}")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ensure_kernel(folder: Path) -> Path:
    key = hashlib.sha256(" ".join(MODULES).encode()).hexdigest()[:12]
    wanted = folder / f"kernel-{key}"
    if not wanted.is_dir():
        files = kernel_package.fetch(MODULES)
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder))
        try:
            _write_kernel(draft, files)
            draft.rename(wanted)
        except BaseException:
            shutil.rmtree(draft)
            raise
    return wanted


def _write_kernel(folder: Path, files: kernel_package.KernelFiles) -> None:
    (folder / "modules").mkdir()
    _write_readable(folder / "vmlinuz", files.image)
    for name, content in files.modules.items():
        _write_readable(folder / "modules" / f"{name}.ko", content)
    (folder / "modules").chmod(0o755)
    folder.chmod(0o755)


def _ensure_initrd(folder: Path, kernel_dir: Path) -> Path:
    wanted = folder / f"initrd-{_initrd_key(kernel_dir)}.img"
    if not wanted.exists():
        with tempfile.TemporaryDirectory(prefix="draft-", dir=folder) as draft:
            content = cpio.archive(_initrd_entries(kernel_dir, Path(draft)))
            _write_readable(Path(draft) / "initrd", content)
            (Path(draft) / "initrd").rename(wanted)
    return wanted


def _initrd_key(kernel_dir: Path) -> str:
    """A hash of what the initramfs is made from; large files count by their size and time."""
    key = hashlib.sha256(repr((MODULES, _COMPILER, _PROGRAMS)).encode())
    for path in (_SOURCES / "init", *(_SOURCES / f"{name}.c" for name in _PROGRAMS), Path(cpio.__file__)):
        key.update(path.read_bytes())
    for path in (_BUSYBOX, kernel_dir / "vmlinuz"):
        if not path.exists():
            raise Refused(f"{path} is missing, and the guest is made with it: apt install busybox-static")
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return key.hexdigest()[:12]


def _initrd_entries(kernel_dir: Path, draft: Path) -> Iterator[cpio.Entry]:
    for name in ("bin", "dev", "modules", "proc", "sys", "tmp"):
        yield cpio.directory(name)
    # Before /dev is mounted the kernel opens this one as the first process's input and output.
    yield cpio.character_device("dev/console", 5, 1)
    yield cpio.program("init", (_SOURCES / "init").read_bytes())
    yield cpio.program("bin/busybox", _BUSYBOX.read_bytes())
    for name in _PROGRAMS:
        compile_program(name, draft / name)
        yield cpio.program(f"bin/{name}", (draft / name).read_bytes())
    for name in MODULES:
        yield cpio.plain_file(f"modules/{name}.ko", (kernel_dir / "modules" / f"{name}.ko").read_bytes())


def _write_readable(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)


def main() -> int:
    """Make the guest and print where it is: what set-up runs."""
    try:
        guest = ensure_guest()
    except Refused as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    sys.stdout.write(f"guest kernel {guest.kernel}\nguest initrd {guest.initrd}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
