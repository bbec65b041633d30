"""What a guest has not written since its pages came is found equal, and what differs is found."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from tests.memory.processes import needs_tracking
from tests.migration.paging.guest import content
from tests.migration.transfer.test_pager import BLOCK_PAGES, SILENCE_S, Paging, paging_of

from transhume.memory import runs as page_runs
from transhume.memory.digest import digest_of_runs
from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestBlock
from transhume.migration import wire
from transhume.migration.transfer import verification
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.verification import Comparison, SentDigests, send_digests
from transhume.migration.wire import Decoder, End
from transhume.model.errors import HostLost, KernelError
from transhume.model.vm import PAGE_BYTES

pytestmark = needs_tracking

ALL_PAGES = sum(BLOCK_PAGES)


@dataclass
class Verified:
    """Both ends' answers."""

    sent: SentDigests
    compared: wire.Compared


class Verification:
    """A paging guest that is tracked, and a connection on which its pages are compared."""

    def __init__(self, paging: Paging) -> None:
        self.paging = paging
        self.scanner = Scanner(paging.guest.child.pid)
        self.comparison = Comparison(paging.source)

    def written(self) -> list[list[int]]:
        """The pages of each block that the kernel calls written."""
        return [
            page_runs.pages_of(self.scanner.get(each.address, each.block.size_bytes)).tolist()
            for each in self.paging.guest.ram.blocks
        ]

    def all_comes(self) -> None:
        self.paging.link().push()
        assert self.paging.all_placed.wait(20)

    def verify(self) -> Verified:
        there, here = socket.socketpair()
        source = FrameChannel(there, Decoder(End.DESTINATION, BLOCK_PAGES), "host b", SILENCE_S)
        destination = FrameChannel(here, Decoder(End.SOURCE, BLOCK_PAGES), "host a", SILENCE_S)
        answers: list[wire.Compared] = []

        def compare() -> None:
            while (header := source.receive_header()).type is not wire.FrameType.DIGESTS_END:
                self.comparison.take(source, header)
            message = source.receive_message(header)
            assert isinstance(message, wire.DigestsEnd)
            answers.append(self.comparison.end())
            assert message.pages == answers[0].pages

        thread = self.paging.threads.start(compare)
        try:
            sent = send_digests(destination, self.paging.guest.ram, self.scanner)
            thread.join(20)
        finally:
            source.close()
            destination.close()
        return Verified(sent, answers[0])

    def corrupt(self, block: int, page: int) -> None:
        """One byte at the destination changes, by none of the ways that the guest has."""
        os.pwrite(self.paging.guest.ram.blocks[block].fd, b"?", page * PAGE_BYTES + 99)


@contextlib.contextmanager
def verification_of() -> Iterator[Verification]:
    with paging_of(tracks_writes=True) as paging:
        each = Verification(paging)
        try:
            yield each
        finally:
            each.scanner.close()


@pytest.fixture
def tracked() -> Iterator[Verification]:
    with verification_of() as each:
        each.paging.arm()
        yield each


def test_before_the_guest_runs_nothing_is_written(tracked: Verification) -> None:
    assert tracked.written() == [[], []]
    tracked.all_comes()
    assert tracked.written() == [[], []]


def test_exactly_the_pages_that_were_written_are_known(tracked: Verification) -> None:
    """By whatever way a page came: on demand, by itself, as zeros, or never owed at all."""
    guest = tracked.paging.guest
    link = tracked.paging.link()
    for page in (0, 1, 7, 50, 55):
        guest.read_later(0, page)
        assert guest.saw(content(0, page))
    for page in (2, 5, 14):
        guest.write_later(0, page)
        assert guest.wrote()
    link.push()
    assert tracked.paging.all_placed.wait(20)
    assert tracked.written() == [[2, 5, 14], []]
    for page in (1, 55, 56, 599):
        guest.write_later(0, page)
        assert guest.wrote()
    guest.write_later(1, 89)
    assert guest.wrote()
    assert tracked.written() == [[1, 2, 5, 14, 55, 56, 599], [89]]
    assert tracked.written() == [[1, 2, 5, 14, 55, 56, 599], [89]]  # it stays known


@pytest.mark.parametrize("seed", range(2))
def test_no_write_is_missed_when_links_break_and_pagers_die(tracked: Verification, seed: int) -> None:
    paging = tracked.paging
    paging.guest.child.say(f"use {seed}")
    for turn in range(3):
        link = paging.link()
        with contextlib.suppress(HostLost):
            link.push(pieces=3, max_pages=8)
        if (turn + seed) % 2:
            paging.die()
        else:
            link.cut()
            paging.pager.lose_link()
    paging.link().push()
    paging.assert_all_used()
    assert tracked.written() == [[page for page in range(count) if page % 3 == 1] for count in BLOCK_PAGES]
    verified = tracked.verify()
    assert verified.compared.difference == ""
    written_pages = sum(len(each) for each in tracked.written())
    assert verified.sent == SentDigests(ALL_PAGES - written_pages, written_pages)


def test_what_an_earlier_pass_brought_is_compared_too(tracked: Verification) -> None:
    tracked.all_comes()
    assert tracked.verify().compared == wire.Compared(pages=ALL_PAGES)
    assert tracked.verify().compared == wire.Compared(pages=ALL_PAGES)  # again, after a lost link


