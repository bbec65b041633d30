"""A short look at how fast a running VM changes its memory, with the tracker that a migration uses."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestBlock
from transhume.memory.zero import zero_pages
from transhume.migration.driver.attach import TrackedRam
from transhume.model.orders import DirtySample
from transhume.model.vm import PAGE_BYTES
from transhume.vmm.monitor import Monitor

ZERO_SAMPLE_WINDOWS = 64
ZERO_SAMPLE_WINDOW_PAGES = 64


async def sample(monitor: Monitor, pid: int, duration_s: float) -> DirtySample:
    """Track the writes of the VM behind `monitor` for `duration_s`, then let it run free again."""
    tracked = await TrackedRam.attach(monitor, pid)
    try:
        await asyncio.to_thread(tracked.tracker.arm)
        try:
            tracked.tracker.collect()
            began_s = time.monotonic()
            await asyncio.sleep(duration_s)
            dirty_pages = sum(page_runs.page_count(each) for each in tracked.tracker.collect())
            sample_ms = (time.monotonic() - began_s) * 1000
        finally:
            await asyncio.to_thread(tracked.tracker.disarm)
        populated_pages, zero_share = await asyncio.to_thread(_contents, tracked)
    finally:
        tracked.close()
    return DirtySample(
        sample_ms=sample_ms,
        populated_bytes=populated_pages * PAGE_BYTES,
        zero_bytes=int(populated_pages * zero_share) * PAGE_BYTES,
        dirty_bytes=dirty_pages * PAGE_BYTES,
    )


def _contents(tracked: TrackedRam) -> tuple[int, float]:
    """How many pages have memory behind them, and which share of a sample of those is all zeros."""
    populated_pages = 0
    seen_pages = 0
    zero_count = 0
    for block in tracked.ram.blocks:
        runs = block.populated_runs()
        populated_pages += page_runs.page_count(runs)
        if len(runs) == 0:
            continue
        zeros, seen = _zeros_in_sample(block, runs)
        zero_count += zeros
        seen_pages += seen
    return populated_pages, zero_count / seen_pages if seen_pages else 0.0


def _zeros_in_sample(block: GuestBlock, runs: page_runs.Runs) -> tuple[int, int]:
    pieces = page_runs.split(runs, ZERO_SAMPLE_WINDOW_PAGES)
    chosen = np.unique(np.linspace(0, len(pieces) - 1, ZERO_SAMPLE_WINDOWS).astype(np.int64))
    zeros = 0
    seen = 0
    for first, count in pieces[chosen].tolist():
        zeros += int(zero_pages(block.window(first, count)).sum())
        seen += count
    return zeros, seen
