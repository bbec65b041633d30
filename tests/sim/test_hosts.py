"""The simulator's controller and hosts: what is told to whom, and who replaces what has died."""

from __future__ import annotations

import math
from random import Random

from tests.sim.models import QUIET, Farm, lacking, word

from transhume.migration import events as ev
from transhume.model.errors import PagesLost
from transhume.model.migration import Outcome, Phase
from transhume.sim.controller import SimController, Update
from transhume.sim.host import SimHost
from transhume.sim.plan import Side
from transhume.sim.vm import VmStatus

# --- the controller ----------------------------------------------------------------------------------


def controller_of(farm: Farm) -> SimController:
    return SimController(QUIET, farm.schedule, farm.register, first_epoch=7)


def test_a_failure_that_the_register_does_not_know_raises_its_epoch() -> None:
    farm = Farm()
    controller = controller_of(farm)
    assert controller.report(word(Side.SOURCE, "source host source"))
    assert (controller.record.outcome, farm.register.epoch) == (Outcome.FAILED, 8)
    assert farm.register.owner is Side.SOURCE


def test_a_store_without_room_ends_nothing() -> None:
    farm = Farm()
    controller = controller_of(farm)
    farm.register.be_full(1.0)
    assert not controller.report(word(Side.SOURCE, "source host source"))
    assert not controller.record.ended


def test_pages_that_were_lost_are_found_elsewhere() -> None:
    farm = Farm()
    lacking(farm)
    controller = controller_of(farm)
    there = "destination host destination"
    lost = Update(Side.SOURCE, Phase.DONE, Outcome.FAILED, there, PagesLost.code)
    controller.report(lost)
    assert controller.known.pages_lost
    controller.report(Update(Side.DESTINATION, Phase.DONE, Outcome.COMPLETED, there, lacks_nothing=True))
    assert controller.record.outcome is Outcome.COMPLETED


def test_who_was_taken_from_says_nothing_of_the_end() -> None:
    farm = Farm()
    lacking(farm)
    farm.destination.kill()
    farm.take_back()
    controller = controller_of(farm)
    assert controller.known.revoked
    assert controller.report(word(Side.DESTINATION, "nowhere: it died"))
    assert not controller.record.ended
    controller.report(word(Side.SOURCE, "source host source"))
    assert controller.record.runs_at == "source host source"


def test_a_host_is_asked_for_what_was_taken_from_it_until_it_has_ended_it() -> None:
    farm = Farm()
    lacking(farm)
    controller = controller_of(farm)
    assert not controller.heartbeat(Side.DESTINATION, True)
    farm.register.on_swap = controller.swap_asked
    farm.invariants.lied = lambda: True
    farm.take_back()
    assert controller.heartbeat(Side.DESTINATION, True)
    assert controller.heartbeat(Side.DESTINATION, True)
    assert not controller.heartbeat(Side.DESTINATION, False)
    assert not controller.heartbeat(Side.SOURCE, True)


def test_a_register_is_silent_for_who_is_cut_off() -> None:
    farm = Farm()
    farm.register.cut_off = lambda side: side is Side.SOURCE
    farm.swap(Side.SOURCE)
    farm.settle()
    assert isinstance(farm.answers[0], ev.SwapUnknown)
    assert farm.register.reachable(Side.DESTINATION)


# --- the host ----------------------------------------------------------------------------------------


class Host:
    """A host at the source, with a controller that hears it."""

    def __init__(self) -> None:
        self.farm = Farm()
        self.controller = controller_of(self.farm)
        self.host = SimHost(
            self.farm.source, self.farm.schedule, Random(3), self.farm.register, self.controller
        )
        self.started: list[float] = []
        self.host.start_mover = lambda: self.started.append(self.farm.schedule.now_s)


def test_only_a_living_daemon_replaces_a_mover_and_only_one_that_had_not_ended() -> None:
    one = Host()
    host, started = one.host, one.started
    host.journal.append("precopy")
    host.kill_daemon(back_after_s=5.0)
    host.mover_gone()
    one.farm.settle()
    assert len(started) == 1
    assert started[0] > 5.0

    host.journal.append("done")
    host.mover_gone()
    one.farm.settle()
    assert len(started) == 1
    assert host.ended


def test_the_last_word_is_told_by_a_daemon_that_comes_back() -> None:
    one = Host()
    one.host.journal.append("aborted")
    one.host.kill_daemon(back_after_s=5.0)
    one.host.hear(word(Side.SOURCE, "source host source"), ended=True)
    assert not one.controller.record.ended
    one.farm.settle()
    assert (one.controller.record.outcome, one.host.ended_and_told) == (Outcome.FAILED, True)


def test_a_host_that_dies_takes_everything_along_and_may_come_back_empty() -> None:
    one = Host()
    one.host.journal.append("precopy")
    one.host.die(back_after_s=5.0)
    assert one.farm.source.status is VmStatus.DEAD
    reach = [one.host.out_of_reach]
    one.farm.settle()
    reach.append(one.host.out_of_reach)
    assert reach == [True, False]
    assert len(one.started) == 1

    one.host.die(back_after_s=math.inf)
    one.host.come_back()
    one.host.start_daemon()
    assert one.host.gone_for_ever
    assert not one.host.daemon_lives


def test_a_daemon_ends_what_belongs_to_another_host() -> None:
    one = Host()
    one.farm.prepare()
    one.farm.swap(Side.DESTINATION)
    one.farm.settle()
    one.host.beat()
    while one.farm.schedule.now_s < 5.0:
        one.farm.schedule.step()
    assert one.farm.source.status is VmStatus.GONE
