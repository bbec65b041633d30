"""Pacing: how long to wait so that the bytes sent stay within a rate. Pure: time is an argument."""

from __future__ import annotations

_BURST_S = 0.05
"""How much unused time may be caught up: short, so that a paced link never sees a long burst."""


class Pace:
    """A token bucket for one sender.

    `rate_bytes_s` may be changed at any time; None means without limit.
    """

    def __init__(self, rate_bytes_s: float | None) -> None:
        self.rate_bytes_s = rate_bytes_s
        self._free_at_s = float("-inf")

    def delay_s(self, now_s: float, sent_bytes: int) -> float:
        """Account for bytes that were just sent; return how long to wait before sending more.

        `now_s` is any clock that never runs backwards, the same in every call.
        """
        if self.rate_bytes_s is None:
            return 0.0
        self._free_at_s = max(self._free_at_s, now_s - _BURST_S) + sent_bytes / self.rate_bytes_s
        return max(0.0, self._free_at_s - now_s)

    def step_bytes(self, most_bytes: int) -> int:
        """How much to send between two calls of `delay_s`, so that each wait stays short."""
        if self.rate_bytes_s is None:
            return most_bytes
        return min(most_bytes, int(self.rate_bytes_s * _BURST_S))
