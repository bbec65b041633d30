"""What must hold after every step, and what must be true at the end."""

from __future__ import annotations

from collections.abc import Callable

from transhume.sim.plan import Side
from transhume.sim.register import SimRegister
from transhume.sim.vm import SimVm, VmStatus


class Violation(Exception):
    """Something happened that must never happen."""


class Invariants:
    """Watches the VMs and the register; both tell of each change at the moment when it is made.

    - at most one VM runs, and only where the register says;
    - the register is given to the destination only while the source is paused, and for good;
    - a destination that runs had all RAM and the whole device state, as the source last had them;
    - nothing is destroyed where the VM belongs, unless its QEMU had died;
    - a VM whose QEMU never died is never lost;
    - a page that was left for after the resume is placed once, and who needs it before never reads zeros;
    - the source keeps its RAM as long as a destination that has not given up lacks a page of it.
    """

    def __init__(self, vms: dict[Side, SimVm], register: SimRegister) -> None:
        self._vms = vms
        self._register = register
        for vm in vms.values():
            vm.on_change = self._vm_changed
            vm.on_memory = self._memory_changed
        self.gave_up: Callable[[], bool] = lambda: False
        self.source_has_ram: Callable[[], bool] = lambda: True
        register.on_change = self._owner_changed

    def _vm_changed(self, vm: SimVm, before: VmStatus) -> None:
        owner = self._register.owner
        if vm.status is VmStatus.RUNNING:
            if owner is not vm.side:
                raise Violation(f"the VM runs at the {vm.side} and belongs to the {owner}")
            if all(each.status is VmStatus.RUNNING for each in self._vms.values()):
                raise Violation("the VM runs at both ends")
            if vm.side is Side.DESTINATION:
                self._demand_whole(vm)
                self._memory_changed(vm, None)
        elif vm.status is VmStatus.GONE and owner is vm.side and before is not VmStatus.DEAD:
            raise Violation(f"the VM was destroyed at the {vm.side}, to which it belongs")
        elif vm.status is VmStatus.GONE and owner is not vm.side:
            self._demand_nothing_lacks(self._vms[owner])

    def _demand_nothing_lacks(self, taken: SimVm) -> None:
        if taken.lives and taken.missing and self.source_has_ram() and not self.gave_up():
            raise Violation(f"the source freed its RAM, of which the {taken.side} lacks {len(taken.missing)}")

    def _memory_changed(self, vm: SimVm, page: int | None) -> None:
        if page is not None and page not in vm.missing:
            raise Violation(f"page {page} was placed where the guest may have written it")
        if page is None and vm.status is VmStatus.RUNNING and vm.missing and not vm.guarded:
            raise Violation(f"the VM reads zeros in place of pages {sorted(vm.missing)}")

    def _owner_changed(self) -> None:
        if self._register.owner is Side.SOURCE:
            return
        if self._vms[Side.SOURCE].status is VmStatus.RUNNING:
            raise Violation("the destination took the VM over while it ran at the source")
        taken = self._vms[Side.DESTINATION]
        if taken.status in (VmStatus.ABSENT, VmStatus.GONE):
            raise Violation(f"the destination took the VM over and has none: it is {taken.status}")
        if taken.status is not VmStatus.DEAD:
            self._demand_whole(taken)

    def _demand_whole(self, taken: SimVm) -> None:
        wanted = self._vms[Side.SOURCE].content
        if taken.ram_content != wanted:
            raise Violation(f"the destination has RAM {taken.ram_content} where the source had {wanted}")
        if taken.state_content != wanted:
            raise Violation(f"the destination has state {taken.state_content} where the source had {wanted}")

    def at_the_end(self, cleaning_failed: bool) -> None:
        """Both ends have finished: one VM runs, where it belongs, and the other end has nothing left."""
        owner = self._vms[self._register.owner]
        (loser,) = (vm for vm in self._vms.values() if vm is not owner)
        if owner.status is not VmStatus.RUNNING and not owner.was_killed:
            raise Violation(f"the VM is lost: {owner.status} at the {owner.side}, to which it belongs")
        lost_pages = owner.status is VmStatus.RUNNING and owner.missing
        if lost_pages and not self.gave_up():
            raise Violation(f"the VM lacks pages {sorted(owner.missing)} for ever, and nobody says so")
        if loser.status not in (VmStatus.ABSENT, VmStatus.GONE) and not cleaning_failed:
            raise Violation(f"the VM is left over at the {loser.side}: {loser.status}")

    def last_word(self, side: Side, runs_at: str) -> None:
        """Where one end's last report says that the VM runs must be true at the end.

        It cannot know of a QEMU that dies after that, nor what became of the VM at the other end.
        """
        owner = self._vms[self._register.owner]
        if runs_at.startswith("nowhere: "):
            if owner.status is VmStatus.RUNNING or owner.side is not side:
                raise Violation(f"the {side} says {runs_at!r}, and {owner.status} at the {owner.side}")
        elif runs_at != f"{owner.side} host {owner.side}":
            raise Violation(
                f"the {side} says that the VM runs at {runs_at!r}; it belongs to the {owner.side}"
            )
        elif owner.side is side and owner.death_was_noticed:
            raise Violation(f"the {side} says {runs_at!r} and knew that its QEMU had died")
