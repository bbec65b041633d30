"""The farm's CPU baseline: only what all hosts have, and less with each host more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.farm.scripted_farm import farm

from transhume.farm.baseline import farm_baseline, joining, leaving, with_baseline
from transhume.farm.join_preview import preview
from transhume.model.errors import Refused
from transhume.model.finding import Level
from transhume.model.host import GuestCpus, HostInventory, ModelRank
from transhume.model.vm import Accel, VmSpec
from transhume.sim.scripted_host import INVENTORY

MODELS = {
    "qemu64-v1": ModelRank(1, 28),
    "core2duo-v1": ModelRank(1, 31),
    "Nehalem-v1": ModelRank(2, 31),
    "Haswell-v4": ModelRank(3, 60),
    "Skylake-Server-v4": ModelRank(4, 78),
}
FLAGS = ("sse4.2", "popcnt", "avx2", "bmi2", "avx512f", "avx512bw")


def cpus(models: int, *flags: str) -> GuestCpus:
    """The first `models` of the list above."""
    return GuestCpus(models=dict(list(MODELS.items())[:models]), features=flags)


def host(kvm: GuestCpus | None = None, tcg: GuestCpus | None = None, vendor: str = "I") -> HostInventory:
    told = {"tcg": tcg or cpus(3, "sse4.2")}
    if kvm is not None:
        told["kvm"] = kvm
    without = "" if kvm is not None else "the CPU shows neither vmx nor svm"
    return INVENTORY.model_copy(update={"cpus_of": told, "kvm_obstacle": without, "cpu_vendor": vendor})


NEW = host(cpus(5, "avx2", "sse4.2", "avx512f"))
OLD = host(cpus(4, "avx2", "sse4.2"))


def test_the_best_model_of_all_and_their_flags() -> None:
    found = farm_baseline({"h1": NEW, "h2": NEW, "h4": OLD})
    kvm = found.of(Accel.KVM)
    assert kvm is not None
    assert (kvm.model, kvm.flags, kvm.hosts) == ("Haswell-v4", ("avx2", "sse4.2"), ("h1", "h2", "h4"))
    assert kvm.held_down_by == {"h4": ("avx512f",)}
    assert [base.accel for base in found.baselines] == [Accel.KVM, Accel.TCG]
    assert found.untold == ()
    assert leaving({"h1": NEW, "h4": OLD}, "h4") == ("without h4 the CPU baseline under kvm rises by avx512f")
    assert leaving({"h1": NEW, "h4": OLD}, "h1") == ""


def test_a_level_counts_more_than_the_number_of_features() -> None:
    found = farm_baseline({"h1": host(tcg=cpus(3))}).of(Accel.TCG)
    assert found is not None
    assert found.model == "Nehalem-v1"


def test_joining_says_what_it_would_lower() -> None:
    kvm, tcg = joining({"h1": NEW}, "h4", OLD)
    assert kvm.level is Level.WARNING
    assert kvm.words == (
        "the farm's CPU baseline under kvm is Skylake-Server-v4; joining h4 would lower it by avx512f, "
        "to Haswell-v4"
    )
    assert (tcg.level, tcg.words.endswith("joining h4 would not lower it")) == (Level.OK, True)
    fewer = host(cpus(5, "avx2", "sse4.2"))
    assert joining({"h1": NEW}, "h4", fewer)[0].words.endswith("; joining h4 would lower it by avx512f")
    assert {finding.level for finding in joining({"h1": OLD}, "h4", NEW)} == {Level.OK}


def test_joining_without_kvm_or_with_another_makers_cpu_is_told() -> None:
    words = [finding.words for finding in joining({"h1": NEW}, "h4", host())]
    assert "VMs under KVM cannot move to h4, which has none" in words
    amd = NEW.model_copy(update={"cpu_vendor": "A"})
    assert "of another maker (A, I)" in joining({"h1": NEW}, "h4", amd)[0].words
    slower = joining({"h1": host()}, "h4", host(tcg=cpus(2)))
    assert [finding.level for finding in slower] == [Level.NOTE]
    (silent,) = joining({"h1": NEW}, "h4", INVENTORY)
    assert silent.level is Level.WARNING


def test_a_farm_of_one_and_of_none() -> None:
    assert farm_baseline({}).baselines == ()
    only = farm_baseline({"h1": NEW}).of(Accel.KVM)
    assert only is not None
    assert only.held_down_by == {}
    assert joining({}, "h1", NEW) == ()


def test_a_vm_gets_the_baselines_model() -> None:
    spec = VmSpec(name="web", memory_bytes=1 << 30, cpus=1, accel=Accel.KVM, cpu_model="baseline")
    assert with_baseline(spec, {"h1": NEW, "h4": OLD}).cpu_model == "Haswell-v4"
    plain = spec.model_copy(update={"cpu_model": "host"})
    assert with_baseline(plain, {"h1": INVENTORY}) == plain
    with pytest.raises(Refused, match="h3 did not tell"):
        with_baseline(spec, {"h1": NEW, "h3": INVENTORY})
    with pytest.raises(Refused, match="no CPU model runs on all hosts under kvm"):
        with_baseline(spec, {"h1": NEW, "h4": host(GuestCpus())})
    quiet = INVENTORY.model_copy(update={"cpus_of": {"tcg": cpus(3)}})
    assert quiet.kvm_obstacle == ""
    with pytest.raises(Refused, match="h3 did not tell"):
        with_baseline(spec, {"h1": NEW, "h3": quiet})


@st.composite
def inventories(draw: st.DrawFn) -> HostInventory:
    def some_cpus() -> GuestCpus:
        flags = draw(st.sets(st.sampled_from(FLAGS)))
        names = draw(st.sets(st.sampled_from(sorted(MODELS))))
        # Releases of QEMU count a model's features differently.
        ranks = {name: MODELS[name]._replace(features=draw(st.integers(20, 90))) for name in names}
        return GuestCpus(models=ranks, features=tuple(sorted(flags)))

    if draw(st.booleans()):
        return host(some_cpus(), some_cpus())
    return draw(st.sampled_from([host(tcg=some_cpus()), INVENTORY]))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["h1", "h2", "h3", "h4"]), inventories()))
def test_it_never_names_what_a_host_lacks(farm_of: dict[str, HostInventory]) -> None:
    for base in farm_baseline(farm_of).baselines:
        assert base.hosts
        for name in base.hosts:
            told = farm_of[name].cpus_of[base.accel.value]
            assert set(base.flags) <= set(told.features)
            assert base.model == "" or base.model in told.models


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["h1", "h2", "h3"]), inventories()), inventories())
def test_another_host_never_raises_it(farm_of: dict[str, HostInventory], more: HostInventory) -> None:
    after = farm_baseline({**farm_of, "h4": more})
    for before in farm_baseline(farm_of).baselines:
        now = after.of(before.accel)
        assert now is not None
        assert set(now.flags) <= set(before.flags)
        assert _rank(farm_of, now.model, before.accel) <= _rank(farm_of, before.model, before.accel)
        lost = set(before.flags) - set(now.flags)
        if lost:
            assert any(
                flag in finding.words for finding in joining(farm_of, "h4", more) for flag in lost
            ) or (len(now.vendors) > len(before.vendors))
        if lost and len(now.hosts) > 1:
            assert set(now.held_down_by.get("h4", ())) >= lost


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["h1", "h2", "h3"]), inventories()))
def test_a_vm_with_the_baseline_can_be_shown_it_everywhere(farm_of: dict[str, HostInventory]) -> None:
    spec = VmSpec(name="web", memory_bytes=1 << 30, cpus=1, accel=Accel.TCG, cpu_model="baseline")
    try:
        model = with_baseline(spec, farm_of).cpu_model
    except Refused:
        return
    assert all(model in inventory.cpus_of["tcg"].models for inventory in farm_of.values())


async def test_a_preview_compares_qemu_and_release_and_refuses_a_taken_name() -> None:
    async def of(*names: str, candidate: HostInventory) -> dict[str, Level]:
        async with farm(*names) as f:
            hosts = await f.controller.members.hosts()
            return {finding.check: finding.level for finding in preview(hosts, "gamma", candidate)}

    same = await of("alpha", "beta", candidate=INVENTORY)
    assert same["farm-qemu"] is Level.OK
    newer = INVENTORY.model_copy(update={"qemu_version": "8.2.0", "transhume_version": "9"})
    other = await of("alpha", "beta", candidate=newer)
    assert (other["farm-qemu"], other["farm-release"]) == (Level.WARNING, Level.NOTE)
    assert await of("alpha", "gamma", candidate=INVENTORY) == {"name": Level.ERROR}


async def test_vms_are_made_with_the_baselines_model() -> None:
    async with farm() as f:
        told = INVENTORY.model_copy(update={"cpus_of": {"tcg": cpus(3)}, "kvm_obstacle": "none"})
        spec = VmSpec(name="web", memory_bytes=1 << 30, cpus=1, cpu_model="baseline")
        f.hosts["alpha"].inventory_now = told
        await f.beat()
        with pytest.raises(Refused, match="beta did not tell"):
            await f.controller.vms.create(spec, "alpha")
        assert await f.controller.vms.list() == []
        f.hosts["beta"].inventory_now = told
        await f.beat()
        made = await f.controller.vms.create(spec, "alpha")
        assert made.spec.cpu_model == "Nehalem-v1"


def _rank(farm_of: dict[str, HostInventory], model: str, accel: Accel) -> ModelRank:
    """How much the model offers, by the word of the old hosts."""
    if not model:
        return ModelRank(0, 0)
    able = [each.cpus_of[accel.value] for each in farm_of.values() if accel.value in each.cpus_of]
    return min(each.models[model] for each in able)
