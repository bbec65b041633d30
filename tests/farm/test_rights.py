"""Who may do what: the whole table; and how many logins may fail."""

from __future__ import annotations

import pytest

from transhume.farm.login_limit import MOST_KEYS, MOST_PER_SOURCE, MOST_PER_USER, WINDOW_S, LoginLimit
from transhume.farm.rights import Action, Grant, Role, may

ALLOWED = {
    (Role.VIEWER, Action.VIEW),
    (Role.OPERATOR, Action.VIEW),
    (Role.OPERATOR, Action.OPERATE),
    (Role.ADMIN, Action.VIEW),
    (Role.ADMIN, Action.OPERATE),
    (Role.ADMIN, Action.ADMINISTER),
}


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("role", Role)
def test_the_table_of_roles_and_actions(role: Role, action: Action) -> None:
    allowed = (role, action) in ALLOWED
    web, db = frozenset({"web", "slow"}), frozenset({"db"})
    for labels in (None, frozenset[str](), web, db):
        assert may((Grant(role=role),), action, labels) is allowed
        assert may((Grant(role=role, on="web"),), action, labels) is (allowed and labels == web)
        assert not may((), action, labels)


def test_grants_add_up() -> None:
    grants = (Grant(role=Role.VIEWER), Grant(role=Role.OPERATOR, on="web"))
    assert may(grants, Action.OPERATE, frozenset({"web"}))
    assert may(grants, Action.VIEW, frozenset({"db"}))
    assert not may(grants, Action.OPERATE, frozenset({"db"}))
    assert not may(grants, Action.OPERATE, None)


def test_a_source_that_failed_too_often_waits() -> None:
    limit = LoginLimit()
    for second in range(MOST_PER_SOURCE):
        assert limit.wait_s("192.0.2.1", "ann", float(second)) == 0
        limit.failed("192.0.2.1", "ann", float(second))
    assert limit.wait_s("192.0.2.1", "bob", 10.0) == WINDOW_S - 10
    assert limit.wait_s("192.0.2.2", "ann", 10.0) == 0
    assert limit.wait_s("192.0.2.1", "bob", WINDOW_S) == 0


def test_a_name_that_is_tried_from_many_places_waits_and_memory_is_bounded() -> None:
    limit = LoginLimit()
    for place in range(MOST_PER_USER):
        limit.failed(f"source {place}", "ann", 0.0)
    assert limit.wait_s("another", "ann", 1.0) == WINDOW_S - 1
    for place in range(MOST_KEYS):
        limit.failed(f"source {place}", f"user {place}", 2.0)
    assert limit.wait_s("another", "ann", 3.0) == 0
