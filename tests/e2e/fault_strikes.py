"""The faults of the matrix: how each strikes, and where the VM must run afterwards, moment by moment."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.damaging_proxy import Damage, damage_between
from tests.e2e.farm import Farm, until
from tests.e2e.fault_moments import (
    CONTROLLER,
    DESTINATION,
    SOURCE,
    Moment,
    cut_direction,
    cut_wire,
    folder_of,
    restore_wire,
    silence_limit_s,
)
from tests.e2e.memory_group import let_wait_for_memory, limit_file, memory_group, release

from transhume.migration.driver.job import Role

SHORT_S = 1.0
SILENT_REGISTER_S = 2.5
"""Longer than the source waits for its answer before it suspends the VM."""

LONG_FACTOR = 1.5
"""How much longer than the silence limit a long fault lasts."""

SLOW_LINK_BITS_S = 1_000_000
NO_MEMORY_BYTES = 64 << 10
NO_MEMORY_S = 3.0


@dataclass
class Scene:
    """One migration that is about to be struck. `stack` ends with it."""

    farm: Farm
    moment: Moment
    stack: AsyncExitStack
    migration: str = ""
    damage: list[Damage] = field(default_factory=list)

    @property
    def long_s(self) -> float:
        """Longer than the ends bear to hear nothing of each other."""
        return LONG_FACTOR * silence_limit_s(self.moment)

    def mover_pid(self, role: Role) -> int:
        return int(folder_of(self.farm, self.migration, role).pid_file.read_text())


Strike = Callable[[Scene], Awaitable[None]]


async def _kill_source_mover(scene: Scene) -> None:
    os.kill(scene.mover_pid(Role.SOURCE), signal.SIGKILL)


async def _kill_destination_mover(scene: Scene) -> None:
    os.kill(scene.mover_pid(Role.DESTINATION), signal.SIGKILL)


def _kill_daemon(host: str) -> Strike:
    async def strike(scene: Scene) -> None:
        scene.farm.kill_daemon(host)
        await scene.farm.daemon_gone(host)
        await scene.farm.start_daemon(host)

    return strike


def _kill_qemu(host: str) -> Strike:
    async def strike(scene: Scene) -> None:
        os.kill(scene.farm.qemu_pid("vm", host), signal.SIGKILL)

    return strike


async def _silence_register(scene: Scene) -> None:
    scene.farm.kill_daemon(CONTROLLER, signal.SIGSTOP)
    await asyncio.sleep(SILENT_REGISTER_S)
    scene.farm.kill_daemon(CONTROLLER, signal.SIGCONT)


async def _cut_shortly(scene: Scene) -> None:
    cut_wire(scene.farm)
    await asyncio.sleep(SHORT_S)
    restore_wire(scene.farm)


async def _cut_long(scene: Scene) -> None:
    cut_wire(scene.farm)
    await asyncio.sleep(scene.long_s)
    restore_wire(scene.farm)


async def _cut_off_destination(scene: Scene) -> None:
    """From the source and from the controller."""
    cut_wire(scene.farm)
    cut_direction(scene.farm, DESTINATION, CONTROLLER)
    cut_direction(scene.farm, CONTROLLER, DESTINATION)
    await asyncio.sleep(scene.long_s)
    scene.farm.lab.restore()


async def _half_open(scene: Scene) -> None:
    """The source's bytes arrive, and nothing comes back."""
    cut_direction(scene.farm, DESTINATION, SOURCE)
    await asyncio.sleep(scene.long_s)
    restore_wire(scene.farm)


async def _stop_destination_mover(scene: Scene) -> None:
    """The connection stands, and nobody is behind it."""
    mover = os.pidfd_open(scene.mover_pid(Role.DESTINATION))
    try:
        signal.pidfd_send_signal(mover, signal.SIGSTOP)
        await asyncio.sleep(scene.long_s)
        signal.pidfd_send_signal(mover, signal.SIGCONT)
    finally:
        os.close(mover)


async def _slow_link(scene: Scene) -> None:
    scene.farm.lab.shape(rate_bits_s=SLOW_LINK_BITS_S)
    await asyncio.sleep(scene.long_s)
    scene.farm.lab.shape()


async def _set_relay_up(scene: Scene) -> None:
    lab = scene.farm.lab
    scene.damage.append(scene.stack.enter_context(damage_between(lab[SOURCE], lab[DESTINATION])))


async def _damage_pages(scene: Scene) -> None:
    await asyncio.wait_for(scene.damage[0].strike("pages"), 30)


async def _damage_words(scene: Scene) -> None:
    await asyncio.wait_for(scene.damage[0].strike("words"), 30)


async def _take_memory(scene: Scene) -> None:
    """No page more for the destination's mover and QEMU: the kernel ends whichever it chooses."""
    await _limit_memory(scene, ends_processes=True)


