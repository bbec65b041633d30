"""VMs are let in where there is room for them and no rule is against it, also when many ask at once."""

from __future__ import annotations

import asyncio

import pytest
from tests.farm.scripted_farm import MIB, Farm, farm

from transhume.farm.rules import Rule, RuleKind
from transhume.model.errors import Conflict, HostLost, NotFound, PreflightFailed, Refused, VmmError
from transhume.model.host import HostState
from transhume.model.migration import MigrationOptions, Outcome, Phase
from transhume.model.orders import DestinationFacts
from transhume.model.vm import Ownership, Vm, VmSpec, VmState

HOSTS = ("alpha", "beta", "gamma")


def spec(name: str = "web", memory_mib: int = 1024, kernel: str = "") -> VmSpec:
    return VmSpec(name=name, memory_bytes=memory_mib * MIB, cpus=1, kernel=kernel)


async def made(f: Farm, name: str = "web", memory_mib: int = 1024, host: str | None = None) -> Vm:
    return await f.controller.vms.create(spec(name, memory_mib), host)


async def started(f: Farm, name: str = "web", memory_mib: int = 1024, host: str | None = None) -> str:
    await made(f, name, memory_mib, host)
    return (await f.controller.vms.start(name)).ownership.owner


async def rule(f: Farm, kind: str, *vms: str, hosts: tuple[str, ...] = (), name: str = "r") -> None:
    await f.controller.rules.add(Rule(name=name, kind=RuleKind(kind), vms=vms, hosts=hosts))


async def test_vms_without_a_host_spread_over_the_farm() -> None:
    async with farm(*HOSTS) as f:
        owners = [(await made(f, name)).ownership.owner for name in ("a", "b", "c")]
        assert owners == ["alpha", "beta", "gamma"]


async def test_many_at_once_never_take_the_same_room() -> None:
    """7.5 GiB each: three hosts take two VMs of 3 GiB each, and no more, whoever comes first."""
    async with farm(*HOSTS) as f:
        asked = await asyncio.gather(
            *(started(f, f"v{index}", 3072) for index in range(9)), return_exceptions=True
        )
        assert sum(isinstance(each, str) for each in asked) == 6
        assert all(isinstance(each, str | PreflightFailed) for each in asked)
        for host in (await f.controller.overview.view()).hosts:
            assert host.left_bytes >= 0
            assert host.running == 2


async def test_what_does_not_fit_is_refused_with_the_numbers_and_the_host_that_cannot_run_it() -> None:
    async with farm("alpha", "beta") as f:
        await f.running_vm("db", "alpha", 6976)
        f.now_s += 60.0
        await f.beat()
        with pytest.raises(PreflightFailed) as caught:
            await made(f, "web", 7500)
        assert caught.value.reasons == (
            "alpha: web needs 7,692 MiB; alpha has 512 MiB left of 8,192 (512 are its own, 7,168 promised)",
            "beta: web needs 7,692 MiB; beta has 7,680 MiB left of 8,192 (512 are its own, 0 promised)",
        )
        with pytest.raises(PreflightFailed) as caught:
            await f.controller.vms.create(spec("web", 256, kernel="/missing"), None)
        assert [reason.split(":")[0] for reason in caught.value.reasons] == ["alpha", "beta"]
        assert "/missing" in caught.value.reasons[0]
        assert await f.controller.vms.list() == [await f.controller.vms.show("db")]


async def test_a_named_host_needs_room_only_if_it_is_reserved() -> None:
    async with farm("alpha", "beta") as f:
        await f.running_vm("db", "alpha", 6000)
        assert (await made(f, "web", 4096, "alpha")).ownership.owner == "alpha"
        with pytest.raises(PreflightFailed, match="cannot be made on alpha") as caught:
            await made(f, "huge", 9000, "alpha")
        assert "huge needs 9,192 MiB" in caught.value.reasons[0]
        vms = f.controller.vms
        with pytest.raises(PreflightFailed, match="no room to reserve"):
            await vms.create(spec("kept", 4096), "alpha", reserve=True)
        assert (await vms.create(spec("kept", 4096), None, reserve=True)).reserve
        f.now_s += 60.0
        await f.beat()
        beta = (await f.controller.overview.view()).hosts[1]
        assert (beta.name, beta.promised_bytes >> 20, beta.running) == ("beta", 4288, 0)
        with pytest.raises(PreflightFailed, match="no room to reserve"):
            await vms.configure("web", (), (), True)
        assert not (await vms.configure("kept", (), (), False)).reserve
        assert (await f.controller.overview.view()).hosts[1].promised_bytes == 0


