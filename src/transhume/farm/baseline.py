"""The farm's CPU baseline: the best CPU that every host can show to a guest. Pure.

There is one for each accelerator, since a VM keeps its own: that of KVM over the hosts that have KVM, that
of TCG over all. A host whose release does not tell its CPUs is named and takes no part; as long as there
is one, nothing is promised for the whole farm.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from transhume.model.errors import Refused
from transhume.model.finding import Finding, note, ok, warning
from transhume.model.host import GuestCpus, HostInventory, ModelRank
from transhume.model.vm import Accel, VmSpec

BASELINE = "baseline"
"""What an owner names as the CPU model of a VM that shall be able to move everywhere."""

_CHECK = "baseline"

Inventories = Mapping[str, HostInventory]


class CpuBaseline(BaseModel):
    """What all of `hosts` can show to a guest under `accel`.

    `model` is the best named model that runs on all of them, empty when there is none. `flags` are the
    features that all have, in QEMU's spelling. `held_down_by` has, for each host without which there would
    be more, the flags that its going would bring.
    """

    model_config = ConfigDict(frozen=True)

    accel: Accel
    hosts: tuple[str, ...]
    model: str = ""
    flags: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()
    held_down_by: dict[str, tuple[str, ...]] = {}


class FarmBaseline(BaseModel):
    """The baselines of a farm, KVM's first. `untold` are hosts of a release that does not tell its CPUs."""

    model_config = ConfigDict(frozen=True)

    baselines: tuple[CpuBaseline, ...] = ()
    untold: tuple[str, ...] = ()

    def of(self, accel: Accel) -> CpuBaseline | None:
        return next((found for found in self.baselines if found.accel is accel), None)


def farm_baseline(inventories: Inventories) -> FarmBaseline:
    """The baselines over all hosts of `inventories`, which are named by their keys."""
    found = []
    for accel in (Accel.KVM, Accel.TCG):
        able = _able(inventories, accel)
        if not able:
            continue
        base = _over(inventories, able, accel)
        held = {}
        for name in able if len(able) > 1 else ():
            without = _common_flags([cpus for other, cpus in able.items() if other != name])
            if more := without - set(base.flags):
                held[name] = tuple(sorted(more))
        found.append(base.model_copy(update={"held_down_by": held}))
    return FarmBaseline(
        baselines=tuple(found),
        untold=tuple(sorted(name for name in inventories if _untold(inventories[name]))),
    )


def joining(inventories: Inventories, name: str, candidate: HostInventory) -> tuple[Finding, ...]:
    """What it would change if host `name` joined a farm of `inventories`."""
    if _untold(candidate):
        return (
            warning(
                _CHECK,
                f"{name} does not tell which CPUs its guests can be shown, so nothing is known of the farm's "
                "CPU baseline with it",
                f"look whether QEMU starts on {name}: `transhume doctor` there",
            ),
        )
    before = farm_baseline(inventories)
    after = farm_baseline({**inventories, name: candidate})
    findings = [
        _joining_one(name, old, new)
        for new in after.baselines
        if (old := before.of(new.accel)) is not None and new.accel.value in candidate.cpus_of
    ]
    if before.of(Accel.KVM) is not None and Accel.KVM.value not in candidate.cpus_of:
        findings.append(
            warning(
                _CHECK,
                f"VMs under KVM cannot move to {name}, which has none",
                f"mend KVM on {name}, or make VMs that shall move there with --accel tcg",
            )
        )
    return tuple(findings)


def leaving(inventories: Inventories, name: str) -> str:
    """What it would change if host `name` left, in a sentence; empty when it changes nothing."""
    words = []
    for base in farm_baseline(inventories).baselines:
        more = base.held_down_by.get(name)
        if more:
            words.append(
                f"without {name} the CPU baseline under {base.accel.value} rises by {', '.join(more)}"
            )
    return "; ".join(words)


def with_baseline(spec: VmSpec, inventories: Inventories) -> VmSpec:
    """A VM's specification, its accelerator known, with the baseline's model in the place of `baseline`.

    Raises `Refused` when the farm has no such model, or does not know it.
    """
    if spec.cpu_model != BASELINE:
        return spec
    farm = farm_baseline(inventories)
    if farm.untold:
        raise Refused(
            f"VM {spec.name} asks for the farm's CPU baseline, and {', '.join(farm.untold)} did not tell "
            "which CPUs it has; bring it to this release, or name a model with --cpu"
        )
    base = farm.of(spec.accel)
    if base is None or not base.model:
        raise Refused(
            f"VM {spec.name} asks for the farm's CPU baseline, and no CPU model runs on all hosts under "
            f"{spec.accel.value}; `transhume baseline` shows why, --cpu names another model"
        )
    return spec.model_copy(update={"cpu_model": base.model})


def _joining_one(name: str, old: CpuBaseline, new: CpuBaseline) -> Finding:
    now = f"the farm's CPU baseline under {old.accel.value} is {old.model or 'no named model'}"
    lost = sorted(set(old.flags) - set(new.flags))
    if len(new.vendors) > 1 and len(old.vendors) == 1 and new.accel is Accel.KVM:
        return warning(
            _CHECK,
            f"{name} has a CPU of another maker ({', '.join(new.vendors)}): a guest under KVM sees the "
            "maker, and few survive a move between the two",
            "keep VMs of the two kinds apart, or make another farm",
        )
    if not lost and old.model == new.model:
        return ok(_CHECK, f"{now}; joining {name} would not lower it")
    by = f" by {', '.join(lost)}" if lost else ""
    to = f", to {new.model or 'no named model'}" if old.model != new.model else ""
    words = f"{now}; joining {name} would lower it{by}{to}"
    if new.accel is Accel.TCG:
        return note(_CHECK, words)
    return warning(
        _CHECK,
        words,
        "VMs made with --cpu baseline before keep their CPU and cannot move there; accept it or not",
    )


def _able(inventories: Inventories, accel: Accel) -> dict[str, GuestCpus]:
    return {
        name: inventories[name].cpus_of[accel.value]
        for name in sorted(inventories)
        if accel.value in inventories[name].cpus_of
    }


def _over(inventories: Inventories, able: Mapping[str, GuestCpus], accel: Accel) -> CpuBaseline:
    cpus = list(able.values())
    return CpuBaseline(
        accel=accel,
        hosts=tuple(able),
        model=_best_model(cpus),
        flags=tuple(sorted(_common_flags(cpus))),
        vendors=tuple(sorted({inventories[name].cpu_vendor for name in able} - {""})),
    )


def _best_model(cpus: list[GuestCpus]) -> str:
    """Of the models that all have, that with the highest rank. QEMU's releases may rank one differently: the
    lowest word counts.
    """
    everywhere = set.intersection(*(set(each.models) for each in cpus))
    ranks = {name: min(each.models[name] for each in cpus) for name in everywhere}

    def order(name: str) -> tuple[ModelRank, str]:
        return ranks[name], name

    return max(everywhere, key=order, default="")


def _common_flags(cpus: list[GuestCpus]) -> set[str]:
    return set.intersection(*(set(each.features) for each in cpus))


def _untold(inventory: HostInventory) -> bool:
    """Whether a host may have a CPU, under some accelerator, of which nothing is known."""
    told = inventory.cpus_of
    return not told or (not inventory.kvm_obstacle and Accel.KVM.value not in told)
