"""The clock: kept by somebody, and equal to the farm's."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from transhume.model.finding import Finding, error, note, ok, warning

APART_S = 1.0
"""So far two clocks may be apart before it is told."""

TOO_FAR_APART_S = 60.0
"""Tokens, certificates and leases are judged by the clock: beyond this a host would refuse, or be refused."""

_UNSYNCHRONIZED = 0x40  # STA_UNSYNC in struct timex
_STATUS_AT = 40
_TIMEX_BYTES = 256


@dataclass(frozen=True)
class ClockFacts:
    """`synchronized` is None when the kernel does not say. `offset_s` is how far this clock is ahead of the
    controller's, None when it was not asked; `error_s` how wrong that can be.
    """

    synchronized: bool | None
    offset_s: float | None = None
    error_s: float = 0.0


def synchronized() -> bool | None:
    """Whether some time service keeps this clock, as the kernel knows from it (`adjtimex`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    if libc.adjtimex(buffer) < 0:
        code = ctypes.get_errno()
        # Containers may forbid even to ask.
        assert code in (errno.EPERM, errno.ENOSYS, errno.EACCES), os.strerror(code)
        return None
    (status,) = struct.unpack_from("=i", buffer, _STATUS_AT)
    return not status & _UNSYNCHRONIZED


def offset(asked_at_s: float, answered_at_s: float, controller_s: float) -> tuple[float, float]:
    """How far this clock is ahead, and how wrong that can be: the answer came from some moment in between."""
    return (asked_at_s + answered_at_s) / 2 - controller_s, (answered_at_s - asked_at_s) / 2


def judge(facts: ClockFacts) -> list[Finding]:
    findings = []
    mend = "install a time service (Debian: apt install chrony) on all hosts"
    if facts.offset_s is not None:
        apart_s = max(0.0, abs(facts.offset_s) - facts.error_s)
        direction = "ahead of" if facts.offset_s > 0 else "behind"
        words = f"this clock is {abs(facts.offset_s):.1f} s {direction} the controller's"
        if apart_s > TOO_FAR_APART_S:
            findings.append(error("clock", words, f"set it; {mend}"))
        elif apart_s > APART_S:
            findings.append(warning("clock", words, mend))
        else:
            findings.append(ok("clock", "this clock agrees with the controller's"))
    if facts.synchronized is None:
        findings.append(note("clock", "the kernel does not say whether a time service keeps the clock"))
    elif facts.synchronized:
        findings.append(ok("clock", "a time service keeps the clock"))
    elif facts.offset_s is None:
        findings.append(warning("clock", "no time service keeps the clock", mend))
    else:
        findings.append(note("clock", "no time service keeps the clock of this host", mend))
    return findings
