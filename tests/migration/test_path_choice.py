"""In which order the source tries its destination's addresses, and how long each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transhume.migration.path_choice import CONNECT_EACH_S, Attempt, PathChoice

SILENCE_S = 10.0
FIRST, SECOND, THIRD = "10.0.0.2", "10.1.0.2", "fd00::2"


def choice(*addresses: str, silence_limit_s: float = SILENCE_S) -> PathChoice:
    return PathChoice(addresses or (FIRST, SECOND, THIRD), silence_limit_s)


def order(made: PathChoice) -> list[str]:
    return [attempt.address for attempt in made.attempts(again=True)]


def fail_round(made: PathChoice) -> float:
    """Try all in vain; how long that takes at the most where no connection is answered."""
    attempts = made.attempts(again=True)
    for attempt in attempts:
        made.tried(attempt.address)
    return sum(attempt.connect_s for attempt in attempts)


def test_a_single_address_has_all_the_time() -> None:
    made = choice(FIRST)
    assert not made.is_choice
    for again in (False, True):
        fail_round(made)
        assert made.attempts(again) == (Attempt(FIRST, SILENCE_S, SILENCE_S),)


def test_the_first_is_tried_first_and_the_others_as_they_were_given() -> None:
    made = choice()
    assert made.last_worked == FIRST
    assert order(made) == [FIRST, SECOND, THIRD]
    assert order(choice(FIRST, SECOND, FIRST)) == [FIRST, SECOND]


def test_a_search_begins_with_what_worked_last() -> None:
    made = choice()
    for address in (FIRST, SECOND):
        made.tried(address)
    made.worked(SECOND)
    assert made.last_worked == SECOND
    assert order(made)[0] == SECOND
    assert sorted(order(made)) == sorted([FIRST, SECOND, THIRD])


def test_what_worked_only_half_does_not_stand_in_the_way() -> None:
    """The main connection is made and the one for faults is not, again and again: the others get a turn."""
    made = choice()
    tried = []
    for _ in range(3):
        address = order(made)[0]
        made.tried(address)
        tried.append(address)
    assert tried == [FIRST, SECOND, THIRD]
    assert made.last_worked == FIRST


def test_no_address_holds_the_others_up_for_long() -> None:
    made = choice()
    for _ in range(50):
        assert fail_round(made) <= 3 * CONNECT_EACH_S <= 3 * 2.0


def test_who_accepts_and_says_nothing_gets_more_time_with_each_round() -> None:
    made = choice(FIRST, SECOND)
    told = []
    for _ in range(5):
        told.append({attempt.answer_s for attempt in made.attempts(again=True)})
        fail_round(made)
    assert told == [{2.0}, {4.0}, {8.0}, {SILENCE_S}, {SILENCE_S}]
    made.worked(SECOND)
    assert {attempt.answer_s for attempt in made.attempts(again=True)} == {2.0}


def test_the_first_connection_of_all_is_waited_for() -> None:
    """A destination takes only one before pages are owed: a second try would find it taken."""
    assert {attempt.answer_s for attempt in choice().attempts(again=False)} == {SILENCE_S}


def test_a_search_without_an_end() -> None:
    made = choice()
    for _ in range(2000):
        fail_round(made)
    assert order(made) == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize("silence_limit_s", [0.3, 2.0, 60.0])
@given(
    addresses=st.lists(st.sampled_from([FIRST, SECOND, THIRD, "10.2.0.2"]), min_size=1, max_size=6),
    happenings=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40),
)
def test_each_round_tries_all_once_and_nobody_over_the_limit(
    silence_limit_s: float, addresses: list[str], happenings: list[tuple[bool, int]]
) -> None:
    made = choice(*addresses, silence_limit_s=silence_limit_s)
    for good, number in happenings:
        address = addresses[number % len(addresses)]
        made.tried(address)
        if good:
            made.worked(address)
            assert made.last_worked == order(made)[0] == address
        for again in (False, True):
            attempts = made.attempts(again)
            assert sorted(attempt.address for attempt in attempts) == sorted(set(addresses))
            assert all(0 < attempt.connect_s <= silence_limit_s for attempt in attempts)
            assert all(0 < attempt.answer_s <= silence_limit_s for attempt in attempts)
