"""The farm as one pool: what each host has, and what of it is promised to VMs.

Pure. A promise is a VM's RAM with what QEMU needs beside it, and its vCPUs. Running VMs and those about to
start are promised theirs; stopped ones only if they were made with a reservation. A VM on the move is
promised its share on both hosts. Memory is never promised twice; vCPUs are, up to a factor for each host.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, KeysView
from dataclasses import dataclass, replace

from transhume.model.host import HostState
from transhume.model.vm import Accel, VmSpec

VMM_OVERHEAD_BYTES = 192 << 20
"""What QEMU itself needs beside the guest's RAM: its heap, ROMs, the display's memory."""

DEFAULT_CPU_OVERCOMMIT = 4.0
"""vCPUs promised for each CPU of a host, unless the farm or the host is set otherwise."""

MOST_DEFAULT_RESERVE_BYTES = 512 << 20
"""What a host keeps for itself unless it is set otherwise; a small one keeps an eighth."""


def default_reserve_bytes(memory_bytes: int) -> int:
    """What a host of that size keeps for its own system."""
    return min(MOST_DEFAULT_RESERVE_BYTES, memory_bytes // 8)


@dataclass(frozen=True)
class Demand:
    """What a VM asks of a host. `memory_bytes` holds QEMU's own part too."""

    vm: str
    memory_bytes: int
    cpus: int
    machine_type: str = ""
    kvm: bool = False

    @classmethod
    def of(cls, spec: VmSpec) -> Demand:
        return cls(
            vm=spec.name,
            memory_bytes=spec.memory_bytes + VMM_OVERHEAD_BYTES,
            cpus=spec.cpus,
            machine_type=spec.machine_type,
            kvm=spec.accel is Accel.KVM,
        )

    def at_rest(self) -> Demand:
        """What the VM asks while it is stopped: no room, for it finds some when it is started."""
        return replace(self, memory_bytes=0, cpus=0)


@dataclass(frozen=True)
class HostRoom:
    """What a host has. `memory_bytes` is all of it, `reserved_bytes` what it keeps for itself."""

    name: str
    cpus: int
    memory_bytes: int
    reserved_bytes: int = 0
    cpu_overcommit: float = DEFAULT_CPU_OVERCOMMIT
    state: HostState = HostState.ACTIVE
    fenced: bool = False
    silent: bool = False
    machine_types: frozenset[str] | None = None
    kvm_obstacle: str = ""

    @property
    def usable_bytes(self) -> int:
        return max(0, self.memory_bytes - self.reserved_bytes)

    @property
    def usable_cpus(self) -> int:
        return int(self.cpus * self.cpu_overcommit)


class Pool:
    """Hosts and promises, to try placements on. A promise may exceed what is left: who places looks first.

    Everything goes by names in a fixed order, so that the same pool gives the same answers.
    """

    def __init__(self, hosts: Iterable[HostRoom]) -> None:
        self.hosts = {host.name: host for host in sorted(hosts, key=lambda host: host.name)}
        self._promises: dict[str, dict[str, Demand]] = {name: {} for name in self.hosts}
        self._places: dict[str, set[str]] = {}
        self._left_bytes = {name: host.usable_bytes for name, host in self.hosts.items()}
        self._left_cpus = {name: host.usable_cpus for name, host in self.hosts.items()}
        self._by_room = sorted((-left, name) for name, left in self._left_bytes.items())

    def promise(self, demand: Demand, host: str) -> None:
        """Promise the VM its share of `host`; once, however often it is said. A host unknown is ignored: it
        left the farm.
        """
        held = self._promises.get(host)
        if held is None or demand.vm in held:
            return
        held[demand.vm] = demand
        self._places.setdefault(demand.vm, set()).add(host)
        self._change(host, -demand.memory_bytes, -demand.cpus)

    def release(self, vm: str, host: str) -> Demand | None:
        """Take a promise back. None: there was none."""
        demand = self._promises.get(host, {}).pop(vm, None)
        if demand is None:
            return None
        self._places[vm].discard(host)
        self._change(host, demand.memory_bytes, demand.cpus)
        return demand

    def left_bytes(self, host: str) -> int:
        """Memory that can still be promised; negative when more was promised than there is now."""
        return self._left_bytes[host]

    def left_cpus(self, host: str) -> int:
        return self._left_cpus[host]

    def promised(self, host: str) -> list[Demand]:
        """What is promised on a host, by the VM's name."""
        return [demand for _, demand in sorted(self._promises.get(host, {}).items())]

    def promised_bytes(self, host: str) -> int:
        return self.hosts[host].usable_bytes - self._left_bytes[host]

    def promised_cpus(self, host: str) -> int:
        return self.hosts[host].usable_cpus - self._left_cpus[host]

    def places(self, vm: str) -> frozenset[str]:
        """The hosts on which the VM is promised a share: two while it moves."""
        return frozenset(self._places.get(vm, ()))

    def has(self, vm: str, host: str) -> bool:
        return vm in self._promises.get(host, {})

    def vms(self, host: str) -> KeysView[str]:
        """The names of the VMs that are promised a share of a host."""
        return self._promises[host].keys()

    def roomiest_first(self) -> Iterator[str]:
        """Host names, those with most memory left first; equal ones by name."""
        return (name for _, name in tuple(self._by_room))

    def tightest_first(self, memory_bytes: int) -> Iterator[str]:
        """Host names with at least so much left, those with least first."""
        end = bisect_left(self._by_room, (-memory_bytes + 1, ""))
        return (name for _, name in reversed(self._by_room[:end]))

    def _change(self, host: str, memory_bytes: int, cpus: int) -> None:
        before = self._left_bytes[host]
        del self._by_room[bisect_left(self._by_room, (-before, host))]
        self._left_bytes[host] = before + memory_bytes
        self._left_cpus[host] += cpus
        insort(self._by_room, (-self._left_bytes[host], host))
