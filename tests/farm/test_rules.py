"""Rules in words: what breaks them, what can never hold, and what is only warned of."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from tests.farm.pools import GIB, demand, pool, room, rule

from transhume.farm.rule_check import contradictions, warnings
from transhume.farm.rules import Rule, RuleBook, RuleKind

APART, TOGETHER, PIN, AVOID = RuleKind.ANTI_AFFINITY, RuleKind.AFFINITY, RuleKind.PIN, RuleKind.AVOID
TWO = frozenset({"alpha", "beta"})


def test_what_breaks_a_rule_is_named_with_the_rule() -> None:
    farm = pool(room("alpha"), room("beta"), web=("alpha", 1), db=("beta", 1))
    for made, host, words in (
        (rule(APART, "web", "db"), "beta", "rule r keeps web apart from db, on beta"),
        (rule(TOGETHER, "web", "db"), "alpha", "rule r keeps web with db (beta), which alpha is not"),
        (rule(PIN, "web", hosts=("beta",)), "alpha", "rule r keeps web on beta"),
        (rule(AVOID, "web", hosts=("alpha",)), "alpha", "rule r keeps web off alpha"),
    ):
        book = RuleBook([made])
        assert book.broken("web", host, farm) == [words]
        other = "alpha" if host == "beta" else "beta"
        assert book.broken("web", other, farm) == []
        assert book.broken("other", host, farm) == []


def test_labels_stand_for_whoever_carries_them() -> None:
    book = RuleBook(
        [rule(PIN, "@db", hosts=("@ssd",))],
        vm_labels={"db1": ("db",), "db2": ("db", "old")},
        host_labels={"beta": ("ssd",)},
    )
    farm = pool(room("alpha"), room("beta"))
    assert book.broken("db2", "alpha", farm) == ["rule r keeps db2 on beta"]
    assert book.allowed("db1", farm.hosts) == {"beta"}
    assert book.allowed("web", farm.hosts) == TWO


def test_who_comes_along_does_not_count() -> None:
    farm = pool(room("alpha"), room("beta"), web=("alpha", 1), db=("alpha", 1))
    book = RuleBook([rule(TOGETHER, "web", "db")])
    assert book.broken("web", "beta", farm)
    assert book.broken("web", "beta", farm, besides=frozenset({"db"})) == []


def test_what_is_broken_now_is_told_once_for_each_rule() -> None:
    farm = pool(room("alpha"), room("beta"), web=("alpha", 1), db=("alpha", 1))
    book = RuleBook([rule(APART, "web", "db"), rule(PIN, "db", hosts=("alpha",), name="s")])
    assert book.broken_now(farm) == {"r": "VM db: rule r keeps db apart from web, on alpha"}


def test_a_rule_that_does_not_fit_its_kind_is_refused() -> None:
    for fields in (
        {"kind": "pin", "vms": ["web"]},
        {"kind": "affinity", "vms": ["web", "db"], "hosts": ["alpha"]},
        {"kind": "anti-affinity", "vms": ["web", "web"]},
        {"kind": "affinity", "vms": []},
        {"kind": "affinity", "vms": ["@db"], "name": "Bad Name"},
    ):
        with pytest.raises(ValidationError):
            Rule.model_validate({"name": "r", **fields})
    Rule.model_validate({"name": "r", "kind": "affinity", "vms": ["@db"]})


@pytest.mark.parametrize("selector", ["", "@", "DB", "@@db", "db_1", "-db"])
def test_what_could_be_no_name_and_no_label_is_refused(selector: str) -> None:
    for given in (
        {"kind": "affinity", "vms": ("a", selector)},
        {"kind": "pin", "vms": ("a",), "hosts": (selector,)},
    ):
        with pytest.raises(ValidationError, match="pattern"):
            Rule.model_validate({"name": "r", **given})


def test_apart_and_together_contradict() -> None:
    book = RuleBook(
        [rule(TOGETHER, "a", "b", name="x"), rule(TOGETHER, "b", "c", name="y"), rule(APART, "a", "c")]
    )
    [told] = contradictions(book, "r", TWO)
    assert told == "a and c must be on one host by affinity, and rule r keeps them apart"
    assert contradictions(book, "y", TWO) == [told]


def test_pins_that_leave_no_host_contradict() -> None:
    book = RuleBook([rule(PIN, "a", hosts=("alpha",), name="x"), rule(AVOID, "a", hosts=("alpha",))])
    assert contradictions(book, "r", TWO) == ["rules leave no host to a (r, x)"]
    book = RuleBook(
        [
            rule(PIN, "a", hosts=("alpha",), name="x"),
            rule(PIN, "b", hosts=("beta",), name="y"),
            rule(TOGETHER, "a", "b"),
        ]
    )
    assert contradictions(book, "r", TWO) == ["rules leave no host to a, b (x, y)"]


def test_more_vms_than_hosts_cannot_be_kept_apart() -> None:
    book = RuleBook([rule(APART, "a", "b", "c")])
    [told] = contradictions(book, "r", TWO)
    assert told.startswith("rule r keeps 3 VMs apart, and the 2 hosts that they may be on have room for 2")
    assert contradictions(RuleBook([rule(APART, "a", "b", "c", prefer=True)]), "r", TWO) == []
    # Enough hosts, and yet two of the VMs share their only one.
    hosts = frozenset({"alpha", "beta", "gamma"})
    pins = rule(PIN, "a", "b", hosts=("alpha",), name="p")
    assert contradictions(RuleBook([rule(APART, "a", "b", "c")]), "r", hosts) == []
    assert contradictions(RuleBook([rule(APART, "a", "b", "c"), pins]), "p", hosts)
    # A matching that a first try would miss: a may be anywhere, b on alpha alone.
    pin = rule(PIN, "b", hosts=("alpha",), name="p")
    assert contradictions(RuleBook([rule(APART, "a", "b"), pin]), "r", TWO) == []


def test_what_depends_on_the_moment_is_only_warned_of() -> None:
    farm = pool(room("alpha", 4), room("beta", 4), a=("alpha", 3), b=("alpha", 1))
    wants = {"a": demand("a", 3), "b": demand("b", 2)}
    book = RuleBook([rule(APART, "a", "b")])
    assert warnings(book, "r", farm, wants) == [
        "it is broken now: VM a: rule r keeps a apart from b, on alpha"
    ]
    book = RuleBook([rule(TOGETHER, "a", "b")])
    [large] = warnings(book, "r", farm, wants)
    assert (
        large == f"a, b would need {5 * GIB >> 20:,} MiB, and the largest host it may be on gives 4,096 MiB"
    )
    book = RuleBook([rule(PIN, "@db", hosts=("@ssd",))])
    assert warnings(book, "r", farm, wants) == ["no VM carries @db yet: it concerns nobody"]
    book = RuleBook([rule(PIN, "a", hosts=("@ssd",))])
    assert contradictions(book, "r", TWO) == []
    assert "no host carries @ssd yet: its VMs can be nowhere" in warnings(book, "r", farm, wants)
