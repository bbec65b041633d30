"""Who belongs to the farm, when each was last heard from, and what a restart remembers."""

from __future__ import annotations

import pytest
from tests.farm.scripted_farm import farm
from tests.trust.identities import serial_of

from transhume.farm.records import host_key
from transhume.model.errors import Conflict, HostLost, NotFound, StoreError, Unauthorized
from transhume.model.vm import VmState


async def test_a_host_that_is_not_heard_from_is_silent_and_its_vms_are_unknown() -> None:
    async with farm() as f:
        await f.running_vm("web", "beta")
        await f.beat("beta")
        assert (await f.controller.vms.show("web")).state is VmState.RUNNING
        f.now_s += 16.0
        await f.beat("alpha")
        alpha, beta = await f.controller.members.hosts()
        assert (alpha.silent, beta.silent, beta.seen_ago_s) == (False, True, 16.0)
        assert beta.vms == ("web",)
        assert (await f.controller.vms.show("web")).state is VmState.UNKNOWN
        await f.beat("beta")
        assert (await f.controller.vms.show("web")).state is VmState.RUNNING


async def test_a_restart_remembers_the_members_and_waits_to_hear_from_them() -> None:
    async with farm() as f:
        await f.restart()
        assert [host.name for host in await f.controller.members.hosts()] == ["alpha", "beta"]
        assert all(host.silent for host in await f.controller.members.hosts())
        await f.beat()
        assert not any(host.silent for host in await f.controller.members.hosts())


async def test_heartbeats_write_to_the_store_only_when_the_equipment_changes() -> None:
    async with farm() as f:
        before = await f.store.get(host_key("beta"))
        host = f.hosts["beta"]
        host.inventory_now = host.inventory_now.model_copy(update={"memory_available_bytes": 1})
        await f.beat("beta")
        assert await f.store.get(host_key("beta")) == before
        assert f.controller.members.host("beta").inventory.memory_available_bytes == 1
        host.inventory_now = host.inventory_now.model_copy(update={"qemu_version": "8.2.0"})
        await f.beat("beta")
        assert await f.store.get(host_key("beta")) != before


async def test_a_host_that_joined_and_never_reported_may_join_again() -> None:
    async with farm() as f:
        members = f.controller.members
        first = await f.join("gamma", "192.0.2.3")
        with pytest.raises(HostLost, match="has not reported yet"):
            members.host("gamma")
        second = await f.join("gamma", "192.0.2.4")
        assert not members.admits("gamma", serial_of(first.certificate))
        assert members.admits("gamma", serial_of(second.certificate))


async def test_a_host_that_joins_once_more_keeps_its_settings() -> None:
    async with farm() as f:
        members = f.controller.members
        await f.controller.overview.configure_host("beta", 1 << 30, 2.0, ("ssd",), ())
        before = members.record("beta")
        again = await members.invite(only_for="beta")
        await f.join("beta", "192.0.2.9", again.token)
        after = members.record("beta")
        assert after.certificates != before.certificates
        assert after == before.model_copy(update={"address": "192.0.2.9", "certificates": after.certificates})
        assert after.labels == ("ssd",)


async def test_tokens_expire_and_are_swept() -> None:
    async with farm() as f:
        members = f.controller.members
        invitation = await members.invite()
        f.now_s = invitation.expires_at_s
        with pytest.raises(Unauthorized, match="the token has expired; `transhume token` on alpha"):
            await f.join("gamma", "192.0.2.3", invitation.token)
        await members.invite()
        assert len(await f.store.list("tokens/")) == 1


async def test_a_host_that_was_removed_is_a_stranger() -> None:
    async with farm() as f:
        await f.controller.members.remove("beta")
        with pytest.raises(NotFound, match="let it join again"):
            await f.beat("beta")
        with pytest.raises(NotFound):
            f.controller.members.link("beta")


async def test_a_host_that_still_owes_pages_is_not_forgotten() -> None:
    """It owns the VM no longer, and the VM lacks what only it has."""
    async with farm() as f:
        await f.running_vm("web", host="beta")
        migration = await f.begun(await f.migrate("web", to="alpha"))
        await f.commit(migration)
        with pytest.raises(Conflict, match="has a part in the migration of web"):
            await f.controller.members.remove("beta")


async def test_a_record_that_cannot_be_read_is_named() -> None:
    async with farm() as f:
        await f.store.transact(puts={"vms/odd": b'{"spec": 5}'})
        with pytest.raises(StoreError, match="the record vms/odd"):
            await f.controller.vms.list()
