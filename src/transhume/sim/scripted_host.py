"""A host that does what it is told: a `HostLink` for tests of the controller and of the API.

It keeps VMs as mere states, notes every call, and can be told to fail or to wait at any of them. It moves
nothing: whoever uses it plays the movers, by reporting to the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from transhume.model.errors import Conflict, NotFound, Refused, TranshumeError
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
from transhume.model.vm import Accel, RamBlock, VmSpec, VmState

MACHINE_TYPE = "pc-q35-7.2"

INVENTORY = HostInventory(
    cpus=2,
    memory_bytes=8 << 30,
    memory_available_bytes=6 << 30,
    kernel="6.18.0",
    transhume_version="0",
    qemu_version="7.2.22",
    machine_types=(MACHINE_TYPE,),
    cpu_flags=("sse4_2", "avx2"),
)


class ScriptedHost:
    """Satisfies `HostLink`.

    Set `failures[method]` to make each call of a method raise, and `waits[method]` to hold it until the
    event is set (the failure is looked up afterwards). `calls` are the methods called, in order.
    """

    def __init__(self, name: str, inventory: HostInventory = INVENTORY) -> None:
        self.name = name
        self.inventory_now = inventory
        self.states: dict[str, VmState] = {}
        self.specs: dict[str, VmSpec] = {}
        self.failures: dict[str, TranshumeError] = {}
        self.waits: dict[str, asyncio.Event] = {}
        self.calls: list[str] = []
        self.prepared: dict[str, PrepareOrder] = {}
        self.adjustments: list[Adjustment] = []
        self.refuses_adjustments = ""
        self.refuses_revival = ""
        self.probes: list[FolderProbe] = []
        self.folder_obstacle = ""
        self.folder_bytes = 1 << 40
        self.begun: dict[str, BeginOrder] = {}
        self.abandoned: list[str] = []
        self.cancel_reply: CancelReply | None = None
        self.source_changes: dict[str, object] = {}
        self.destination_facts_now: DestinationFacts | None = None
        self.dirty_sample = DirtySample(
            sample_ms=1000.0, populated_bytes=512 << 20, zero_bytes=0, dirty_bytes=4 << 20
        )

    async def inventory(self) -> HostInventory:
        await self._step("inventory")
        return self.inventory_now

    async def resolve_spec(self, spec: VmSpec) -> VmSpec:
        await self._step("resolve_spec")
        if spec.kernel == "/missing":
            raise Refused(f"the kernel {spec.kernel} does not exist on host {self.name}; name one that does")
        cpu_model = spec.cpu_model or "max"
        changes = {"machine_type": MACHINE_TYPE, "accel": Accel.TCG, "cpu_model": cpu_model}
        return spec.model_copy(update=changes)

    async def start_vm(self, spec: VmSpec) -> None:
        await self._step("start_vm")
        if self.states.get(spec.name) is VmState.RUNNING:
            raise Conflict(f"VM {spec.name} runs already")
        self.specs[spec.name] = spec
        self.states[spec.name] = VmState.RUNNING

    async def grow_vm(self, name: str, memory_bytes: int) -> None:
        await self._step("grow_vm")
        if self.states.get(name) is not VmState.RUNNING:
            raise Conflict(f"VM {name} does not run on this host")
        spec = self.specs[name]
        if memory_bytes != spec.memory_bytes:
            self.specs[name] = spec.with_added(memory_bytes - spec.memory_bytes)

    async def stop_vm(self, name: str, timeout_s: float) -> None:
        await self._step("stop_vm")
        self.states[name] = VmState.STOPPED

    async def kill_vm(self, name: str) -> None:
        await self._step("kill_vm")
        self.states[name] = VmState.STOPPED

    async def delete_vm(self, name: str) -> None:
        await self._step("delete_vm")
        if self.states.get(name, VmState.STOPPED) is not VmState.STOPPED:
            raise Conflict(f"VM {name} runs on {self.name}; stop it first")
        self.states.pop(name, None)
        self.specs.pop(name, None)

    async def vm_states(self) -> Mapping[str, VmState]:
        await self._step("vm_states")
        return dict(self.states)

    async def vm_log(self, name: str, serial: bool, lines: int) -> str:
        await self._step("vm_log")
        return "".join(f"{'serial' if serial else 'qemu'} line {n} of {name}\n" for n in range(lines))

    async def console(self, name: str, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Greets, then answers what is typed in capitals, until ^D."""
        await self._step("console")
        yield f"console of {name}\r\n".encode()
        async for data in received:
            if data == b"\x04":
                return
            yield data.upper()

    async def screendump(self, name: str) -> bytes:
        await self._step("screendump")
        return b"\x89PNG\r\n\x1a\n" + name.encode()

    async def source_facts(self, vm: str) -> SourceFacts:
        await self._step("source_facts")
        if vm not in self.specs:
            raise NotFound(f"host {self.name} has no VM {vm}")
        spec = self.specs[vm]
        facts = SourceFacts(
            state=self.states[vm],
            spec=spec,
            ram_blocks=(RamBlock(index=0, name="ram0", size_bytes=spec.memory_bytes),),
            qemu_version=self.inventory_now.qemu_version,
        )
        return facts.model_copy(update=self.source_changes)

    async def destination_facts(self, spec: VmSpec) -> DestinationFacts:
        await self._step("destination_facts")
        if self.destination_facts_now is not None:
            return self.destination_facts_now
        return DestinationFacts(memory_available_bytes=self.inventory_now.memory_available_bytes)

    async def probe_folder(self, order: FolderProbe) -> FolderFacts:
        await self._step("probe_folder")
        self.probes.append(order)
        return FolderFacts(obstacle=self.folder_obstacle, available_bytes=self.folder_bytes)

    async def sample_dirty_rate(self, vm: str, duration_s: float) -> DirtySample:
        await self._step("sample_dirty_rate")
        return self.dirty_sample

    async def prepare(self, order: PrepareOrder) -> Prepared:
        await self._step("prepare")
        self.prepared[order.migration.id] = order
        return Prepared(address="192.0.2.1", port=7000, key="00" * 32)

    async def begin(self, order: BeginOrder) -> None:
        await self._step("begin")
        self.begun[order.migration.id] = order

    async def cancel(self, migration: str) -> CancelReply:
        await self._step("cancel")
        if migration not in self.begun:
            raise NotFound(f"host {self.name} knows nothing of migration {migration}")
        return self.cancel_reply or CancelReply(accepted=True, runs_at=self.name)

    async def revive(self, migration: str) -> ReviveReply:
        await self._step("revive")
        return ReviveReply(revived=not self.refuses_revival, message=self.refuses_revival)

    async def adjust(self, migration: str, adjustment: Adjustment) -> AdjustReply:
        await self._step("adjust")
        if migration not in self.begun:
            raise NotFound(f"host {self.name} knows nothing of migration {migration}")
        self.adjustments.append(adjustment)
        return AdjustReply(accepted=not self.refuses_adjustments, message=self.refuses_adjustments)

    async def abandon(self, migration: str) -> None:
        await self._step("abandon")
        self.abandoned.append(migration)
        self.prepared.pop(migration, None)

    async def _step(self, method: str) -> None:
        self.calls.append(method)
        waiting = self.waits.get(method)
        if waiting is not None:
            await waiting.wait()
        failure = self.failures.get(method)
        if failure is not None:
            raise failure
