"""Each verb through HTTP: over the local socket, from a member to the controller, and to the owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.api.daemons import ADDRESS, MIB, Daemons, free_port, two_daemons

from transhume.api.client import FarmClient
from transhume.api.controller_client import ControllerClient
from transhume.api.host_client import HostClient
from transhume.model.errors import (
    Conflict,
    HostLost,
    NotFound,
    PreflightFailed,
    Refused,
    Unauthorized,
    VmmError,
)
from transhume.model.migration import MigrationOptions, Outcome, Phase
from transhume.model.orders import DestinationFacts, MigrationUpdate
from transhume.model.vm import Ownership, VmSpec, VmState

SPEC = VmSpec(name="web", memory_bytes=256 * MIB, cpus=1)


async def test_a_vms_life_asked_for_from_a_member() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        vm = await client.create_vm(SPEC, "beta")
        assert vm.ownership == Ownership(owner="beta", epoch=1)
        assert vm.spec.machine_type == "pc-q35-7.2"
        assert (await client.start_vm("web")).state is VmState.RUNNING
        assert d.beta.states == {"web": VmState.RUNNING}
        with pytest.raises(Conflict, match="runs on beta"):
            await client.delete_vm("web")
        assert (await client.vm_log("web", serial=True, lines=2)).splitlines()[0] == "serial line 0 of web"
        assert (await client.screendump("web")).startswith(b"\x89PNG")
        assert (await client.stop_vm("web", 5.0)).state is VmState.STOPPED
        await client.start_vm("web")
        assert (await client.kill_vm("web")).state is VmState.STOPPED
        assert [vm.spec.name for vm in await client.vms()] == ["web"]
        await client.delete_vm("web")
        with pytest.raises(NotFound):
            await client.vm("web")
        assert await client.vms() == []


async def test_a_vm_is_made_on_the_host_that_is_named_or_has_room() -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        assert (await client.create_vm(SPEC, None)).ownership.owner == "alpha"
        other = SPEC.model_copy(update={"name": "db"})
        assert (await client.create_vm(other, "beta")).ownership.owner == "beta"
        with pytest.raises(Conflict, match="VM web already"):
            await client.create_vm(SPEC, "beta")
        with pytest.raises(NotFound, match="no host gamma"):
            await client.create_vm(SPEC.model_copy(update={"name": "x"}), "gamma")
        with pytest.raises(Refused, match="kernel /missing does not exist on host beta"):
            await client.create_vm(SPEC.model_copy(update={"name": "x", "kernel": "/missing"}), "beta")


async def test_errors_keep_their_class_through_two_hops() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await client.create_vm(SPEC, "beta")
        d.beta.failures["start_vm"] = VmmError("QEMU ended at once: no such option")
        with pytest.raises(VmmError, match="QEMU ended at once: no such option"):
            await client.start_vm("web")
        await d.running_vm("db")
        d.beta.destination_facts_now = DestinationFacts(memory_available_bytes=1, disk_obstacles=("no disk",))
        with pytest.raises(PreflightFailed) as caught:
            await client.migrate("db", "beta", MigrationOptions())
        assert len(caught.value.reasons) == 2


async def test_a_console_through_a_member_and_back_to_the_owner() -> None:
    async with two_daemons() as d:
        for owner in ("alpha", "beta"):
            await d.running_vm(f"on-{owner}", owner)
            for config in (d.alpha_config, d.beta_config):
                async with d.near(config) as client:
                    await _talk(client, f"on-{owner}")


async def _talk(client: FarmClient, vm: str) -> None:
    typed: asyncio.Queue[bytes] = asyncio.Queue()

    async def keys() -> AsyncIterator[bytes]:
        while True:
            yield await typed.get()

    console = client.console(vm, keys())
    assert await anext(console) == f"console of {vm}\r\n".encode()
    await typed.put(b"ls -l\n")
    assert await anext(console) == b"LS -L\n"
    await typed.put(b"\x04")
    assert [data async for data in console] == []


async def test_a_person_who_leaves_the_console_ends_it() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm("web")
        leave = asyncio.Event()

        async def keys() -> AsyncIterator[bytes]:
            yield b"hello"
            await leave.wait()

        console = client.console("web", keys())
        assert await anext(console) == b"console of web\r\n"
        assert await anext(console) == b"HELLO"
        leave.set()
        assert [data async for data in console] == []


async def test_a_console_that_cannot_be_joined_says_why() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:

        async def keys() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        with pytest.raises(NotFound, match="no VM web"):
            await anext(client.console("web", keys()))
        await d.running_vm("web")
        d.alpha.failures["console"] = Conflict("VM web does not run on host alpha: it has no console")
        with pytest.raises(Conflict, match="it has no console"):
            await anext(client.console("web", keys()))


async def test_a_migration_over_the_wire_followed_from_a_member() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm("web")
        migration = await client.migrate("web", None, MigrationOptions(max_downtime_ms=20.0))
        assert (migration.source, migration.destination) == ("alpha", "beta")
        assert migration.options.max_downtime_ms == 20.0
        seen: list[Phase] = []
        async for event in client.follow(migration.id):
            if event.migration.phase not in seen:
                seen.append(event.migration.phase)
            if event.migration.phase is Phase.PREPARED:
                asyncio.get_running_loop().create_task(_play_the_movers(d, migration.id))
        assert seen[-1] is Phase.DONE
        assert (await client.migration(migration.id)).runs_at == "destination host beta"
        assert [record.id for record in await client.migrations()] == [migration.id]
        assert (await client.vm("web")).ownership == Ownership(owner="beta", epoch=2)


async def test_a_host_swaps_what_it_gives_or_gets_and_nothing_else() -> None:
    async with two_daemons() as d:
        async with d.near(d.alpha_config) as client:
            await client.create_vm(SPEC, "alpha")
        beta = ControllerClient(d.beta_config)
        held = Ownership(owner="alpha", epoch=1)
        with pytest.raises(Unauthorized, match="host beta neither gives nor gets VM web"):
            await beta.swap_ownership("web", held, Ownership(owner="alpha", epoch=2))
        assert await beta.ownership("web") == held
        late = await beta.swap_ownership(
            "web", Ownership(owner="alpha", epoch=7), Ownership(owner="alpha", epoch=8)
        )
        assert (late.won, late.owner, late.epoch) == (False, "alpha", 1)
        await beta.close()


async def _play_the_movers(d: Daemons, migration: str) -> None:
    client = ControllerClient(d.beta_config)
    await client.ping()
    assert await client.ownership("web") == Ownership(owner="alpha", epoch=1)
    record = await client.migration(migration)
    reply = await client.swap_ownership(
        "web", Ownership(owner="alpha", epoch=record.epoch), Ownership(owner="beta", epoch=record.epoch + 1)
    )
    assert reply.won
    again = await client.swap_ownership(
        "web", Ownership(owner="alpha", epoch=record.epoch), Ownership(owner="alpha", epoch=record.epoch + 1)
    )
    assert (again.won, again.owner, again.epoch) == (False, "beta", 2)
    await client.report(MigrationUpdate(migration=migration, host="beta", phase=Phase.COMMITTED))
    await client.close()
    at_source = ControllerClient(d.alpha_config)
    await at_source.report(
        MigrationUpdate(migration=migration, host="alpha", phase=Phase.DONE, outcome=Outcome.COMPLETED)
    )
    await at_source.close()


async def test_a_stream_goes_on_behind_what_was_seen() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm("web")
        migration = await client.migrate("web", "beta", MigrationOptions())
        async for event in client.follow(migration.id):
            if event.migration.phase is Phase.PREPARED:
                break
        await d.report_from_beta(MigrationUpdate(migration=migration.id, host="beta", phase=Phase.PRECOPY))
        missed = await anext(client.follow(migration.id, after=event.id))
        assert missed.id > event.id
        assert missed.migration.phase is Phase.PRECOPY
        assert (await client.cancel("web")).accepted


async def test_a_dry_run_and_a_cancel_from_a_member() -> None:
    async with two_daemons() as d, d.near(d.beta_config) as client:
        await d.running_vm("web")
        answer = await client.dry_run("web", "beta", MigrationOptions())
        assert answer.reasons == ()
        assert answer.downtime_ms is not None
        with pytest.raises(Conflict, match="not moving"):
            await client.cancel("web")


async def test_a_controller_that_is_gone_is_a_lost_host() -> None:
    async with two_daemons() as d:
        lost = d.beta_config.model_copy(update={"controller_port": free_port()})
        client = ControllerClient(lost)
        with pytest.raises(HostLost, match="the controller at"):
            await client.ping()
        await client.close()
        async with FarmClient(d.folder / "no.sock") as nobody:
            with pytest.raises(HostLost):
                await nobody.hosts()
        host = HostClient("gamma", ADDRESS, free_port(), d.alpha_credentials)
        with pytest.raises(HostLost, match="host gamma at"):
            await host.inventory()
        await host.close()


async def test_a_host_that_is_gone_is_named_with_what_is_unknown() -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        await d.running_vm("web", "beta")
        d.beta.failures["source_facts"] = HostLost("host beta at 127.0.0.1 does not answer")
        with pytest.raises(HostLost, match="where the VM runs is unknown until beta does"):
            await client.migrate("web", "alpha", MigrationOptions())


async def test_hosts_leave_when_they_own_nothing() -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        await d.running_vm("web", "beta")
        with pytest.raises(Conflict, match="owns web"):
            await client.remove_host("beta")
        with pytest.raises(Conflict, match="carries the controller"):
            await client.remove_host("alpha")
        await client.kill_vm("web")
        await client.delete_vm("web")
        await client.remove_host("beta")
        assert [host.name for host in await client.hosts()] == ["alpha"]