async def _refuse_memory(scene: Scene) -> None:
    """As `_take_memory`, but nobody is ended: who needs memory is refused it, or waits."""
    await _limit_memory(scene, ends_processes=False)


async def _limit_memory(scene: Scene, ends_processes: bool) -> None:
    group = scene.stack.enter_context(memory_group(f"transhume-matrix-{os.getpid()}"))
    scene.stack.push_async_callback(_set_free, group)
    if not ends_processes:
        let_wait_for_memory(group)
    for pid in (scene.mover_pid(Role.DESTINATION), scene.farm.qemu_pid("vm", DESTINATION)):
        (group / "cgroup.procs").write_text(str(pid))
    limit_file(group).write_text(str(NO_MEMORY_BYTES))
    await asyncio.sleep(NO_MEMORY_S)
    limit_file(group).write_text(str(1 << 40))


async def _set_free(group: Path) -> None:
    release(group)

    async def empty() -> bool:
        return not (group / "cgroup.procs").read_text()

    await until(empty, f"{group} is empty")


HERE, THERE, LOST = "source", "destination", "nowhere"
EITHER = f"{HERE} or {THERE}"
LOST_OR_THERE = f"{THERE} or {LOST}"
LOST_OR_HERE = f"{HERE} or {LOST}"


@dataclass(frozen=True)
class Fault:
    """One row of the matrix. `wanted` says for each moment where the VM may run afterwards.

    A moment that is not in `wanted` has nothing for the fault to strike. `set_up` comes before the migration.
    """

    strike: Strike
    wanted: dict[Moment, str]
    set_up: Strike | None = None


def _wanted(*places: str | None) -> dict[Moment, str]:
    return {moment: place for moment, place in zip(Moment, places, strict=True) if place is not None}


def _same(place: str) -> dict[Moment, str]:
    return dict.fromkeys(Moment, place)


_BEFORE_THE_STATE = (HERE, HERE, HERE)
_UNDECIDED = (EITHER, EITHER)
_AFTER = (THERE, THERE)

FAULTS: dict[str, Fault] = {
    "source's mover killed": Fault(_kill_source_mover, _wanted(*_BEFORE_THE_STATE, *_UNDECIDED, *_AFTER)),
    "destination's mover killed": Fault(
        _kill_destination_mover, _wanted(*_BEFORE_THE_STATE, HERE, EITHER, *_AFTER)
    ),
    "source's daemon killed": Fault(_kill_daemon(SOURCE), _same(THERE)),
    "destination's daemon killed": Fault(_kill_daemon(DESTINATION), _same(THERE)),
    "controller killed": Fault(_kill_daemon(CONTROLLER), _same(THERE)),
    "register silent": Fault(_silence_register, _same(THERE)),
    "source's QEMU killed": Fault(
        _kill_qemu(SOURCE), _wanted(LOST, LOST, LOST, LOST_OR_THERE, LOST_OR_THERE, *_AFTER)
    ),
    "destination's QEMU killed": Fault(
        _kill_qemu(DESTINATION), _wanted(*_BEFORE_THE_STATE, HERE, LOST_OR_HERE, LOST, LOST)
    ),
    "link cut, shortly": Fault(_cut_shortly, _wanted(EITHER, EITHER, EITHER, *_UNDECIDED, *_AFTER)),
    "link cut, longer than the silence limit": Fault(
        _cut_long, _wanted(*_BEFORE_THE_STATE, *_UNDECIDED, *_AFTER)
    ),
    "destination cut off, longer than the silence limit": Fault(
        _cut_off_destination, _wanted(None, HERE, HERE, *_UNDECIDED, *_AFTER)
    ),
    "half-open link: nothing comes back": Fault(_half_open, _wanted(None, HERE, HERE, *_UNDECIDED, *_AFTER)),
    "half-open link: nobody behind it": Fault(
        _stop_destination_mover, _wanted(None, HERE, HERE, *_UNDECIDED, *_AFTER)
    ),
    "link of 1 Mbit/s": Fault(_slow_link, _wanted(None, EITHER, EITHER, *_UNDECIDED, *_AFTER)),
    "frame of pages damaged": Fault(
        _damage_pages, _wanted(None, HERE, None, None, None, None, THERE), _set_relay_up
    ),
    "frame of words damaged": Fault(
        _damage_words, _wanted(None, HERE, HERE, *_UNDECIDED, *_AFTER), _set_relay_up
    ),
    "destination's memory gone, killed for it": Fault(
        _take_memory, _wanted(None, HERE, EITHER, EITHER, EITHER, LOST_OR_THERE, LOST_OR_THERE)
    ),
    "destination's memory gone for a while": Fault(
        _refuse_memory, _wanted(None, HERE, EITHER, EITHER, EITHER, THERE, THERE)
    ),
}
