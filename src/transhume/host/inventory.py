"""What this host has and can do, measured when it is asked."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping

from transhume import __version__
from transhume.memory.kernel import tracking_obstacles
from transhume.model.errors import VmmError
from transhume.model.host import GuestCpus, HostInventory
from transhume.model.vm import Accel
from transhume.vmm.capabilities import (
    QemuFacts,
    cpu_flags,
    cpu_vendor,
    kernel_release,
    kvm_obstacle,
    memory,
    probe_qemu,
)
from transhume.vmm.cpu_models import probe_cpus

log = logging.getLogger(__name__)


class Inventory:
    """The host's facts; those that cannot change while the daemon runs are measured once."""

    def __init__(self, qemu: QemuFacts, vm_user: str, cpus_of: Mapping[str, GuestCpus] | None = None) -> None:
        self.qemu = qemu
        self.kvm_obstacle = kvm_obstacle(vm_user)
        self._cpus_of = dict(cpus_of or {})
        self._tracking_obstacles = tracking_obstacles()
        self._cpu_flags = cpu_flags()
        self._cpu_vendor = cpu_vendor()

    @classmethod
    async def measure(cls, vm_user: str) -> Inventory:
        """Ask QEMU and the kernel. `VmmError` when there is no QEMU."""
        qemu, cpus_of = await asyncio.gather(probe_qemu(), measure_cpus(vm_user))
        return cls(qemu, vm_user, cpus_of)

    def now(self) -> HostInventory:
        """The facts, with the memory that is available at this moment."""
        present = memory()
        return HostInventory(
            cpus=os.cpu_count() or 1,
            memory_bytes=present.total_bytes,
            memory_available_bytes=present.available_bytes,
            kernel=kernel_release(),
            transhume_version=__version__,
            qemu_version=self.qemu.version,
            machine_types=self.qemu.machine_types,
            cpu_flags=self._cpu_flags,
            kvm_obstacle=self.kvm_obstacle,
            tracking_obstacles=self._tracking_obstacles,
            cpu_vendor=self._cpu_vendor,
            cpus_of=self._cpus_of,
        )


async def measure_cpus(vm_user: str) -> dict[str, GuestCpus]:
    """Which CPUs guests can be shown, for each accelerator that VMs here would get.

    An accelerator that QEMU will not start with is left out: VMs do not start with it either, and their own
    start says why.
    """
    accels = [Accel.TCG] if kvm_obstacle(vm_user) else [Accel.TCG, Accel.KVM]
    found = {}
    for accel in accels:
        try:
            found[accel.value] = await probe_cpus(accel)
        except VmmError as error:
            log.warning("the CPUs under %s are not known: %s", accel.value, error.message)
    return found