async def test_a_vm_that_is_refused_takes_no_room() -> None:
    async with farm("alpha", "beta") as f:
        with pytest.raises(Refused, match="/missing"):
            await f.controller.vms.create(spec("web", kernel="/missing"), "alpha", reserve=True)
        with pytest.raises(Refused, match="asks for the farm's CPU baseline"):
            await f.controller.vms.create(spec("web").model_copy(update={"cpu_model": "baseline"}), None)
        assert [host.promised_bytes for host in (await f.controller.overview.view()).hosts] == [0, 0]


async def test_a_vm_grows_while_there_is_room_for_it() -> None:
    async with farm("alpha", "beta") as f:
        vms = f.controller.vms
        await vms.create(spec("web", 1024).model_copy(update={"max_memory_bytes": 16384 * MIB}), "alpha")
        await vms.set_memory("web", 2048 * MIB)
        await vms.start("web")
        assert f.hosts["alpha"].specs["web"].memory_bytes == 2048 * MIB
        assert (await vms.set_memory("web", 4096 * MIB)).spec.memory_bytes == 4096 * MIB
        assert f.hosts["alpha"].specs["web"].added_bytes == (2048 * MIB,)
        assert (await f.controller.overview.view()).hosts[0].promised_bytes >> 20 == 4288
        with pytest.raises(PreflightFailed, match="alpha has no room for so large a VM web"):
            await vms.set_memory("web", 8192 * MIB)
        with pytest.raises(Refused, match="may have 16384 MiB at most"):
            await vms.set_memory("web", 32768 * MIB)
        with pytest.raises(Refused, match="stop it first"):
            await vms.set_memory("web", 2048 * MIB)
        assert (await vms.show("web")).spec.memory_bytes == 4096 * MIB
        await vms.kill("web")
        assert (await vms.set_memory("web", 512 * MIB)).spec.memory_bytes == 512 * MIB
        await vms.start("web")
        assert not f.hosts["alpha"].specs["web"].added_bytes


async def test_a_host_that_does_not_give_the_memory_promises_no_more_than_it_did() -> None:
    async with farm("alpha") as f:
        vms = f.controller.vms
        await vms.create(spec("web", 1024).model_copy(update={"max_memory_bytes": 8192 * MIB}), "alpha")
        await vms.start("web")
        f.hosts["alpha"].failures["grow_vm"] = VmmError("QEMU refused device_add")
        with pytest.raises(VmmError):
            await vms.set_memory("web", 2048 * MIB)
        assert (await vms.show("web")).spec.memory_bytes == 1024 * MIB
        # Whether a host that is gone has given it nobody knows: the larger share counts until it is asked.
        f.hosts["alpha"].failures["grow_vm"] = HostLost("alpha does not answer")
        with pytest.raises(HostLost):
            await vms.set_memory("web", 2048 * MIB)
        assert (await vms.show("web")).spec.memory_bytes == 2048 * MIB
        del f.hosts["alpha"].failures["grow_vm"]
        await vms.set_memory("web", 2048 * MIB)
        assert f.hosts["alpha"].specs["web"].memory_bytes == 2048 * MIB


async def test_a_vm_whose_owner_is_full_starts_elsewhere() -> None:
    async with farm(*HOSTS) as f:
        await made(f, "web", 4096, "alpha")
        await f.running_vm("db", "alpha", 6000)
        f.hosts["beta"].destination_facts_now = DestinationFacts(
            memory_available_bytes=1, disk_obstacles=("disk /x is not there",)
        )
        vm = await f.controller.vms.start("web")
        assert vm.ownership == Ownership(owner="gamma", epoch=2)
        assert f.hosts["gamma"].states["web"] is VmState.RUNNING
        assert "delete_vm" in f.hosts["alpha"].calls
        assert "web" not in f.hosts["alpha"].states


