"""Work that a daemon does again and again, for as long as it lives.

Nobody waits for the end of such a task, so nobody would notice that it ended by an error: a host without
heartbeats counts as lost, though its VMs run. Therefore no failure ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from transhume.model.errors import TranshumeError

log = logging.getLogger(__name__)


async def again(what: str, pause_s: float, step: Callable[[], Awaitable[None]], at_once: bool = True) -> None:
    """Carry out `step`, rest for `pause_s` seconds, and again, until the task is cancelled.

    `at_once` False rests first. A failure is told in the log ("could not `what`"), once until it changes or
    passes: in a line when it is of a known kind, with its traceback when it is a mistake of this program.
    """
    told = ""
    while True:
        if not at_once:
            await asyncio.sleep(pause_s)
        try:
            await step()
            told = ""
        except (TranshumeError, OSError) as error:
            told = _tell(what, str(error), told)
        except Exception as error:  # noqa: BLE001 - see above: whatever it is, the next turn must come
            told = _tell(what, repr(error), told, mistake=True)
        if at_once:
            await asyncio.sleep(pause_s)


def _tell(what: str, words: str, told: str, mistake: bool = False) -> str:
    """In an exception's handler. What was told."""
    if words != told:
        log.warning("could not %s: %s", what, words, exc_info=mistake)
    return words
