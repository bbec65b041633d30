"""Room for a VM that is new or about to start: the host that the pool and the rules choose, and that
agrees.
"""

from __future__ import annotations

from transhume.farm.admission import Admission
from transhume.farm.members import Members
from transhume.farm.placement import Choice
from transhume.farm.pool import Demand
from transhume.farm.rehome import Rehoming
from transhume.model.errors import HostLost, PreflightFailed, Refused, TranshumeError
from transhume.model.vm import Ownership, VmSpec


class Lodging:
    """Finds hosts for VMs, holds their shares there, and asks each host itself before it is taken."""

    def __init__(self, members: Members, admission: Admission, rehoming: Rehoming) -> None:
        self._members = members
        self._admission = admission
        self.rehoming = rehoming

    async def for_new(
        self, spec: VmSpec, host: str | None, labels: tuple[str, ...], reserve: bool
    ) -> tuple[str, VmSpec]:
        """The owner of a new VM, and the VM with what that host filled in. Raises as `Vms.create`."""
        if host is not None:
            link = self._members.link(host)
            if reserve:
                await self.demand_room(spec, host, labels)
            elif reasons := await self._admission.against_making(Demand.of(spec), host, labels):
                raise PreflightFailed(f"VM {spec.name} cannot be made on {host}", reasons)
            try:
                return host, await link.resolve_spec(spec)
            except TranshumeError:
                self._admission.let_go(spec.name, host)
                raise
        excluded: dict[str, str] = {}
        while True:
            demand = Demand.of(spec)
            choice = await self._admission.place(demand, excluded=excluded, labels=labels)
            if not choice.host:
                raise _no_host(f"VM {spec.name} cannot be made: no host will do", choice)
            try:
                return choice.host, await self._members.link(choice.host).resolve_spec(spec)
            except HostLost:
                excluded[choice.host] = "does not answer"
            except Refused as error:
                excluded[choice.host] = error.message
            self._admission.let_go(spec.name, choice.host)

    async def for_start(self, spec: VmSpec, held: Ownership, ignore_rules: bool) -> Ownership:
        """Who starts a stopped VM: its owner if it will do, else another host, to which it is given.

        Its share is held there. Raises `PreflightFailed` when no host will do, with the reasons of each; the
        owner is the old one then.
        """
        demand = Demand.of(spec)
        at_home = await self._admission.place(demand, [held.owner], ignore_rules=ignore_rules)
        if at_home.host:
            return held
        excluded: dict[str, str] = {}
        others = [name for name in self._members.names() if name != held.owner]
        while True:
            choice = await self._admission.place(demand, others, excluded, ignore_rules=ignore_rules)
            if not choice.host:
                against = {**at_home.against, **choice.against}
                raise _no_host(f"VM {spec.name} cannot start", Choice("", against))
            try:
                return await self.rehoming.rehome(spec.name, choice.host)
            except (HostLost, PreflightFailed) as error:
                reasons = error.reasons if isinstance(error, PreflightFailed) else (error.message,)
                excluded[choice.host] = "; ".join(reasons)
                self._admission.let_go(spec.name, choice.host)

    async def demand_more(self, demand: Demand, host: str) -> None:
        """Hold a larger share for a VM that `host` has already. Raises `PreflightFailed` as `demand_room`."""
        choice = await self._admission.place(demand, [host], leaving={demand.vm: host}, ignore_rules=True)
        if not choice.host:
            raise _no_host(f"host {host} has no room for so large a VM {demand.vm}", choice)

    async def demand_room(self, spec: VmSpec, host: str, labels: tuple[str, ...] = ()) -> None:
        """Hold a share on `host`. Raises `PreflightFailed` with the numbers when it has none left."""
        choice = await self._admission.place(Demand.of(spec), [host], labels=labels)
        if not choice.host:
            raise _no_host(f"host {host} has no room to reserve for VM {spec.name}", choice)


def _no_host(message: str, choice: Choice) -> PreflightFailed:
    return PreflightFailed(message, choice.reasons or ("the farm has no other host",))