async def test_a_vm_that_fits_nowhere_stays_with_its_owner_and_says_why() -> None:
    async with farm("alpha", "beta") as f:
        await made(f, "web", 4096, "alpha")
        await f.running_vm("db", "alpha", 6000)
        f.hosts["beta"].destination_facts_now = DestinationFacts(
            memory_available_bytes=1, disk_obstacles=("disk /x is not there",)
        )
        with pytest.raises(PreflightFailed, match="VM web cannot start") as caught:
            await f.controller.vms.start("web")
        assert "alpha: web needs 4,288 MiB" in caught.value.reasons[0]
        assert caught.value.reasons[1] == "beta: disk /x is not there"
        assert (await f.controller.vms.show("web")).ownership == Ownership(owner="alpha", epoch=1)
        # What was held for it is free again.
        assert (await f.controller.overview.view()).hosts[1].promised_bytes == 0


async def test_a_vm_is_not_given_away_without_its_owners_word() -> None:
    async with farm("alpha", "beta") as f:
        await made(f, "web", 4096, "alpha")
        await f.running_vm("db", "alpha", 6000)
        f.hosts["alpha"].failures["delete_vm"] = HostLost("gone")
        with pytest.raises(PreflightFailed) as caught:
            await f.controller.vms.start("web")
        assert "beta: gone" in caught.value.reasons
        assert (await f.controller.vms.show("web")).ownership.epoch == 1
        assert "start_vm" not in f.hosts["beta"].calls


async def test_a_start_that_fails_leaves_no_room_taken() -> None:
    async with farm("alpha", "beta") as f:
        await made(f, "web", 4096, "alpha")
        f.hosts["alpha"].failures["start_vm"] = VmmError("QEMU died")
        with pytest.raises(VmmError):
            await f.controller.vms.start("web")
        assert (await f.controller.overview.view()).hosts[0].promised_bytes == 0


async def test_room_is_free_again_when_a_vm_ends() -> None:
    async with farm("alpha") as f:
        vms = f.controller.vms
        for end in (vms.stop("web", 1.0), vms.kill("web")):
            if not await f.controller.vms.list():
                await made(f, "web", 4096, "alpha")
            await vms.start("web")
            assert (await f.controller.overview.view()).promised_bytes >> 20 == 4288
            await end
            assert (await f.controller.overview.view()).promised_bytes == 0


async def test_a_move_needs_room_and_has_it_on_both_hosts_while_it_lasts() -> None:
    async with farm("alpha", "beta") as f:
        await f.running_vm("web", "alpha", 4096)
        await f.running_vm("db", "beta", 4096)
        with pytest.raises(PreflightFailed) as caught:
            await f.migrate("web", "beta")
        assert caught.value.reasons == (
            "web needs 4,288 MiB; beta has 3,392 MiB left of 8,192 (512 are its own, 4,288 promised)",
        )
        await f.controller.vms.kill("db")
        migration = await f.begun(await f.migrate("web", "beta"))
        f.now_s += 60.0
        await f.beat()
        view = await f.controller.overview.view()
        assert [host.promised_bytes >> 20 for host in view.hosts] == [4288, 4288]
        with pytest.raises(PreflightFailed, match="VM db cannot start"):
            await f.controller.vms.start("db")
        await f.commit(migration)
        await f.report(migration, "alpha", Phase.DONE, outcome=Outcome.COMPLETED)
        view = await f.controller.overview.view()
        assert [host.promised_bytes >> 20 for host in view.hosts] == [0, 4288]


async def test_rules_bind_moves_starts_and_new_vms_unless_they_are_told_not_to() -> None:
    async with farm(*HOSTS) as f:
        for name, host in (("web", "alpha"), ("db", "beta")):
            await f.running_vm(name, host)
        await rule(f, "anti-affinity", "web", "db")
        with pytest.raises(PreflightFailed) as caught:
            await f.migrate("web", "beta")
        assert caught.value.reasons == ("rule r keeps web apart from db, on beta",)
        assert (await f.migrate("web", None)).destination == "gamma"
        lawless = MigrationOptions(ignore_rules=True)
        assert (await f.controller.migrations.request("db", "alpha", lawless)).destination == "alpha"


