"""What a daemon does again and again goes on, whatever one turn meets."""

from __future__ import annotations

import asyncio
import logging

import pytest

from transhume.host.steady import again
from transhume.model.errors import HostLost


async def _turns(troubles: list[Exception | None], at_once: bool = True) -> int:
    """How many turns there were, when each met one of the troubles and all are over."""
    over = asyncio.Event()
    turns = 0

    async def step() -> None:
        nonlocal turns
        turns += 1
        if turns > len(troubles):
            over.set()
            return
        trouble = troubles[turns - 1]
        if trouble is not None:
            raise trouble

    working = asyncio.create_task(again("do the work", 0.0, step, at_once))
    await asyncio.wait_for(over.wait(), 20)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert working.cancelled()
    return turns


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "trouble",
    [HostLost("nobody there"), OSError(28, "No space left on device"), AssertionError("that cannot be")],
    ids=["ours", "the kernel's", "a mistake"],
)
async def test_no_failure_ends_it(trouble: Exception, at_once: bool) -> None:
    assert await _turns([trouble, None, trouble], at_once) >= 4


async def test_a_failure_that_lasts_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lost = [HostLost("nobody there") for _ in range(3)]
    await _turns([*lost, None, HostLost("nobody there"), HostLost("somebody else")])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "could not do the work: nobody there",
        "could not do the work: nobody there",
        "could not do the work: somebody else",
    ]


async def test_a_mistake_leaves_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    await _turns([AssertionError("that cannot be"), HostLost("nobody there")])
    mistake, known = caplog.records
    assert mistake.exc_info is not None
    assert not known.exc_info
