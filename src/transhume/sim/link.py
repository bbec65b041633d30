"""The connection between the movers: an ordered stream that may be slow, half open, or cut anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from transhume.sim.plan import Side
from transhume.sim.schedule import Schedule

CLOSE_NOTICE_LIMIT_S = 1.0
"""How long an end may take to notice that a connection was cut."""


class Word(StrEnum):
    """What the movers say to each other."""

    HELLO = "hello"
    WELCOME = "welcome"
    PING = "ping"
    PASS_END = "pass-end"
    PASS_ACK = "pass-ack"
    LAST_PAGES = "last-pages"
    FETCH = "fetch"
    PAGE = "page"
    MISSING = "missing"
    PAGED = "paged"
    DIGESTS = "digests"
    COMPARED = "compared"
    STATE = "state"
    NATIVE_STREAM = "native-stream"
    ABORT = "abort"
    FINISHED = "finished"
    COMMITTED = "committed"
    RUNNING = "running"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True)
class Message:
    """One word with what belongs to it: a pass's number, or the content that pages or state were taken of.

    `pages` are those that are owed, asked for, or here. With MISSING, `text` says whether they are to be
    compared; with COMPARED, what differs.
    """

    word: Word
    number: int | None = None
    text: str = ""
    pages: tuple[int, ...] = ()


class SimLink:
    """One connection. What is sent arrives in order, later, or never."""

    def __init__(
        self,
        schedule: Schedule,
        rng: Random,
        latency_s: float,
        ends: dict[Side, Callable[[Message], None]],
    ) -> None:
        self._schedule = schedule
        self._rng = rng
        self._latency_s = latency_s
        self._ends = ends
        self._arrived_s = dict.fromkeys(ends, 0.0)
        self._lost_from = dict.fromkeys(ends, False)
        self._slowness_s = 0.0
        self._cuts = 0
        self._closed = False

    def send(self, to: Side, message: Message) -> None:
        """Send one message to an end."""
        if self._closed or self._lost_from[to]:
            return
        delay_s = self._latency_s * self._rng.uniform(0.5, 2.0) + self._slowness_s * self._rng.random()
        due_s = max(self._schedule.now_s + delay_s, self._arrived_s[to])
        self._arrived_s[to] = due_s
        self._schedule.at(due_s, self._arrive, to, message, self._cuts)

    def _arrive(self, to: Side, message: Message, cuts: int) -> None:
        if cuts == self._cuts and not self._lost_from[to]:
            self._ends[to](message)

    def close(self, by: Side) -> None:
        """One end's process has closed the connection, or died: the other reads what was sent, then the end.

        Sometimes unread bytes at the dying end make the kernel reset the connection: then they are lost.
        """
        if self._closed:
            return
        other = Side.DESTINATION if by is Side.SOURCE else Side.SOURCE
        if self._rng.random() < 0.2:
            self.cut()
            return
        self.send(other, Message(Word.CLOSED, text=f"the {by} closed the connection"))
        self._closed = True

    def cut(self) -> None:
        """The connection breaks: whatever has not arrived is lost, and each end notices in its own time."""
        if self._closed:
            return
        self._closed = True
        self._cuts += 1
        broken = Message(Word.CLOSED, text="the connection broke")
        for side in self._ends:
            if not self._lost_from[side]:
                delay_s = self._rng.uniform(0.0, CLOSE_NOTICE_LIMIT_S)
                self._schedule.after(delay_s, self._arrive, side, broken, self._cuts)

    def forget(self) -> None:
        """Another connection takes this one's place: nothing of it is heard any more."""
        self._closed = True
        self._cuts += 1

    def lose_all_to(self, side: Side) -> None:
        """From now on nothing reaches this end any more, and nobody is told."""
        self._lost_from[side] = True

    def slow_down(self, slowness_s: float) -> None:
        """Everything sent from now on takes up to this much longer."""
        self._slowness_s = slowness_s
