"""Which CPUs QEMU says that it can show."""

from __future__ import annotations

import pytest
from tests.vmm.machines import MACHINE_TYPE

from transhume.model.errors import VmmError
from transhume.model.vm import Accel
from transhume.vmm.bare_qemu import bare_qemu
from transhume.vmm.cpu_models import cpu_features, level_of, probe_cpus, runnable


async def test_qemu_tells_its_models_and_their_features() -> None:
    cpus = await probe_cpus(Accel.TCG)
    assert cpus.models["qemu64-v1"].level == 1
    assert cpus.models["Nehalem-v1"].level == 2
    assert cpus.models["Westmere-v1"] > cpus.models["Nehalem-v1"]
    assert "486-v1" not in cpus.models, "it has no 64-bit mode"
    assert not {"max", "host", "base", "Nehalem"} & set(cpus.models)
    assert {"sse2", "sse4.2", "lm"} <= set(cpus.features)
    assert not [flag for flag in cpus.features if flag.startswith(("kvm", "vmx-"))]


def test_only_models_that_run_whole_and_mean_the_same_everywhere() -> None:
    good = {"unavailable-features": [], "migration-safe": True, "static": False}
    definitions = [
        {**good, "name": "Good-v1", "deprecated": False},
        {**good, "name": "Fine-v2"},
        {**good, "name": "Lacking-v1", "unavailable-features": ["avx512f"]},
        {**good, "name": "Good", "alias-of": "Good-v1"},
        {**good, "name": "host", "migration-safe": False},
        {**good, "name": "base", "static": True},
        {**good, "name": "Old-v1", "deprecated": True},
        {"name": "Unknown-v1", "migration-safe": True, "static": False},
    ]
    assert runnable(definitions) == ["Fine-v2", "Good-v1"]


def test_features_are_what_is_switched_on_and_of_the_cpu() -> None:
    properties = {"avx": True, "avx2": False, "kvmclock": True, "vmx-ept": True, "vendor": "x", "level": 1}
    assert cpu_features(properties) == {"avx"}


def test_levels_build_on_each_other() -> None:
    first = {"lm", "cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"}
    second = {"cx16", "lahf-lm", "popcnt", "pni", "sse4.1", "sse4.2", "ssse3"}
    assert level_of(first - {"lm"}) == 0
    assert level_of(first) == 1
    assert level_of(first | second) == 2
    third = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
    assert level_of(first | third) == 1, "a level without the one below it is none"
    assert level_of(first | second | third) == 3


async def test_a_qemu_that_does_not_start_is_told_at_once_with_its_words() -> None:
    with pytest.raises(VmmError, match=r"; it said: .*invalid accelerator no-such-accel"):
        async with bare_qemu(options=("-accel", "no-such-accel"), deadline_s=60.0):
            raise AssertionError("it started")


async def test_a_command_that_qemu_refuses_is_not_taken_for_a_bad_start() -> None:
    async with bare_qemu() as qmp:
        with pytest.raises(VmmError, match="QEMU refused no-such-command"):
            await qmp.execute("no-such-command")
        machines = await qmp.execute("query-machines")
    assert MACHINE_TYPE in {machine["name"] for machine in machines}
