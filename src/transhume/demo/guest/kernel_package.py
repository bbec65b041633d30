"""Debian's cloud kernel, taken out of its package without installing it.

`linux-image-cloud-amd64` only depends on the package of the current kernel version; that one is
downloaded by apt, which checks its signature, and read as a tar stream. Nothing reaches /boot.
"""

from __future__ import annotations

import lzma
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from transhume.model.errors import Refused

_META_PACKAGE = "linux-image-cloud-amd64"
_APT_LIMIT_S = 300


@dataclass(frozen=True)
class KernelFiles:
    """A kernel image and the modules that were asked for, by name (`virtio_blk`)."""

    image: bytes
    modules: dict[str, bytes]


def fetch(module_names: Iterable[str]) -> KernelFiles:
    """Download the current kernel package and read the kernel and the named modules out of it.

    Raises `Refused` when apt does not know or cannot download the package, or when it lacks a module.
    """
    with tempfile.TemporaryDirectory(prefix="transhume-kernel-") as folder:
        return _read_package(_download(Path(folder)), set(module_names))


def _download(folder: Path) -> Path:
    """Download the package into `folder`, with new package lists when the old ones are of no use."""
    name = _current_kernel_package()
    if name is None or not _apt_download(name, folder):
        _apt_update()
        name = _current_kernel_package()
        if name is None:
            raise Refused(
                f"apt knows no package {_META_PACKAGE}, where the guest's kernel comes from: check"
                " /etc/apt/sources.list (Debian's main section is needed)"
            )
        if not _apt_download(name, folder):
            raise Refused(
                f"apt cannot download {name}, where the guest's kernel comes from: check that this machine"
                f" reaches its Debian mirror ('apt-get download {name}' shows the reason)"
            )
    return next(folder.glob("*.deb"))


def _current_kernel_package() -> str | None:
    shown = _run("apt-cache", "show", "--no-all-versions", _META_PACKAGE)
    depends = re.search(r"^Depends:.*?(linux-image-[0-9][\w.+-]*-cloud-amd64)", shown.stdout, re.MULTILINE)
    return depends.group(1) if depends else None


def _apt_download(name: str, folder: Path) -> bool:
    # apt's own user may not write to the folder, which is no reason to complain.
    done = _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name, folder=folder)
    return done.returncode == 0 and any(folder.glob("*.deb"))


def _apt_update() -> None:
    """Refresh the package lists. A failure shows when the package is asked for again."""
    _run("apt-get", "-q", "update")


def _run(*command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_APT_LIMIT_S
        )
    except FileNotFoundError as error:
        raise Refused(
            f"{command[0]} is missing: the guest's kernel comes out of a Debian package, so it can only be"
            " made on Debian or a system derived from it"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Refused(
            f"'{' '.join(command)}' did not end within {_APT_LIMIT_S} s: check the way to the Debian mirror"
        ) from error


def _read_package(package: Path, module_names: set[str]) -> KernelFiles:
    image = b""
    modules: dict[str, bytes] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as files:
            for member in files:
                path = PurePosixPath(member.name)
                module = path.name.partition(".ko")[0] if ".ko" in path.suffixes else ""
                is_image = path.name.startswith("vmlinuz-")
                if not member.isfile() or not (is_image or module in module_names):
                    continue
                content = files.extractfile(member)
                assert content is not None
                if is_image:
                    image = content.read()
                else:
                    modules[module] = _unpacked_module(path, content.read())
    missing = sorted(module_names - modules.keys())
    if unpacker.returncode != 0 or not image or missing:
        raise Refused(
            f"{package.name} is not the kernel package that was expected"
            f" (kernel {'found' if image else 'missing'}, modules missing: {', '.join(missing) or 'none'})"
        )
    return KernelFiles(image, modules)


def _unpacked_module(path: PurePosixPath, content: bytes) -> bytes:
    """Newer Debian releases compress modules; the guest's insmod takes them plain."""
    return lzma.decompress(content) if path.suffix == ".xz" else content
