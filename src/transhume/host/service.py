"""What this host does for the controller: its VMs, its facts, its ends of migrations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from transhume.host.config import HostConfig
from transhume.host.console import Consoles
from transhume.host.controller_link import ControllerLink
from transhume.host.dirty_sample import sample
from transhume.host.inventory import Inventory
from transhume.host.movers import Movers
from transhume.host.shared_folder import probe
from transhume.host.strict_vms import StrictVms
from transhume.host.switchover_cost import SwitchoverCost
from transhume.host.vms import LocalVms
from transhume.migration.driver.job import MoverJob, Role
from transhume.model.errors import Conflict, NotFound, Refused
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
    MigrationUpdate,
    Prepared,
    PrepareOrder,
    ReviveReply,
    SourceFacts,
)
from transhume.model.vm import Accel, VmSpec, VmState
from transhume.vmm.added_memory import settle_memory
from transhume.vmm.capabilities import cpu_flags, memory
from transhume.vmm.command_line import ram_blocks
from transhume.vmm.image_lock import has_writer
from transhume.vmm.inspect import access_obstacle, find_obstacles

SETTLE_LIMIT_S = 10.0


class HostService:
    """Satisfies `farm.host_link.HostLink` for the host that it runs on."""

    def __init__(self, config: HostConfig, inventory: Inventory, link: ControllerLink) -> None:
        self.config = config
        self._inventory = inventory
        self._link = link
        self._vms = LocalVms(config.vms_dir, config.vm_user)
        self._consoles = Consoles()
        self._cost = SwitchoverCost(config.state_dir / "switchover.json")
        self._movers = Movers(config.migrations_dir, link, self._learn)
        self._growing: set[str] = set()
        self.strict = StrictVms(
            config.name,
            config.state_dir / "strict.json",
            self._vms,
            link,
            self._movers.is_moving,
            time.monotonic,
        )
        self._settled = asyncio.Event()
        self._settled.set()

    def recover(self) -> None:
        """Take up what an earlier daemon left. Call once, when the controller can be reached or not."""
        self._movers.recover()
        self._movers.stand_by()

    def unsettle(self) -> None:
        """Nothing is started here from now on, until `settle`: VMs may run that are another host's by now."""
        self._settled.clear()

    def settle(self) -> None:
        """The register was asked for all that runs here, and what is another's was ended."""
        self._settled.set()

    async def close(self) -> None:
        """Let go; VMs and movers go on."""
        await self._movers.close()
        await self._vms.close()

    # --- facts -----------------------------------------------------------------------------------

    async def inventory(self) -> HostInventory:
        return self._inventory.now().model_copy(update={"other_addresses": self.config.other_addresses})

    async def resolve_spec(self, spec: VmSpec) -> VmSpec:
        """Fill in machine type, accelerator and CPU model; refuse what this host cannot run."""
        reasons = await self._file_obstacles(spec) + await self._disk_obstacles(spec)
        if reasons:
            raise Refused(
                f"VM {spec.name} cannot be created on host {self.config.name}: {'; '.join(reasons)}"
            )
        kvm_obstacle = self._inventory.kvm_obstacle
        accel = spec.accel
        if accel is Accel.KVM and kvm_obstacle:
            raise Refused(
                f"VM {spec.name} asks for KVM, which host {self.config.name} cannot offer: {kvm_obstacle}"
            )
        if accel is Accel.AUTO:
            accel = Accel.TCG if kvm_obstacle else Accel.KVM
        qemu = self._inventory.qemu
        machine_type = spec.machine_type or qemu.default_machine_type
        if machine_type not in qemu.machine_types:
            raise Refused(
                f"host {self.config.name} has no machine type {machine_type}: "
                f"its QEMU {qemu.version} offers e.g. {qemu.default_machine_type}"
            )
        cpu_model = spec.cpu_model or ("host" if accel is Accel.KVM else "max")
        return spec.model_copy(update={"accel": accel, "machine_type": machine_type, "cpu_model": cpu_model})

    async def source_facts(self, vm: str) -> SourceFacts:
        spec = self._vms.spec(vm)
        process = self._vms.process(vm)
        if process is None:
            return SourceFacts(state=VmState.STOPPED, spec=spec)
        try:
            monitor = await self._vms.monitor(vm)
            if spec.max_memory_bytes and self._movers.of_vm(vm) is None and vm not in self._growing:
                spec = await settle_memory(monitor, self._vms.paths(vm), spec)
            obstacles = await find_obstacles(monitor, process.pid)
            return SourceFacts(
                state=await monitor.state(),
                spec=spec,
                ram_blocks=ram_blocks(spec),
                qemu_version=monitor.version,
                required_cpu_flags=cpu_flags() if spec.accel is Accel.KVM else (),
                ram_obstacles=obstacles.ram,
                device_obstacles=obstacles.devices,
                qemu_obstacles=obstacles.qemu,
            )
        finally:
            process.close()

    async def destination_facts(self, spec: VmSpec) -> DestinationFacts:
        return DestinationFacts(
            memory_available_bytes=memory().available_bytes,
            disk_obstacles=tuple(await self._disk_obstacles(spec)),
            file_obstacles=tuple(await self._file_obstacles(spec)),
            disks_in_use=tuple(await self._disks_in_use(spec)),
        )

    async def probe_folder(self, order: FolderProbe) -> FolderFacts:
        return await asyncio.to_thread(probe, order)

    async def sample_dirty_rate(self, vm: str, duration_s: float) -> DirtySample:
        """Track the VM's writes for `duration_s`. `Conflict` while it is being moved."""
        if self._movers.of_vm(vm) is not None:
            raise Conflict(f"VM {vm} is being moved: its writes are tracked already")
        process = self._vms.process(vm)
        if process is None:
            raise Conflict(f"VM {vm} does not run on host {self.config.name}")
        try:
            return await sample(await self._vms.monitor(vm), process.pid, duration_s)
        finally:
            process.close()

    # --- VMs -------------------------------------------------------------------------------------

    async def start_vm(self, spec: VmSpec) -> None:
        await self._until_settled()
        if self._movers.of_vm(spec.name) is not None:
            raise Conflict(f"VM {spec.name} is being moved")
        await self._vms.start(spec)

    async def grow_vm(self, name: str, memory_bytes: int) -> None:
        if self._movers.of_vm(name) is not None or name in self._growing:
            raise Conflict(f"VM {name} is being moved or given memory: wait for it, and ask again")
        # A mover that begins meanwhile would not know of the new block.
        self._growing.add(name)
        try:
            await self._vms.grow(name, memory_bytes)
        finally:
            self._growing.discard(name)

    async def stop_vm(self, name: str, timeout_s: float) -> None:
        await self._vms.stop(name, timeout_s)

    async def kill_vm(self, name: str) -> None:
        await self._vms.kill(name)

    async def delete_vm(self, name: str) -> None:
        if self._movers.of_vm(name) is not None:
            raise Conflict(f"VM {name} is being moved")
        await self._vms.delete(name)

    async def end_disowned(self, names: Sequence[str]) -> list[str]:
        """End VMs that run here and belong to another host; those that it ended come back.

        Each is asked for at the register once more: what the controller answered may be old by now. A VM that
        is being moved is its mover's to end. Raises as the register does.
        """
        ended = []
        for name in names:
            held = await self._link.ownership(name)
            # Nothing is awaited from here to the kill: to own it again, this host would need a mover first.
            # A register that is older than the VM is an old copy, which knows nothing of what came after it.
            lost = held.owner != self.config.name and held.epoch > self._vms.epoch(name)
            if lost and self._movers.of_vm(name) is None:
                await self._vms.kill(name)
                await self._vms.delete(name)
                ended.append(name)
        return ended

    def vm_epochs(self) -> dict[str, int]:
        """Under which epoch each VM runs here. Those that are being moved are left out: their movers know."""
        found = self._vms.epochs()
        return {name: epoch for name, epoch in found.items() if self._movers.of_vm(name) is None}

    def note_epochs(self, epochs: Mapping[str, int]) -> None:
        """Keep what the controller said of VMs that run here. Raises `VmmError`."""
        for name, epoch in epochs.items():
            if self._movers.of_vm(name) is None:
                self._vms.note_epoch(name, epoch)

    async def vm_states(self) -> Mapping[str, VmState]:
        return await self._vms.states()

    async def vm_log(self, name: str, serial: bool, lines: int) -> str:
        return self._vms.log(name, serial, lines)

    async def console(self, name: str, received: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        process = self._vms.process(name)
        if process is None:
            raise Conflict(f"VM {name} does not run on host {self.config.name}: it has no console")
        process.close()
        async for chunk in self._consoles.join(self._vms.paths(name).serial_socket, received):
            yield chunk

    async def screendump(self, name: str) -> bytes:
        monitor = await self._vms.monitor(name)
        return await monitor.screendump()

    # --- migrations ------------------------------------------------------------------------------

    async def prepare(self, order: PrepareOrder) -> Prepared:
        await self._until_settled()
        process = self._vms.process(order.spec.name)
        if process is not None:
            process.close()
            raise Conflict(f"a VM {order.spec.name} runs already on host {self.config.name}")
        return await self._movers.start_destination(
            MoverJob(
                role=Role.DESTINATION,
                migration=order.migration,
                spec=order.spec,
                ram_blocks=order.ram_blocks,
                state_dir=self.config.state_dir,
            )
        )

    async def begin(self, order: BeginOrder) -> None:
        vm = order.migration.vm
        process = self._vms.process(vm)
        if process is None:
            raise Conflict(f"VM {vm} does not run on host {self.config.name}")
        process.close()
        if vm in self._growing:
            raise Conflict(f"VM {vm} is being given memory; move it afterwards")
        if self.strict.is_held(vm):
            raise Conflict(f"VM {vm} stands still until the register gives it to this host; try again")
        spec = self._vms.spec(vm)
        self._movers.start_source(
            MoverJob(
                role=Role.SOURCE,
                migration=order.migration,
                spec=spec,
                ram_blocks=order.ram_blocks,
                state_dir=self.config.state_dir,
                prepared=order.prepared,
                switchover_cost_s=self._cost.expected_s(spec),
            )
        )

    async def cancel(self, migration: str) -> CancelReply:
        return await self._movers.cancel(migration, Role.SOURCE)

    async def adjust(self, migration: str, adjustment: Adjustment) -> AdjustReply:
        return await self._movers.adjust(migration, adjustment)

    async def revive(self, migration: str) -> ReviveReply:
        return await self._movers.revive(migration)

    async def abandon(self, migration: str) -> None:
        try:
            await self._movers.cancel(migration, Role.DESTINATION)
        except NotFound:
            return

    def _learn(self, job: MoverJob, update: MigrationUpdate) -> None:
        if job.role is Role.SOURCE and update.report is not None:
            self._cost.learn(job.spec, update.report.downtime)

    # --- files -----------------------------------------------------------------------------------

    async def _until_settled(self) -> None:
        try:
            async with asyncio.timeout(SETTLE_LIMIT_S):
                await self._settled.wait()
        except TimeoutError:
            raise Conflict(
                f"host {self.config.name} starts nothing before it knows which of its VMs are still its own; "
                "try again"
            ) from None

    async def _disks_in_use(self, spec: VmSpec) -> list[str]:
        """Of disks that can be opened, those that somebody writes, or of which that cannot be told."""
        found = []
        for disk in spec.disks:
            if disk.read_only or await access_obstacle(disk.path, True, self.config.vm_user):
                continue
            try:
                written = await asyncio.to_thread(has_writer, disk.path)
            except OSError as error:
                found.append(f"whether somebody writes {disk.path} cannot be told: {error.strerror}")
                continue
            if written:
                found.append(f"{disk.path} is open for writing: a VM that uses it still runs somewhere")
        return found

    async def _disk_obstacles(self, spec: VmSpec) -> list[str]:
        user = self.config.vm_user
        found = [await access_obstacle(disk.path, not disk.read_only, user) for disk in spec.disks]
        return [obstacle for obstacle in found if obstacle]

    async def _file_obstacles(self, spec: VmSpec) -> list[str]:
        user = self.config.vm_user
        found = [await access_obstacle(path, False, user) for path in (spec.kernel, spec.initrd) if path]
        return [obstacle for obstacle in found if obstacle]
