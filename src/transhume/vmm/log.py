"""What QEMU wrote into its log: the only place where it says why it ended."""

from __future__ import annotations

from transhume.vmm.paths import VmPaths

LAST_WORDS_LINES = 8
LAST_WORDS_BYTES = 8192


def log_size(paths: VmPaths) -> int:
    """How long the log is now, in bytes: a mark from which to read on."""
    try:
        return paths.qemu_log.stat().st_size
    except FileNotFoundError:
        return 0


def last_words(paths: VmPaths, from_byte: int = 0) -> str:
    """The last lines that QEMU wrote behind the mark `from_byte`, joined to one; `nothing` if none."""
    try:
        with paths.qemu_log.open("rb") as log:
            log.seek(max(from_byte, log_size(paths) - LAST_WORDS_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    return "; ".join(said[-LAST_WORDS_LINES:]) or "nothing"
