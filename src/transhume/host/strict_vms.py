"""Stops the strict VMs of a host that has lost the register, and lets them go on.

Which are strict the controller says with each heartbeat; that, and which were stopped for it, is kept in a
file, because the daemon may be restarted while it is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from transhume.host.controller_link import ControllerLink
from transhume.host.lease import Holding, decide
from transhume.host.vms import LocalVms
from transhume.model.errors import NotFound, TranshumeError
from transhume.model.host import LEASE_S
from transhume.model.vm import VmState

log = logging.getLogger(__name__)


class _Remembered(BaseModel):
    model_config = ConfigDict(frozen=True)

    strict: tuple[str, ...] = ()
    held: tuple[str, ...] = ()


class StrictVms:
    """The strict VMs of this host. `moving` says whether a mover works on a VM; `clock_s` never goes back."""

    def __init__(
        self,
        name: str,
        file: Path,
        vms: LocalVms,
        link: ControllerLink,
        moving: Callable[[str], bool],
        clock_s: Callable[[], float],
        lease_s: float = LEASE_S,
    ) -> None:
        self._name = name
        self._file = file
        self._vms = vms
        self._link = link
        self._moving = moving
        self._clock_s = clock_s
        self._lease_s = lease_s
        # A daemon that has only just come up has a whole lease to reach the controller.
        self._answered_s = clock_s()
        self._lock = asyncio.Lock()
        self._known = self._read()

    @property
    def lease_is_over(self) -> bool:
        return self._clock_s() - self._answered_s > self._lease_s

    def is_held(self, vm: str) -> bool:
        return vm in self._known.held

    async def answered(self, asked_at_s: float, strict: Sequence[str]) -> None:
        """The controller has answered what was sent at `asked_at_s`, and what is not this host's was ended.

        Lets go what stands still, each after the register was asked for it. Raises as the register does.
        """
        async with self._lock:
            self._answered_s = max(self._answered_s, asked_at_s)
            self._remember(tuple(strict), self._known.held)
            for vm in sorted(decide(self._clock_s(), await self._holding(), self._lease_s).let_go):
                await self._let_go(vm)

    async def look(self) -> None:
        """Stop what must not run any more. Called every second."""
        async with self._lock:
            if not self.lease_is_over or not self._known.strict:
                return
            for vm in sorted(decide(self._clock_s(), await self._holding(), self._lease_s).hold):
                # Written first: whoever finds it standing still later knows who stopped it.
                self._remember(self._known.strict, (*self._known.held, vm))
                try:
                    await (await self._vms.monitor(vm)).stop()
                except TranshumeError as error:
                    self._forget(vm)
                    log.warning("VM %s could not be paused: %s", vm, error.message)
                else:
                    log.warning("VM %s is paused: the register has not answered for %g s", vm, self._lease_s)

    async def _let_go(self, vm: str) -> None:
        try:
            owner = (await self._link.ownership(vm)).owner
        except NotFound:
            owner = ""
        state = await self._vms.state(vm)
        if state is VmState.STOPPED:
            self._forget(vm)
        elif owner == self._name and state is VmState.PAUSED:
            await (await self._vms.monitor(vm)).cont()
            log.info("VM %s goes on: the register answers again", vm)
            self._forget(vm)
        elif owner == self._name and state is VmState.RUNNING:
            self._forget(vm)
        # One that is another's stays as it is, and is ended at the next heartbeat.

    async def _holding(self) -> Holding:
        states = {vm: await self._vms.state(vm) for vm in {*self._known.strict, *self._known.held}}
        return Holding(
            answered_s=self._answered_s,
            strict=frozenset(self._known.strict),
            running=frozenset(vm for vm, state in states.items() if state is VmState.RUNNING),
            # One that somebody let go on by hand meanwhile is not held any more.
            held=frozenset(vm for vm in self._known.held if states[vm] is not VmState.RUNNING),
            moving=frozenset(vm for vm in states if self._moving(vm)),
        )

    def _forget(self, vm: str) -> None:
        self._remember(self._known.strict, tuple(held for held in self._known.held if held != vm))

    def _remember(self, strict: tuple[str, ...], held: tuple[str, ...]) -> None:
        known = _Remembered(strict=strict, held=held)
        if known == self._known:
            return
        self._known = known
        draft = self._file.with_suffix(".new")
        try:
            draft.write_text(known.model_dump_json())
            os.replace(draft, self._file)
        except OSError as error:
            # It holds as long as this daemon runs.
            log.warning("%s cannot be written: %s", self._file, error.strerror)

    def _read(self) -> _Remembered:
        try:
            return _Remembered.model_validate_json(self._file.read_text())
        except (OSError, ValidationError):
            return _Remembered()
