"""What must hold after every step, and what must be true at the end."""

from __future__ import annotations

from collections.abc import Callable

from transhume.model.errors import MemoryDiffers, PagesLost
from transhume.model.migration import NOWHERE, Outcome
from transhume.sim.controller import Record, Update
from transhume.sim.plan import Side
from transhume.sim.register import SimRegister
from transhume.sim.safe_copy import SimSafeCopy
from transhume.sim.vm import SimVm, VmStatus


class Violation(Exception):
    """Something happened that must never happen."""


class Invariants:
    """Watches the VMs, the register and the safe copy; they tell of each change when it is made.

    - at most one VM runs, and only where the register says;
    - the register is given to the destination only while the source is paused, and only back from one that
      lacks pages, to a source that still has the VM as it was suspended;
    - a destination that runs had all RAM and the whole device state, as the source last had them;
    - nothing is destroyed where the VM belongs, unless its QEMU had died;
    - a VM whose QEMU never died is never lost;
    - a page that was left for after the resume is placed once, and who needs it before never reads zeros;
    - the source keeps its RAM, and the safe copy its pages, as long as a destination that has not given up
      lacks some of it, or has yet to compare it;
    - pages that are lost, or differ, are told in the farm's record, which also says where the VM runs.

    The first has one exception, which `lied` stands for: a person has taken the VM back from a host of which
    was promised that it is dead, and which was only cut off. Then the VM may run there as well, from the
    revival until that host has reached the register again; from then on the source's alone.
    """

    def __init__(self, vms: dict[Side, SimVm], register: SimRegister, copy: SimSafeCopy) -> None:
        self._vms = vms
        self._register = register
        self._copy = copy
        self._first_epoch = register.epoch
        for vm in vms.values():
            vm.on_change = self._vm_changed
            vm.on_memory = self._memory_changed
        self.gave_up: Callable[[], bool] = lambda: False
        self.source_has_ram: Callable[[], bool] = lambda: True
        self.lied: Callable[[], bool] = lambda: False
        register.on_change = self._owner_changed
        copy.on_removal = self._copy_removed

    @property
    def revived(self) -> bool:
        """Whether the VM was taken back from its destination."""
        return self._register.epoch > self._first_epoch + 1

    def _vm_changed(self, vm: SimVm, before: VmStatus) -> None:
        owner = self._register.owner
        if vm.status is VmStatus.RUNNING:
            self._demand_one_runner(vm)
            if vm.side is Side.DESTINATION and owner is vm.side:
                self._demand_whole(vm)
                self._memory_changed(vm, None)
        elif vm.status is VmStatus.GONE and owner is vm.side and before is not VmStatus.DEAD:
            raise Violation(f"the VM was destroyed at the {vm.side}, to which it belongs")
        elif vm.status is VmStatus.GONE and owner is not vm.side:
            self._demand_nothing_needs(self._vms[owner])

    def _demand_one_runner(self, vm: SimVm) -> None:
        if self.revived and self.lied():
            return
        owner = self._register.owner
        if owner is not vm.side:
            raise Violation(f"the VM runs at the {vm.side} and belongs to the {owner}")
        if all(each.status is VmStatus.RUNNING for each in self._vms.values()):
            raise Violation("the VM runs at both ends")

    def demand_one_runner_again(self) -> None:
        """Who was cut off, and has lied about nobody, can be heard again for long enough."""
        there = self._vms[Side.DESTINATION]
        if self._register.owner is Side.SOURCE and there.status is VmStatus.RUNNING:
            raise Violation("the VM was taken back, and its destination, which knows, still runs it")

    def _demand_nothing_needs(self, taken: SimVm) -> None:
        if not taken.lives or not self.source_has_ram() or self.gave_up():
            return
        if taken.missing:
            raise Violation(f"the source freed its RAM, of which the {taken.side} lacks {len(taken.missing)}")
        if taken.uncompared:
            raise Violation(f"the source freed its RAM, which the {taken.side} has still to compare")

    def _copy_removed(self) -> None:
        taken = self._vms[Side.DESTINATION]
        if self._register.owner is taken.side and taken.lives and taken.missing and not self.gave_up():
            raise Violation(f"the safe copy was removed while the {taken.side} lacked {len(taken.missing)}")

    def _memory_changed(self, vm: SimVm, page: int | None) -> None:
        if page is not None and page not in vm.missing:
            raise Violation(f"page {page} was placed where the guest may have written it")
        if page is None and vm.status is VmStatus.RUNNING and vm.missing and not vm.guarded:
            raise Violation(f"the VM reads zeros in place of pages {sorted(vm.missing)}")

    def _owner_changed(self) -> None:
        if self.revived:
            self._demand_a_reason_to_go_back()
        if self._register.owner is Side.SOURCE:
            return
        if self._vms[Side.SOURCE].status is VmStatus.RUNNING:
            raise Violation("the destination took the VM over while it ran at the source")
        taken = self._vms[Side.DESTINATION]
        if taken.status in (VmStatus.ABSENT, VmStatus.GONE):
            raise Violation(f"the destination took the VM over and has none: it is {taken.status}")
        if taken.status is not VmStatus.DEAD:
            self._demand_whole(taken)

    def _demand_a_reason_to_go_back(self) -> None:
        here, there = self._vms[Side.SOURCE], self._vms[Side.DESTINATION]
        if here.status is VmStatus.GONE:
            raise Violation("the source took back a VM that it had freed")
        if there.lives and not self.lied():
            raise Violation("the source took back a VM that lives at its destination")

    def _demand_whole(self, taken: SimVm) -> None:
        wanted = self._vms[Side.SOURCE].content
        if taken.ram_content != wanted:
            raise Violation(f"the destination has RAM {taken.ram_content} where the source had {wanted}")
        if taken.state_content != wanted:
            raise Violation(f"the destination has state {taken.state_content} where the source had {wanted}")

    # --- at the end ------------------------------------------------------------------------------

    def at_the_end(self, excused: frozenset[Side] = frozenset()) -> None:
        """Both ends have finished: one VM runs, where it belongs, and the other end has nothing left.

        `excused` are ends that could not clean up: a command was refused, or the host is gone for ever.
        """
        owner = self._vms[self._register.owner]
        (loser,) = (vm for vm in self._vms.values() if vm is not owner)
        if owner.status is not VmStatus.RUNNING and not owner.was_killed:
            raise Violation(f"the VM is lost: {owner.status} at the {owner.side}, to which it belongs")
        lost_pages = owner.status is VmStatus.RUNNING and owner.missing
        if lost_pages and not self.gave_up():
            raise Violation(f"the VM lacks pages {sorted(owner.missing)} for ever, and nobody says so")
        clean = {VmStatus.ABSENT, VmStatus.GONE}
        if self.revived:
            clean.add(VmStatus.DEAD)  # nobody told that host; a few files stay, and nothing runs
        if loser.status not in clean and loser.side not in excused:
            raise Violation(f"the VM is left over at the {loser.side}: {loser.status}")

    def last_word(self, side: Side, word: Update) -> None:
        """Where one end's last report says that the VM runs must be true at the end.

        It cannot know of a QEMU that dies after that, nor what became of the VM at the other end.
        """
        runs_at = word.runs_at
        if side is Side.DESTINATION and self.revived:
            return  # what was said before the revival was true then
        owner = self._vms[self._register.owner]
        if runs_at.startswith(f"{NOWHERE}: "):
            if owner.status is VmStatus.RUNNING or owner.side is not side:
                raise Violation(f"the {side} says {runs_at!r}, and {owner.status} at the {owner.side}")
        elif runs_at != f"{owner.side} host {owner.side}":
            raise Violation(
                f"the {side} says that the VM runs at {runs_at!r}; it belongs to the {owner.side}"
            )
        elif owner.side is side and owner.death_was_noticed:
            raise Violation(f"the {side} says {runs_at!r} and knew that its QEMU had died")

    def record(self, record: Record, words: dict[Side, Update | None]) -> None:
        """What people read at the end: how it came out, where the VM runs, and what is wrong with it."""
        owner = self._vms[self._register.owner]
        there = self._vms[Side.DESTINATION]
        if not record.ended:
            raise Violation("the record does not end")
        if record.outcome is Outcome.COMPLETED and owner is not there:
            raise Violation(f"the record says completed, and the VM belongs to the {owner.side}")
        if record.outcome is not Outcome.FAILED and owner is there and there.lives and there.missing:
            raise Violation("the VM lacks pages for ever, and the record does not say so")
        if record.error_code == PagesLost.code and owner is there and there.lives and not there.missing:
            raise Violation("the record says that pages are lost, and the VM has them all")
        if record.outcome is Outcome.COMPLETED and self._copy.there and not self._copy.removal_failed:
            raise Violation("the safe copy is left over")
        said = words[Side.DESTINATION]
        differs = said is not None and said.error_code == MemoryDiffers.code
        if differs and not self.revived and record.error_code != MemoryDiffers.code:
            raise Violation(f"the memory differs, and the record says {record.error_code!r}")
        if record.runs_at.startswith(f"{NOWHERE}: "):
            if owner.status is VmStatus.RUNNING:
                raise Violation(f"the record says {record.runs_at!r}, and the VM runs at the {owner.side}")
        elif record.runs_at.startswith(("source", "destination")) and not record.runs_at.startswith(
            f"{owner.side} host {owner.side}"
        ):
            raise Violation(f"the record says {record.runs_at!r}; the VM belongs to the {owner.side}")
