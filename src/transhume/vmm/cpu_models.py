"""Which CPUs QEMU can show to a guest on this machine, asked of QEMU itself.

`query-cpu-definitions` names every model and what it lacks here under the accelerator that QEMU was started
with. `query-cpu-model-expansion` (static) tells the features of one model. So there is no table of CPU
generations in this project: a model's rank comes from the features that QEMU says it has. What
distributions and compilers ask for is a level of the x86-64 psABI, so the level counts first and the
number of features second; a model that has all features of another and more comes out above it.
"""

from __future__ import annotations

from typing import Any

from transhume.model.host import GuestCpus, ModelRank
from transhume.model.vm import Accel
from transhume.vmm.bare_qemu import bare_qemu
from transhume.vmm.command_line import DEFAULT_BINARY
from transhume.vmm.qmp import Qmp

_NOT_OF_THE_CPU = ("kvm", "vmx-", "svme-", "hypervisor")
"""Features that the hypervisor or nested guests bring: they say nothing about the CPU."""

_LEVELS = (
    {"lm", "cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"},
    {"cx16", "lahf-lm", "popcnt", "pni", "sse4.1", "sse4.2", "ssse3"},
    {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
)
"""What each level of x86-64 adds to the one below, by the System V psABI, in QEMU's spelling."""


async def probe_cpus(accel: Accel, binary: str = DEFAULT_BINARY, deadline_s: float = 20.0) -> GuestCpus:
    """Ask a QEMU under `accel`. `VmmError` when it does not start, as without `/dev/kvm`."""
    async with bare_qemu(binary, ("-accel", accel.value), deadline_s=deadline_s) as qmp:
        models = {}
        for name in runnable(await qmp.execute("query-cpu-definitions")):
            features = await _features(qmp, name)
            if level := level_of(features):
                models[name] = ModelRank(level, len(features))
        return GuestCpus(models=models, features=tuple(sorted(await _features(qmp, "max"))))


def runnable(definitions: list[dict[str, Any]]) -> list[str]:
    """The models that run here whole, mean the same on every host, and are neither aliases nor old."""
    return sorted(
        definition["name"]
        for definition in definitions
        if definition.get("unavailable-features") == []
        and definition["migration-safe"]
        and not definition["static"]
        and not definition.get("deprecated", False)
        and "alias-of" not in definition
    )


def cpu_features(properties: dict[str, Any]) -> set[str]:
    """The features that a static expansion has switched on."""
    return {
        name for name, value in properties.items() if value is True and not name.startswith(_NOT_OF_THE_CPU)
    }


def level_of(features: set[str]) -> int:
    """The level of x86-64 that has all its features here; 0 for a CPU without 64-bit mode or SSE2."""
    reached = 0
    for added in _LEVELS:
        if not added <= features:
            break
        reached += 1
    return reached


async def _features(qmp: Qmp, model: str) -> set[str]:
    answer = await qmp.execute("query-cpu-model-expansion", type="static", model={"name": model})
    return cpu_features(answer["model"]["props"])