def test_a_stale_page_of_an_earlier_pass_is_found() -> None:
    with verification_of() as each:
        each.corrupt(0, 15)  # every fifth page is not owed
        each.paging.arm()
        each.all_comes()
        assert "of transhume-ram0" in each.verify().compared.difference


@pytest.mark.parametrize(("block", "page"), [(0, 300), (0, 5), (1, 89)])
def test_one_byte_that_differs_is_found(tracked: Verification, block: int, page: int) -> None:
    """A page with content, one that the source never had, and the last of all."""
    tracked.all_comes()
    tracked.corrupt(block, page)
    difference = tracked.verify().compared.difference
    assert difference.startswith("pages ")
    assert f"of transhume-ram{block}" in difference
    assert ";" not in difference
    first, last = (int(word) for word in difference.split("(")[0].split() if word.isdigit())
    assert first <= page <= last
    assert last - first < 2 * verification.DIGEST_PAGES


def test_a_page_that_was_lost_on_the_way_is_found(tracked: Verification) -> None:
    """Nothing is there in its place, which is what a hole at the source looks like."""
    tracked.all_comes()
    tracked.paging.guest.ram.blocks[0].punch(302, 1)
    tracked.paging.guest.uffd.write_protect(tracked.paging.guest.address(0, 302), PAGE_BYTES)
    assert tracked.verify().compared.difference == "page 302 of transhume-ram0 is empty there"


def test_a_byte_that_changed_at_the_source_is_found(tracked: Verification) -> None:
    os.pwrite(tracked.paging.source.blocks[1].fd, b"?", 11 * PAGE_BYTES)
    tracked.all_comes()
    assert tracked.verify().compared.difference == ""  # it changed before its page was sent
    os.pwrite(tracked.paging.source.blocks[1].fd, b"!", 11 * PAGE_BYTES)
    assert "of transhume-ram1" in tracked.verify().compared.difference


def test_many_differences_are_counted(tracked: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "DIGEST_PAGES", 16)
    tracked.all_comes()
    for page in range(6, 600, 100):
        tracked.corrupt(0, page)
    tracked.corrupt(1, 6)
    difference = tracked.verify().compared.difference
    assert difference.count(";") == 5
    assert difference.endswith("; and in 2 more places")


def test_what_the_guest_wrote_over_a_difference_is_not_judged(tracked: Verification) -> None:
    tracked.all_comes()
    tracked.corrupt(0, 301)
    tracked.paging.guest.write_later(0, 301)
    assert tracked.paging.guest.wrote()
    verified = tracked.verify()
    assert verified.compared.difference == ""
    assert verified.sent == SentDigests(ALL_PAGES - 1, 1)


def test_what_is_written_while_it_is_hashed_is_left_out(
    tracked: Verification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest writes a page of each hash's pages, just after they were read."""
    tracked.all_comes()
    guest = tracked.paging.guest
    written: set[tuple[int, int]] = set()

    def hash_and_be_overtaken(block: GuestBlock, runs: page_runs.Runs) -> bytes:
        digest = digest_of_runs(block, runs)
        if block is guest.ram.blocks[0] and len(written) < 3:
            page = int(runs[0, 0])
            guest.write_later(0, page)
            assert guest.wrote()
            written.add((0, page))
        return digest

    with monkeypatch.context() as patched:
        # The source's own hashes are made by the same name.
        patched.setattr(verification, "digest_of_runs", hash_and_be_overtaken)
        verified = tracked.verify()
    assert len(written) == 3
    assert verified.compared.difference == ""
    assert verified.sent == SentDigests(ALL_PAGES - 3, 3)


def test_an_empty_page_that_is_written_meanwhile_is_left_out(
    tracked: Verification, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked.all_comes()
    guest = tracked.paging.guest
    look: Callable[..., page_runs.Runs] = page_runs.complement
    done: list[int] = []

    def look_and_be_overtaken(*arguments: object) -> page_runs.Runs:
        found = look(*arguments)
        if not done:
            done.append(5)
            guest.write_later(0, 5)
            assert guest.wrote()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(page_runs, "complement", look_and_be_overtaken)
        verified = tracked.verify()
    assert verified.compared.difference == ""
    assert verified.sent == SentDigests(ALL_PAGES - 1, 1)


def test_memory_that_is_not_tracked_is_never_called_verified(tracked: Verification) -> None:
    tracked.all_comes()
    tracked.paging.finish()  # which ends the tracking
    with pytest.raises(KernelError, match="not, or no longer, tracked"):
        send_digests(None, tracked.paging.guest.ram, tracked.scanner)  # type: ignore[arg-type]


def test_a_connection_that_ends_ends_the_sending(tracked: Verification) -> None:
    tracked.all_comes()
    there, here = socket.socketpair()
    destination = FrameChannel(here, Decoder(End.SOURCE, BLOCK_PAGES), "host a", SILENCE_S)
    there.close()
    with pytest.raises(HostLost):
        send_digests(destination, tracked.paging.guest.ram, tracked.scanner)
    destination.close()
    assert tracked.verify().compared == wire.Compared(pages=ALL_PAGES)


def test_runs_that_were_torn_fit_into_frames(tracked: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked.all_comes()
    monkeypatch.setattr(wire, "MAX_RUNS", 16)
    monkeypatch.setattr(verification, "DIGEST_PAGES", 16)
    assert tracked.verify().compared == wire.Compared(pages=ALL_PAGES)
