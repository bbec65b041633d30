"""How many logins may fail: for each source address and for each user's name. No I/O; time is an argument."""

from __future__ import annotations

from collections import OrderedDict, deque

WINDOW_S = 300.0
MOST_PER_SOURCE = 10
MOST_PER_USER = 50
"""Higher: whoever knows a name could otherwise keep its owner out with few requests."""

MOST_KEYS = 10_000


class LoginLimit:
    """Failures of the last `WINDOW_S`; forgotten when the controller restarts. Its memory is bounded."""

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()

    def wait_s(self, source: str, user: str, now_s: float) -> float:
        """How long this source, or this name, has to wait until it may try again; 0 when it need not."""
        waits = [0.0]
        for key, most in ((("source", source), MOST_PER_SOURCE), (("user", user), MOST_PER_USER)):
            found = self._failures.get(key)
            while found and found[0] <= now_s - WINDOW_S:
                found.popleft()
            if found and len(found) >= most:
                waits.append(found[-most] + WINDOW_S - now_s)
        return max(waits)

    def failed(self, source: str, user: str, now_s: float) -> None:
        """Note a failure."""
        for key, most in ((("source", source), MOST_PER_SOURCE), (("user", user), MOST_PER_USER)):
            self._failures.setdefault(key, deque(maxlen=most)).append(now_s)
            self._failures.move_to_end(key)
        while len(self._failures) > MOST_KEYS:
            self._failures.popitem(last=False)
