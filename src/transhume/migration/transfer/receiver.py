"""Receive pages into guest RAM.

They come by way of a buffer, into which TLS decrypts them, and are written to the memfd from there: mapping
the memfd costs a page fault for each page, which takes twice the time. So guest RAM is never mapped, and the
receiver's size does not depend on the VM's.

Pages named as zero are punched out of the memfd, whatever was there before: they take no memory.

Threads: a `PageReceiver` is the one receiver of its channel and belongs to one thread at a time. The VM
must not run before the last page has come: pages are not placed atomically. Once a pager is armed, pages go
through it instead, one copy more, and are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestBlock, GuestRam
from transhume.memory.runs import Runs
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.pager import Pager
from transhume.migration.wire import FrameType, Header, Message
from transhume.model.errors import KernelError
from transhume.model.vm import PAGE_BYTES

_BUFFER_PAGES = 256


class PageReceiver:
    """Takes PAGES and ZERO frames off a channel into RAM, and hands everything else to its caller."""

    def __init__(self, channel: FrameChannel, ram: GuestRam) -> None:
        self._channel = channel
        self._ram = ram
        self.pager: Pager | None = None
        self._owed: list[Runs] = [page_runs.empty() for _ in ram.blocks]
        self._pages = 0
        self._zero_pages = 0
        self._content = bytearray(_BUFFER_PAGES * PAGE_BYTES)
        self._buffer = memoryview(self._content)

    def receive(self) -> Message | bytes:
        """Place pages until a frame of another kind comes: a message, or a chunk of device state.

        Everything sent before that frame is in RAM when this returns. Blocks; raises `HostLost` when the
        connection fails or the peer is silent too long, `PeerProtocolError` when it breaks the protocol,
        `KernelError` when the host has no memory for a page. After an error the channel is of no use.
        """
        while True:
            header = self._channel.receive_header()
            if header.type is FrameType.PAGES:
                self._receive_pages(header)
            elif header.type is FrameType.ZERO:
                self._receive_zeros(header)
            elif header.type is FrameType.OWED:
                index = header.block_index
                self._owed[index] = page_runs.union(self._owed[index], self._receive_runs(header))
            elif header.type is FrameType.STATE:
                chunk = bytearray(header.payload_bytes)
                self._channel.receive_into(memoryview(chunk))
                return bytes(chunk)
            else:
                return self._channel.receive_message(header)

    def take_counts(self) -> tuple[int, int]:
        """Pages and zero pages received since the last call; compare them with the sender's totals."""
        counts = self._pages, self._zero_pages
        self._pages = self._zero_pages = 0
        return counts

    def take_owed(self) -> list[Runs]:
        """The pages of each block that were named as owed since the last call."""
        owed = self._owed
        self._owed = [page_runs.empty() for _ in self._ram.blocks]
        return owed

    def _receive_runs(self, header: Header) -> Runs:
        table = bytearray(header.table_bytes)
        self._channel.receive_into(memoryview(table))
        return self._channel.decoder.runs(header, table)

    def _receive_pages(self, header: Header) -> None:
        runs = self._receive_runs(header)
        block = self._ram.blocks[header.block_index]
        pages = page_runs.page_count(runs)
        self._pages += pages
        if self.pager is not None:
            self._hand_to_pager(self.pager, header.block_index, runs)
            return
        with _no_memory_named(block):
            self._copy_into(block, runs)

    def _hand_to_pager(self, pager: Pager, block_index: int, runs: Runs) -> None:
        for batch in page_runs.batches(runs, _BUFFER_PAGES, _BUFFER_PAGES):
            self._channel.receive_into(self._buffer[: page_runs.page_count(batch) * PAGE_BYTES])
            pager.push(block_index, batch, self._content)

    def _receive_zeros(self, header: Header) -> None:
        runs = self._receive_runs(header)
        if self.pager is not None:
            self._zero_pages += page_runs.page_count(runs)
            self.pager.push_zeros(header.block_index, runs)
            return
        block = self._ram.blocks[header.block_index]
        for first, count in runs.tolist():
            block.punch(first, count)
        self._zero_pages += page_runs.page_count(runs)

    def _copy_into(self, block: GuestBlock, runs: Runs) -> None:
        for batch in page_runs.batches(runs, _BUFFER_PAGES, _BUFFER_PAGES):
            content = self._buffer[: page_runs.page_count(batch) * PAGE_BYTES]
            self._channel.receive_into(content)
            position = 0
            for first, count in batch.tolist():
                end = position + count * PAGE_BYTES
                written = os.pwrite(block.fd, content[position:end], first * PAGE_BYTES)
                if written != end - position:
                    raise OSError(0, "the kernel took only a part")
                position = end


@contextlib.contextmanager
def _no_memory_named(block: GuestBlock) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KernelError(
            f"This host cannot take a page of {block.block.name} into memory: {error.strerror}. "
            "Free memory, or choose another destination."
        ) from None
