"""The source's answer to faults: read the pages that a waiting vCPU needs, and send them at once.

It has a connection and a thread of its own, so that no push stands in its way. The VM is suspended here: its
pages do not change any more.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.memory.syscalls import checked, held
from transhume.migration import wire
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import FrameType
from transhume.model.errors import PeerProtocolError
from transhume.model.vm import PAGE_BYTES

_ZEROS = bytes(PAGE_BYTES)
_BATCH_PAGES = 256
LEAST_FETCH_BYTES = wire.HEADER_BYTES + wire.RUN_BYTES
"""Every request names at least one run."""


def serve_faults(
    channel: FrameChannel,
    ram: GuestRam,
    on_page: Callable[[int, int], None],
    on_pages: Callable[[int, Runs], None],
) -> None:
    """Answer FETCH frames until the connection ends, which raises `HostLost` or `PeerProtocolError`.

    `on_page(block_index, page)` or `on_pages(block_index, runs)` is told after each answer.
    """
    channel.wait_for_ever()
    begin = memoryview(bytearray(LEAST_FETCH_BYTES))
    buffer = ctypes.create_string_buffer(PAGE_BYTES)
    while True:
        # Header and first run in one: the usual request has no other.
        channel.receive_into(begin)
        header = channel.decoder.header(begin[: wire.HEADER_BYTES])
        if header.type is not FrameType.FETCH:
            raise PeerProtocolError(f"{channel.peer} sent {header.type.name} on the fault connection.")
        table = bytearray(header.table_bytes)
        table[: len(begin) - wire.HEADER_BYTES] = begin[wire.HEADER_BYTES :]
        channel.receive_into(memoryview(table)[len(begin) - wire.HEADER_BYTES :])
        page = channel.decoder.only_page(header, table)
        if page is not None:
            _answer_one(channel, ram, header.block_index, page, buffer)
            on_page(header.block_index, page)
            continue
        runs = channel.decoder.runs(header, table)
        for batch in page_runs.batches(runs, _BATCH_PAGES, _BATCH_PAGES):
            _answer(channel, ram, header.block_index, batch)
        on_pages(header.block_index, runs)


def _answer_one(
    channel: FrameChannel, ram: GuestRam, index: int, page: int, buffer: ctypes.Array[ctypes.c_char]
) -> None:
    """A vCPU waits: nothing between request and answer gives another thread the interpreter."""
    if checked(held.pread(ram.blocks[index].fd, buffer, PAGE_BYTES, page * PAGE_BYTES)) != PAGE_BYTES:
        raise OSError(errno.EIO, f"page {page} of RAM block {index} is behind its end")
    content = buffer.raw
    kind = FrameType.ZERO if content == _ZEROS else FrameType.PAGES
    with channel.frame():
        begin = wire.encode_page_name(kind, index, page, channel.version)
        channel.write_at_once(begin if kind is FrameType.ZERO else begin + content)


def _answer(channel: FrameChannel, ram: GuestRam, index: int, runs: Runs) -> None:
    fd = ram.blocks[index].fd
    content = b"".join(os.pread(fd, count * PAGE_BYTES, first * PAGE_BYTES) for first, count in runs.tolist())
    with channel.frame():
        if content == _ZEROS:
            channel.write(wire.encode_zero(index, runs, channel.version))
        else:
            channel.write(wire.encode_pages(index, runs, channel.version) + content)
