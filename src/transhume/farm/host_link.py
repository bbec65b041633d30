"""What the controller asks of a host. The daemon's own service and the HTTP client both satisfy it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from transhume.model.host import HostInventory
from transhume.model.orders import (
    Adjustment,
    AdjustReply,
    BeginOrder,
    CancelReply,
    DestinationFacts,
    DirtySample,
    FolderFacts,
    FolderProbe,
    Prepared,
    PrepareOrder,
    ReviveReply,
    SourceFacts,
)
from transhume.model.vm import VmSpec, VmState


class HostLink(Protocol):
    """One host, seen from the controller.

    Every method raises `HostLost` when the host does not answer; what it does then is unknown.
    """

    async def inventory(self) -> HostInventory: ...

    async def resolve_spec(self, spec: VmSpec) -> VmSpec:
        """Fill in what the owner left open (machine type, accelerator, CPU model) for this host.

        Raises `Refused` when the host cannot run such a VM (a file that is missing, no KVM).
        """
        ...

    async def start_vm(self, spec: VmSpec) -> None:
        """Start QEMU and the guest. Raises `Conflict` when it runs, `VmmError` when QEMU dies."""
        ...

    async def grow_vm(self, name: str, memory_bytes: int) -> None:
        """Give a VM that runs RAM up to so much in all; it does nothing when the VM has that.

        Raises `Conflict` when it does not run or moves, `Refused` when it cannot have it, `VmmError`.
        """
        ...

    async def stop_vm(self, name: str, timeout_s: float) -> None:
        """Ask the guest to power down and wait; `TimedOut` leaves it running."""
        ...

    async def kill_vm(self, name: str) -> None:
        """End QEMU at once. Does nothing when it does not run."""
        ...

    async def delete_vm(self, name: str) -> None:
        """Remove what the host keeps of a stopped VM. `Conflict` when it runs."""
        ...

    async def vm_states(self) -> Mapping[str, VmState]: ...

    async def vm_log(self, name: str, serial: bool, lines: int) -> str: ...

    def console(self, name: str, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Join the guest's serial console: what the guest prints, for what the person types."""
        ...

    async def screendump(self, name: str) -> bytes:
        """The guest's screen as a PNG."""
        ...

    async def source_facts(self, vm: str) -> SourceFacts: ...

    async def destination_facts(self, spec: VmSpec) -> DestinationFacts: ...

    async def probe_folder(self, order: FolderProbe) -> FolderFacts:
        """One step of finding out whether hosts share a folder."""
        ...

    async def sample_dirty_rate(self, vm: str, duration_s: float) -> DirtySample: ...

    async def prepare(self, order: PrepareOrder) -> Prepared:
        """Make the destination VM. After an error nothing is left on the host."""
        ...

    async def begin(self, order: BeginOrder) -> None:
        """Start the source's mover. After an error nothing was sent and the VM goes on."""
        ...

    async def cancel(self, migration: str) -> CancelReply: ...

    async def adjust(self, migration: str, adjustment: Adjustment) -> AdjustReply: ...

    async def revive(self, migration: str) -> ReviveReply:
        """To the source: take the VM back from a destination that is lost, as it was suspended."""
        ...

    async def abandon(self, migration: str) -> None:
        """Forget a prepared destination whose source never came. Does nothing after a commit."""
        ...
