"""A host ends a VM of another's only on the word of a register that is newer than the VM."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from transhume.host.config import HostConfig
from transhume.host.controller_link import ControllerLink
from transhume.host.inventory import Inventory
from transhume.host.service import HostService
from transhume.host.vms import LocalVms
from transhume.model.vm import Ownership


class Register:
    """Says that alpha owns every VM, under one epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    async def ownership(self, vm: str) -> Ownership:
        return Ownership(owner="alpha", epoch=self._epoch)


@pytest.mark.parametrize(("register_epoch", "ended"), [(1, []), (2, []), (3, ["web"])])
async def test_only_a_higher_epoch_ends_a_vm(
    register_epoch: int, ended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []

    async def kill(_: LocalVms, name: str) -> None:
        killed.append(name)

    monkeypatch.setattr(LocalVms, "epoch", lambda _vms, _name: 2)
    monkeypatch.setattr(LocalVms, "kill", kill)
    config = HostConfig(name="beta", state_dir=tmp_path, address="192.0.2.1")
    service = HostService(config, cast("Inventory", None), cast("ControllerLink", Register(register_epoch)))
    try:
        assert await service.end_disowned(["web"]) == ended
    finally:
        await service.close()
    assert killed == ended
