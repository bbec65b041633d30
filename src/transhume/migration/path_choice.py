"""Which of the destination's addresses the source tries, in which order, and how long each. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONNECT_EACH_S = 2.0
"""An address where nobody answers holds the next one up for so long: the kernel, which asks again after 1 s,
asks twice."""

_MOST_DOUBLINGS = 10


@dataclass(frozen=True)
class Attempt:
    """One try: `connect_s` for the connection, which needs no more than the path; then `answer_s` for each
    answer of the destination's mover.
    """

    address: str
    connect_s: float
    answer_s: float


class PathChoice:
    """The addresses of one destination in the order of trust: what worked last comes first, what was tried in
    vain last comes last. So each round of a search tries all of them, and begins where the one before did.
    """

    def __init__(self, addresses: Sequence[str], silence_limit_s: float) -> None:
        self._order = tuple(dict.fromkeys(addresses))
        self._silence_limit_s = silence_limit_s
        self._tries = 0
        self.last_worked = self._order[0]
        """The address that worked last; the first one before any did."""

    @property
    def is_choice(self) -> bool:
        return len(self._order) > 1

    def attempts(self, again: bool) -> tuple[Attempt, ...]:
        """The next round. `again`: a destination that waits for its source is looked for again, and takes
        each new connection in the place of the one before; the first time it takes only one.

        Who has accepted a connection and says nothing is left, too, when there is somewhere else to go and
        he may be asked again; twice as late with each round, because a busy host is no broken path.
        """
        limit_s = self._silence_limit_s
        if not self.is_choice:
            return (Attempt(self._order[0], limit_s, limit_s),)
        rounds = min(self._tries // len(self._order), _MOST_DOUBLINGS)
        answer_s = min(limit_s, CONNECT_EACH_S * 2**rounds) if again else limit_s
        connect_s = min(limit_s, CONNECT_EACH_S)
        return tuple(Attempt(address, connect_s, answer_s) for address in self._order)

    def worked(self, address: str) -> None:
        """All connections were made to this address."""
        self._tries = 0
        self.last_worked = address
        self._order = (address, *self._others(address))

    def tried(self, address: str) -> None:
        """A try that counts as failed unless `worked` follows it."""
        self._tries += 1
        self._order = (*self._others(address), address)

    def _others(self, address: str) -> tuple[str, ...]:
        return tuple(other for other in self._order if other != address)