async def test_a_pinned_vm_starts_where_it_must() -> None:
    async with farm(*HOSTS) as f:
        await made(f, "web", 512, "alpha")
        await f.controller.overview.configure_host("gamma", None, None, ("ssd",), ())
        await rule(f, "pin", "web", hosts=("@ssd",))
        assert (await f.controller.vms.start("web")).ownership.owner == "gamma"
        await f.controller.vms.kill("web")
        await f.controller.rules.remove("r")
        await rule(f, "pin", "@db", hosts=("@ssd",))
        vm = await f.controller.vms.create(spec("new", 256), None, labels=("db",))
        assert (vm.ownership.owner, vm.labels) == ("gamma", ("db",))
        with pytest.raises(PreflightFailed, match="cannot be made on alpha"):
            await f.controller.vms.create(spec("other", 256), "alpha", labels=("db",))
        [view] = await f.controller.rules.list()
        assert (view.vms, view.hosts) == (("new",), ("gamma",))
        await f.controller.vms.configure("new", (), ("db",), None)
        [view] = await f.controller.rules.list()
        assert "no VM carries @db" in view.warnings[0]


async def test_rules_are_checked_when_they_are_made() -> None:
    async with farm("alpha", "beta") as f:
        for name in ("a", "b", "c"):
            await made(f, name, 256, "alpha")
        with pytest.raises(NotFound, match="no VM nobody"):
            await rule(f, "affinity", "a", "nobody")
        with pytest.raises(NotFound, match="no host nowhere"):
            await rule(f, "pin", "a", hosts=("nowhere",))
        with pytest.raises(PreflightFailed, match="can never hold"):
            await rule(f, "anti-affinity", "a", "b", "c")
        await rule(f, "affinity", "a", "b")
        with pytest.raises(Conflict, match="already"):
            await rule(f, "affinity", "a", "c")
        both = await asyncio.gather(
            rule(f, "anti-affinity", "a", "c", name="x"),
            rule(f, "affinity", "b", "c", name="y"),
            return_exceptions=True,
        )
        assert [type(each) for each in both] == [type(None), PreflightFailed]
        with pytest.raises(NotFound):
            await f.controller.rules.remove("z")


async def test_a_host_that_is_drained_or_in_maintenance_gets_no_vm() -> None:
    async with farm("alpha", "beta") as f:
        await f.running_vm("web", "alpha")
        await f.controller.members.configure("beta", {"state": HostState.MAINTENANCE})
        with pytest.raises(PreflightFailed, match="runs on alpha as before") as caught:
            await f.migrate("web", "beta")
        assert "beta is in maintenance; `transhume undrain beta` ends that" in caught.value.reasons[0]
        with pytest.raises(PreflightFailed):
            await made(f, "new", 256, "beta")
        assert (await made(f, "new", 256)).ownership.owner == "alpha"
        await f.restart()
        await f.beat()
        assert [host.state for host in await f.controller.members.hosts()] == ["active", "maintenance"]


async def test_the_controllers_own_host_keeps_what_was_set_for_it() -> None:
    async with farm("alpha", "beta") as f:
        await f.controller.overview.configure_host("alpha", 2048 * MIB, 2.0, ("ssd", "old"), ())
        await f.controller.overview.configure_host("alpha", None, None, (), ("old",))
        await f.controller.overview.configure_farm(8.0)
        await f.restart()
        await f.beat()
        view = await f.controller.overview.view()
        alpha, beta = view.hosts
        assert (alpha.reserved_bytes, alpha.cpu_overcommit, alpha.labels) == (2048 * MIB, 2.0, ("ssd",))
        assert (beta.reserved_bytes, beta.cpu_overcommit, view.cpu_overcommit) == (512 * MIB, 8.0, 8.0)
        assert view.can_lose_one
        with pytest.raises(NotFound):
            await f.controller.overview.configure_host("nowhere", None, None, (), ())


async def test_a_farm_that_cannot_lose_a_host_says_by_how_much() -> None:
    async with farm("alpha", "beta") as f:
        await f.running_vm("web", "alpha", 4096)
        assert (await f.controller.overview.view()).can_lose_one
        await f.running_vm("db", "beta", 4096)
        view = await f.controller.overview.view()
        assert (view.can_lose_one, view.worst_host, view.short_bytes >> 20) == (False, "alpha", 4288)
        assert list(view.hosts[0].stranded) == ["web"]
