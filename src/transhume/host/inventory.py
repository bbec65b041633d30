"""What this host has and can do, measured when it is asked."""

from __future__ import annotations

import os

from transhume import __version__
from transhume.memory.kernel import tracking_obstacles
from transhume.model.host import HostInventory
from transhume.vmm.capabilities import QemuFacts, cpu_flags, kernel_release, kvm_obstacle, memory, probe_qemu


class Inventory:
    """The host's facts; those that cannot change while the daemon runs are measured once."""

    def __init__(self, qemu: QemuFacts, vm_user: str) -> None:
        self.qemu = qemu
        self.kvm_obstacle = kvm_obstacle(vm_user)
        self._tracking_obstacles = tracking_obstacles()
        self._cpu_flags = cpu_flags()

    @classmethod
    async def measure(cls, vm_user: str) -> Inventory:
        """Ask QEMU and the kernel. `VmmError` when there is no QEMU."""
        return cls(await probe_qemu(), vm_user)

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
        )
