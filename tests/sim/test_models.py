"""The simulator's own parts: time, the stream, the register, the VM, and what is forbidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from tests.sim.models import QUIET, Farm, lacking, word

from transhume.migration import events as ev
from transhume.model.migration import Outcome
from transhume.sim.controller import Record, Update
from transhume.sim.invariants import Violation
from transhume.sim.link import Message, SimLink, Word
from transhume.sim.plan import Side
from transhume.sim.register import ANSWER_LIMIT_S
from transhume.sim.schedule import Schedule
from transhume.sim.vm import SimVm, VmStatus

# --- time --------------------------------------------------------------------------------------------


def test_things_happen_in_their_order_and_ties_as_they_were_asked_for() -> None:
    schedule = Schedule()
    done: list[tuple[float, str]] = []

    def note(text: str) -> None:
        done.append((schedule.now_s, text))

    schedule.after(2.0, note, "last")
    schedule.after(1.0, note, "first of two")
    schedule.after(1.0, note, "second of two")
    schedule.after(0.5, lambda: schedule.after(0.1, note, "asked for later"))
    while schedule.step():
        pass
    assert done == [
        (0.6, "asked for later"),
        (1.0, "first of two"),
        (1.0, "second of two"),
        (2.0, "last"),
    ]
    assert not schedule.step()


# --- the stream --------------------------------------------------------------------------------------


class Ends:
    def __init__(self, latency_s: float = 0.1) -> None:
        self.schedule = Schedule()
        self.heard: dict[Side, list[Message]] = {Side.SOURCE: [], Side.DESTINATION: []}
        ends: dict[Side, Callable[[Message], None]] = {
            side: heard.append for side, heard in self.heard.items()
        }
        self.link = SimLink(self.schedule, Random(2), latency_s, ends)

    def settle(self) -> None:
        while self.schedule.step():
            pass


def test_a_stream_keeps_its_order_whatever_the_delays() -> None:
    ends = Ends()
    ends.link.slow_down(5.0)
    for number in range(50):
        ends.schedule.after(number * 0.0137, ends.link.send, Side.DESTINATION, Message(Word.PASS_END, number))
    ends.settle()
    assert [message.number for message in ends.heard[Side.DESTINATION]] == list(range(50))


def test_a_cut_loses_what_has_not_arrived_and_both_ends_notice() -> None:
    ends = Ends()
    ends.link.send(Side.DESTINATION, Message(Word.STATE, 1))
    ends.link.cut()
    ends.link.send(Side.DESTINATION, Message(Word.STATE, 2))
    ends.settle()
    assert [message.word for message in ends.heard[Side.DESTINATION]] == [Word.CLOSED]
    assert [message.word for message in ends.heard[Side.SOURCE]] == [Word.CLOSED]


def test_a_half_open_stream_loses_everything_and_tells_nobody() -> None:
    ends = Ends()
    ends.link.send(Side.DESTINATION, Message(Word.STATE, 1))
    ends.link.lose_all_to(Side.DESTINATION)
    ends.link.send(Side.SOURCE, Message(Word.PING))
    ends.settle()
    assert ends.heard[Side.DESTINATION] == []
    assert [message.word for message in ends.heard[Side.SOURCE]] == [Word.PING]


def test_an_end_that_closes_is_heard_to_the_end_or_reset() -> None:
    stories = set()
    ends = Ends()
    for seed in range(20):
        ends = Ends()
        ends.link._rng = Random(seed)
        ends.link.send(Side.DESTINATION, Message(Word.STATE, 1))
        ends.link.close(Side.SOURCE)
        ends.settle()
        stories.add(tuple(message.word for message in ends.heard[Side.DESTINATION]))
    assert stories == {(Word.STATE, Word.CLOSED), (Word.CLOSED,)}


# --- the register ------------------------------------------------------------------------------------


def test_the_first_swap_wins_and_the_second_learns_who_did() -> None:
    farm = Farm()
    farm.prepare()
    farm.swap(Side.DESTINATION)
    farm.settle()
    farm.swap(Side.SOURCE)
    farm.settle()
    assert farm.answers == [ev.SwapWon(), ev.SwapLost(Side.DESTINATION, 8)]
    assert (farm.register.owner, farm.register.epoch) == (Side.DESTINATION, 8)


def test_a_register_that_is_down_says_nothing_about_the_outcome() -> None:
    farm = Farm()
    farm.register.go_down(1.0)
    farm.swap(Side.SOURCE)
    farm.settle()
    assert isinstance(farm.answers[0], ev.SwapUnknown)
    assert farm.register.epoch == 7


def test_a_register_without_space_refuses_and_changes_nothing() -> None:
    farm = Farm(replace(QUIET, request_doubled_share=1.0))
    farm.register.be_full(0.03)
    farm.swap(Side.SOURCE)
    farm.settle()
    assert isinstance(farm.answers[0], ev.SwapRefused)
    assert farm.register.epoch == 7


def test_a_lost_answer_leaves_the_outcome_unknown_though_the_swap_was_made() -> None:
    farm = Farm(replace(QUIET, answer_lost_share=1.0))
    farm.swap(Side.SOURCE)
    farm.settle()
    assert len(farm.answers) == 1
    assert isinstance(farm.answers[0], ev.SwapUnknown)
    assert farm.schedule.now_s == pytest.approx(ANSWER_LIMIT_S)
    assert farm.register.epoch == 8


def test_a_doubled_request_is_made_and_answered_once() -> None:
    farm = Farm(replace(QUIET, request_doubled_share=1.0))
    farm.swap(Side.SOURCE)
    farm.settle()
    assert farm.answers == [ev.SwapWon()]
    assert farm.register.epoch == 8


# --- the VM ------------------------------------------------------------------------------------------


def test_qemu_takes_one_command_after_the_other() -> None:
    farm = Farm()
    done: list[str] = []
    farm.source.command(0.2, lambda: done.append("stop"))
    farm.source.command(0.1, lambda: done.append("cont"))
    farm.settle()
    assert done == ["stop", "cont"]


def test_the_content_changes_whenever_the_vcpus_run() -> None:
    vm = SimVm(Side.SOURCE, VmStatus.RUNNING, Schedule())
    assert vm.still_content is None
    vm.change(VmStatus.PAUSED)
    before = vm.still_content
    vm.change(VmStatus.RUNNING)
    vm.change(VmStatus.PAUSED)
    assert vm.still_content != before


# --- what is forbidden -------------------------------------------------------------------------------


def test_a_vm_may_not_run_where_it_does_not_belong() -> None:
    farm = Farm()
    farm.prepare()
    with pytest.raises(Violation, match="the VM runs at the destination and belongs to the source"):
        farm.destination.change(VmStatus.RUNNING)


def test_a_running_vm_may_not_be_taken_over() -> None:
    farm = Farm()
    farm.destination.change(VmStatus.PAUSED)
    farm.swap(Side.DESTINATION)
    with pytest.raises(Violation, match="while it ran at the source"):
        farm.settle()


@pytest.mark.parametrize("status", [VmStatus.ABSENT, VmStatus.GONE])
def test_a_host_without_the_vm_may_not_take_it_over(status: VmStatus) -> None:
    farm = Farm()
    farm.source.change(VmStatus.PAUSED)
    farm.destination.change(status)
    farm.swap(Side.DESTINATION)
    with pytest.raises(Violation, match="and has none"):
        farm.settle()


@pytest.mark.parametrize("missing", ["ram_content", "state_content"])
def test_a_vm_may_not_be_taken_over_in_part(missing: str) -> None:
    farm = Farm()
    farm.prepare()
    setattr(farm.destination, missing, None)
    farm.swap(Side.DESTINATION)
    with pytest.raises(Violation, match=missing.split("_")[0].replace("ram", "RAM")):
        farm.settle()


def test_pages_sent_before_the_source_went_on_are_not_whole() -> None:
    farm = Farm()
    farm.prepare()
    farm.source.change(VmStatus.RUNNING)
    farm.source.change(VmStatus.PAUSED)
    farm.swap(Side.DESTINATION)
    with pytest.raises(Violation, match="RAM"):
        farm.settle()


def test_a_vm_may_not_be_destroyed_where_it_belongs() -> None:
    farm = Farm()
    with pytest.raises(Violation, match="destroyed at the source"):
        farm.source.change(VmStatus.GONE)


def test_a_vm_whose_qemu_died_may_be_cleaned_away() -> None:
    farm = Farm()
    assert farm.source.kill()
    assert not farm.source.kill()
    farm.source.change(VmStatus.GONE)
    farm.invariants.at_the_end()


def test_a_vm_may_not_stay_paused_for_ever() -> None:
    farm = Farm()
    farm.source.change(VmStatus.PAUSED)
    with pytest.raises(Violation, match="the VM is lost: paused at the source"):
        farm.invariants.at_the_end()


def test_nothing_may_be_left_at_the_loser_unless_cleaning_failed() -> None:
    farm = Farm()
    farm.destination.change(VmStatus.PAUSED)
    farm.invariants.at_the_end(excused=frozenset(Side))
    with pytest.raises(Violation, match="left over at the destination"):
        farm.invariants.at_the_end()


def test_a_page_is_placed_once() -> None:
    farm = Farm()
    lacking(farm)
    farm.destination.place(1)
    with pytest.raises(Violation, match="page 1 was placed where the guest may have written it"):
        farm.destination.place(1)
    assert farm.destination.missing == {2}


def test_a_vm_that_lacks_pages_may_not_run_unguarded() -> None:
    farm = Farm()
    lacking(farm)
    with pytest.raises(Violation, match="reads zeros"):
        farm.destination.guard(False)


def test_a_vm_that_lacks_nothing_needs_no_guard() -> None:
    farm = Farm()
    lacking(farm)
    for page in (1, 2):
        farm.destination.place(page)
    farm.destination.guard(False)
    farm.source.change(VmStatus.GONE)
    farm.invariants.at_the_end()


def test_the_source_may_not_free_what_the_destination_lacks() -> None:
    farm = Farm()
    lacking(farm)
    with pytest.raises(Violation, match="the source freed its RAM, of which the destination lacks 2"):
        farm.source.change(VmStatus.GONE)


def test_the_source_may_free_its_ram_when_the_destination_died_or_gave_up() -> None:
    died, gave_up = Farm(), Farm()
    lacking(died)
    died.destination.kill()
    died.source.change(VmStatus.GONE)
    lacking(gave_up)
    gave_up.invariants.gave_up = lambda: True
    gave_up.source.change(VmStatus.GONE)
    gave_up.invariants.at_the_end()


def test_the_source_may_be_freed_when_nobody_holds_its_ram_any_more() -> None:
    farm = Farm()
    lacking(farm)
    farm.source.kill()
    farm.invariants.source_has_ram = lambda: False
    farm.source.change(VmStatus.GONE)
    with pytest.raises(Violation, match="for ever, and nobody says so"):
        farm.invariants.at_the_end()


def test_pages_may_not_be_missing_for_ever_without_a_word() -> None:
    farm = Farm()
    lacking(farm)
    with pytest.raises(Violation, match="lacks pages"):
        farm.invariants.at_the_end(excused=frozenset(Side))


def test_the_source_may_not_free_what_is_to_be_compared() -> None:
    farm = Farm()
    lacking(farm)
    for page in (1, 2):
        farm.destination.place(page)
    farm.destination.uncompared = True
    with pytest.raises(Violation, match="has still to compare"):
        farm.source.change(VmStatus.GONE)


def test_the_safe_copy_may_not_be_removed_while_pages_are_missing() -> None:
    farm = Farm()
    lacking(farm)
    farm.copy.there = True
    farm.copy.go_down(5.0)
    farm.copy.remove()
    assert farm.copy.removal_failed
    farm.copy.heal()
    with pytest.raises(Violation, match="the safe copy was removed while the destination lacked 2"):
        farm.copy.remove()


# --- back from a destination ------------------------------------------------------------------------


def test_a_vm_is_taken_back_from_a_dead_destination() -> None:
    farm = Farm()
    lacking(farm)
    farm.destination.kill()
    farm.take_back()
    farm.source.change(VmStatus.RUNNING)
    farm.invariants.at_the_end()
    assert farm.invariants.revived


def test_a_vm_that_lives_at_its_destination_may_not_be_taken_back() -> None:
    farm = Farm()
    lacking(farm)
    with pytest.raises(Violation, match="took back a VM that lives at its destination"):
        farm.take_back()


def test_a_vm_that_was_freed_may_not_be_taken_back() -> None:
    farm = Farm()
    lacking(farm)
    farm.destination.kill()
    farm.source.change(VmStatus.GONE)
    with pytest.raises(Violation, match="took back a VM that it had freed"):
        farm.take_back()


def test_a_lie_excuses_two_runners_for_a_while() -> None:
    farm = Farm()
    lacking(farm)
    excused = True
    farm.invariants.lied = lambda: excused
    farm.take_back()
    farm.source.change(VmStatus.RUNNING)
    farm.destination.change(VmStatus.PAUSED)
    farm.destination.change(VmStatus.RUNNING)
    with pytest.raises(Violation, match="its destination, which knows, still runs it"):
        farm.invariants.demand_one_runner_again()
    farm.destination.change(VmStatus.PAUSED)
    farm.invariants.demand_one_runner_again()
    excused = False
    with pytest.raises(Violation, match="runs at the destination and belongs to the source"):
        farm.destination.change(VmStatus.RUNNING)


# --- words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "runs_at", "true"),
    [
        (Side.SOURCE, "source host source", True),
        (Side.DESTINATION, "source host source", True),
        (Side.SOURCE, "destination host destination", False),
        (Side.SOURCE, "nowhere: it died", False),
        (Side.DESTINATION, "nowhere: it died", False),
        (Side.SOURCE, "unknown until the register answers", False),
    ],
)
def test_the_last_word_must_be_true(side: Side, runs_at: str, true: bool) -> None:
    farm = Farm()
    if true:
        farm.invariants.last_word(side, word(side, runs_at))
        return
    with pytest.raises(Violation, match=side.value):
        farm.invariants.last_word(side, word(side, runs_at))


def test_who_knew_that_its_qemu_had_died_may_not_say_that_the_vm_runs() -> None:
    farm = Farm()
    farm.source.kill()
    farm.invariants.last_word(Side.SOURCE, word(Side.SOURCE, "source host source"))
    farm.source.death_was_noticed = True
    with pytest.raises(Violation, match="knew that its QEMU had died"):
        farm.invariants.last_word(Side.SOURCE, word(Side.SOURCE, "source host source"))


NOBODY: dict[Side, Update | None] = {Side.SOURCE: None, Side.DESTINATION: None}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (Record(), "the record does not end"),
        (Record(Outcome.FAILED, runs_at="source host source"), "belongs to the destination"),
        (Record(Outcome.FAILED, runs_at="nowhere: it died"), "the VM runs at the destination"),
        (Record(Outcome.COMPLETED, runs_at="destination host destination"), "does not say so"),
        (Record(Outcome.FAILED, runs_at="destination host destination; it lacks pages"), ""),
    ],
)
def test_the_record_must_be_true(record: Record, complaint: str) -> None:
    farm = Farm()
    lacking(farm)
    if not complaint:
        farm.invariants.record(record, NOBODY)
        return
    with pytest.raises(Violation, match=complaint):
        farm.invariants.record(record, NOBODY)


def test_the_record_may_not_say_that_pages_are_lost_which_are_not() -> None:
    farm = Farm()
    lacking(farm)
    for page in (1, 2):
        farm.destination.place(page)
    lost = Record(Outcome.FAILED, runs_at="destination host destination", error_code="pages-lost")
    with pytest.raises(Violation, match="the VM has them all"):
        farm.invariants.record(lost, NOBODY)
    farm.copy.there = True
    completed = Record(Outcome.COMPLETED, runs_at="destination host destination")
    with pytest.raises(Violation, match="the safe copy is left over"):
        farm.invariants.record(completed, NOBODY)
