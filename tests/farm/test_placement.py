"""Which host for a VM: the numbers in the refusals, the best of those that will do, and many at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.farm.pools import GIB, demand, demands, pool, promises, room, rooms, rule, rule_books

from transhume.farm.headroom import losses, worst
from transhume.farm.placement import choose, place_all
from transhume.farm.pool import Demand, HostRoom, Pool, default_reserve_bytes
from transhume.farm.rules import RuleBook, RuleKind
from transhume.model.host import HostState
from transhume.model.vm import Accel, VmSpec

NO_RULES = RuleBook()


def test_a_refusal_has_all_numbers_of_every_host() -> None:
    farm = pool(room("alpha", 8, reserved_bytes=GIB), room("beta", 2), web=("alpha", 6))
    found = choose(farm, NO_RULES, (Demand.of(VmSpec(name="db", memory_bytes=4 * GIB, cpus=1)),))
    assert found.host == ""
    assert found.reasons == (
        "alpha: db needs 4,288 MiB; alpha has 1,024 MiB left of 8,192 (1,024 are its own, 6,144 promised)",
        "beta: db needs 4,288 MiB; beta has 2,048 MiB left of 2,048 (0 are its own, 0 promised)",
    )


def test_vcpus_are_promised_more_than_once_but_not_without_end() -> None:
    farm = Pool([room("alpha", 8, cpus=2, cpu_overcommit=1.5)])
    assert choose(farm, NO_RULES, (demand("web", cpus=3),)).host == "alpha"
    [reason] = choose(farm, NO_RULES, (demand("web", cpus=4),)).reasons
    assert reason == "alpha: web needs 4 vCPUs; alpha has 3 left of 3 (2 CPUs, each promised 1.5 times)"


def test_each_reason_of_a_host_is_told() -> None:
    closed = [
        room("alpha", state=HostState.DRAINING),
        room("beta", state=HostState.MAINTENANCE),
        room("gamma", silent=True),
        room("delta", kvm_obstacle="no vmx", machine_types=frozenset({"pc-q35-7.2"})),
    ]
    asked = Demand(vm="web", memory_bytes=9 * GIB, cpus=1, machine_type="pc-q35-9.0", kvm=True)
    told = choose(Pool(closed), NO_RULES, (asked,)).against
    assert "is being drained" in told["alpha"][0]
    assert "`transhume undrain beta`" in told["beta"][0]
    assert "not heard from" in told["gamma"][0]
    assert len(told["delta"]) == 3
    assert all("9,216 MiB" in " ".join(reasons) for reasons in told.values())


def test_the_roomiest_host_is_taken_and_the_first_of_equal_ones() -> None:
    farm = pool(room("alpha"), room("beta"), room("gamma"), web=("alpha", 1))
    assert choose(farm, NO_RULES, (demand("db"),)).host == "beta"
    assert choose(farm, NO_RULES, (demand("db"),), candidates=["alpha", "gamma"]).host == "gamma"


def test_what_a_vm_has_already_does_not_count_against_its_host() -> None:
    farm = pool(room("alpha", 4), web=("alpha", 4))
    assert choose(farm, NO_RULES, (demand("web", 4),)).host == "alpha"


def test_a_preferred_rule_spreads_and_never_refuses() -> None:
    book = RuleBook([rule(RuleKind.ANTI_AFFINITY, "a", "b", "c", prefer=True)])
    farm = pool(room("alpha", 16), room("beta", 4), a=("alpha", 1))
    assert choose(farm, book, (demand("b"),)).host == "beta"
    farm.promise(demand("b"), "beta")
    assert choose(farm, book, (demand("c"),)).host == "alpha"


def test_what_affinity_keeps_together_is_placed_together() -> None:
    book = RuleBook([rule(RuleKind.AFFINITY, "a", "b")])
    farm = pool(room("alpha", 4), room("beta", 3), x=("alpha", 2))
    packing = place_all(farm, book, [demand("a", 2), demand("b", 1)])
    assert packing.hosts == {"a": "beta", "b": "beta"}
    packing = place_all(farm, book, [demand("c", 2)])
    assert packing.hosts == {"c": "alpha"}


def test_tight_packing_saves_what_the_roomiest_first_cannot() -> None:
    """2, 2 and 5 of 4 and 5 GiB: the largest first takes the larger host, as it must."""
    farm = Pool([room("alpha", 4), room("beta", 5)])
    assert not place_all(farm, NO_RULES, [demand("a", 2), demand("b", 2), demand("c", 5)]).unplaced
    farm = Pool([room("alpha", 6), room("beta", 4), room("gamma", 4)])
    packing = place_all(farm, NO_RULES, [demand("a", 4), demand("b", 4), demand("c", 3), demand("d", 3)])
    assert not packing.unplaced


def test_a_farm_that_can_lose_a_host_and_one_that_cannot() -> None:
    three = pool(room("alpha"), room("beta"), room("gamma"), a=("alpha", 4), b=("beta", 4), c=("gamma", 4))
    assert worst(losses(three, NO_RULES)) is None
    three.promise(demand("d", 8), "alpha")
    found = worst(losses(three, NO_RULES))
    assert found is not None
    assert (found.host, found.short_bytes) == ("alpha", 8 * GIB)
    assert "d needs 8,192 MiB" in found.stranded["d"][0]
    alone = worst(losses(pool(room("alpha"), a=("alpha", 3)), NO_RULES))
    assert alone is not None
    assert alone.short_bytes == 3 * GIB
    assert worst(losses(pool(room("alpha")), NO_RULES)) is None


def test_a_loss_respects_the_rules() -> None:
    book = RuleBook([rule(RuleKind.PIN, "a", hosts=("alpha",))])
    found = worst(losses(pool(room("alpha"), room("beta"), a=("alpha", 1)), book))
    assert found is not None
    assert "rule r keeps a on alpha" in found.stranded["a"][0]


def test_a_host_keeps_something_for_itself() -> None:
    assert default_reserve_bytes(24 * GIB) == 512 << 20
    assert default_reserve_bytes(1 * GIB) == 128 << 20


def test_a_vm_on_the_move_has_its_share_on_both_hosts() -> None:
    farm = pool(room("alpha"), room("beta"), a=("alpha", 2))
    farm.promise(demand("a", 2), "beta")
    farm.promise(demand("a", 2), "beta")
    farm.promise(demand("gone", 2), "no-such-host")
    assert (farm.left_bytes("alpha"), farm.left_bytes("beta")) == (6 * GIB, 6 * GIB)
    assert farm.places("a") == {"alpha", "beta"}
    farm.release("a", "alpha")
    assert farm.release("a", "alpha") is None
    assert (farm.left_bytes("alpha"), farm.left_cpus("alpha")) == (8 * GIB, 16)


def test_kvm_is_asked_for_where_the_vm_runs_under_it() -> None:
    spec = VmSpec(name="web", memory_bytes=GIB, cpus=2, accel=Accel.KVM, machine_type="pc-q35-7.2")
    assert Demand.of(spec) == Demand("web", GIB + (192 << 20), 2, "pc-q35-7.2", True)


@given(data=st.data(), hosts=rooms(), wanted=demands())
def test_placing_never_overcommits_and_keeps_the_rules(
    data: st.DataObject, hosts: list[HostRoom], wanted: list[Demand]
) -> None:
    book = data.draw(rule_books([each.vm for each in wanted]))
    farm = Pool(hosts)
    packing = place_all(farm, book, wanted)
    assert packing.hosts.keys() | packing.unplaced.keys() == {each.vm for each in wanted}
    assert not packing.hosts.keys() & packing.unplaced.keys()
    for given_room in farm.hosts.values():
        held = farm.promised(given_room.name)
        assert sum(each.memory_bytes for each in held) <= given_room.usable_bytes
        assert sum(each.cpus for each in held) <= given_room.usable_cpus
    for vm, host in packing.hosts.items():
        assert book.broken(vm, host, farm) == []
    by_vm = {each.vm: each for each in wanted}
    assert packing.short_bytes == sum(by_vm[vm].memory_bytes for vm in packing.unplaced)
    assert all(packing.unplaced.values())


@given(data=st.data(), hosts=rooms(), wanted=demands())
def test_placing_is_the_same_each_time_and_in_any_order(
    data: st.DataObject, hosts: list[HostRoom], wanted: list[Demand]
) -> None:
    book = data.draw(rule_books([each.vm for each in wanted]))
    first = place_all(Pool(hosts), book, wanted)
    again = place_all(Pool(reversed(hosts)), book, data.draw(st.permutations(wanted)))
    assert (first.hosts, first.unplaced) == (again.hosts, again.unplaced)


@given(data=st.data(), hosts=rooms(least=2), wanted=demands())
def test_looking_changes_nothing(data: st.DataObject, hosts: list[HostRoom], wanted: list[Demand]) -> None:
    book = data.draw(rule_books([each.vm for each in wanted]))
    farm = Pool(hosts)
    place_all(farm, book, wanted)
    before = promises(farm)
    left = [(farm.left_bytes(host), farm.left_cpus(host)) for host in farm.hosts]
    losses(farm, book)
    choose(farm, book, tuple(wanted))
    assert promises(farm) == before
    assert [(farm.left_bytes(host), farm.left_cpus(host)) for host in farm.hosts] == left
    order = list(farm.roomiest_first())
    assert order == sorted(farm.hosts, key=lambda host: (-farm.left_bytes(host), host))


@given(hosts=rooms(least=2), wanted=demands())
def test_a_loss_that_can_be_borne_is_one_that_has_a_packing(
    hosts: list[HostRoom], wanted: list[Demand]
) -> None:
    farm = Pool(hosts)
    place_all(farm, NO_RULES, wanted)
    for host, loss in losses(farm, NO_RULES).items():
        rest = Pool([each for each in hosts if each.name != host])
        for other in rest.hosts:
            for each in farm.promised(other):
                rest.promise(each, other)
        free_bytes = sum(max(0, rest.left_bytes(other)) for other in rest.hosts)
        lost_bytes = sum(each.memory_bytes for each in farm.promised(host))
        assert loss.short_bytes >= lost_bytes - free_bytes
        assert bool(loss.stranded) == bool(place_all(rest, NO_RULES, farm.promised(host)).unplaced)
