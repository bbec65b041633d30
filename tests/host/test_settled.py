"""A host starts nothing before it knows which of its VMs are still its own."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from transhume.host import service as service_module
from transhume.host.config import HostConfig
from transhume.host.controller_link import ControllerLink
from transhume.host.inventory import Inventory
from transhume.host.service import HostService
from transhume.model.errors import Conflict
from transhume.model.vm import VmSpec


async def test_nothing_starts_before_the_host_has_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "SETTLE_LIMIT_S", 0.05)
    config = HostConfig(name="beta", state_dir=tmp_path, address="192.0.2.1")
    service = HostService(config, cast(Inventory, None), cast(ControllerLink, None))
    started: list[str] = []

    async def start(spec: VmSpec) -> None:
        started.append(spec.name)

    monkeypatch.setattr(service._vms, "start", start)
    spec = VmSpec(name="web", memory_bytes=64 << 20, cpus=1)
    service.unsettle()
    with pytest.raises(Conflict, match="starts nothing before"):
        await service.start_vm(spec)
    assert started == []
    service.settle()
    await service.start_vm(spec)
    assert started == ["web"]
    await service.close()
