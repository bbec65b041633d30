"""Which pages did the guest write? Asynchronous write protection, asked for by PAGEMAP_SCAN.

The invariant that no write is lost rests on the order: `collect` first, read the pages' content after.
A write before the scan is in its answer; a write after it is in the next one, whether or not the
reader saw it.
"""

from __future__ import annotations

import contextlib

from transhume.memory import runs as page_runs
from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.memory.userfaultfd import REGISTER_WP, Userfaultfd
from transhume.model.errors import TranshumeError
from transhume.model.vm import PAGE_BYTES


class DirtyTracker:
    """Tracks the writes of one process to all RAM blocks of a VM. One thread at a time.

    It sees what goes through QEMU's page tables: vCPUs, device models and the kernel's copies for QEMU.
    It does not see DMA into pages pinned before (O_DIRECT, VFIO) nor other processes' mappings: the
    pre-flight refuses VMs that have those.
    """

    def __init__(self, uffd: Userfaultfd, scanner: Scanner, ram: GuestRam) -> None:
        self._uffd = uffd
        self._scanner = scanner
        self._ram = ram

    def arm(self) -> None:
        """Begin: from its return on, every write is reported by a later `collect`.

        Works also where an earlier mover died and left its tracking on. On an error everything is
        disarmed as far as the kernel allows.
        """
        try:
            for each in self._ram.blocks:
                self._uffd.register(each.address, each.block.size_bytes, REGISTER_WP)
                self._uffd.write_protect(each.address, each.block.size_bytes)
        except TranshumeError:
            with contextlib.suppress(TranshumeError):
                self.disarm()
            raise

    def collect(self) -> list[Runs]:
        """Get and clear: for each block, the pages written since the last call. Read them only after."""
        return [self._scanner.get_and_clear(each.address, each.block.size_bytes) for each in self._ram.blocks]

    def collect_range(self, block_index: int, first_page: int, page_count: int) -> Runs:
        """Get and clear for a part of one block. Pages are counted from the begin of the block."""
        each = self._ram.blocks[block_index]
        found = self._scanner.get_and_clear(each.address + first_page * PAGE_BYTES, page_count * PAGE_BYTES)
        return page_runs.shifted(found, first_page)

    def disarm(self) -> None:
        """End: the guest writes at full speed again. Harmless when nothing was armed."""
        for each in self._ram.blocks:
            self._uffd.unregister(each.address, each.block.size_bytes)
