"""What a host that carries the controller, and does not lead, knows of the farm: from the store, again and
again.
"""

from __future__ import annotations

from transhume.farm.records import FarmRecords, HostRecord, encode
from transhume.host.config import HostConfig
from transhume.model.errors import Conflict

Target = tuple[str, int]


class Roll:
    """The members as they were at the last `refresh`."""

    def __init__(self, records: FarmRecords, own: HostConfig) -> None:
        self._records = records
        self._own = own
        self._hosts: dict[str, HostRecord] = {}

    async def refresh(self) -> None:
        """Read the members. Raises `StoreError`; what was known stays."""
        self._hosts = {kept.record.name: kept.record for kept in await self._records.hosts()}

    def admits(self, name: str, serial: str) -> bool:
        """Whether the certificate with this serial is one that host `name` may show."""
        known = self._hosts.get(name)
        return known is not None and any(each.serial == serial for each in known.certificates)

    def address(self, name: str) -> Target | None:
        """Where a member answers."""
        known = self._hosts.get(name)
        return None if known is None else (known.address, known.port)

    def other_controllers(self) -> tuple[Target, ...]:
        """Where the other hosts that carry a controller answer, in order of their names."""
        found = [host for name, host in sorted(self._hosts.items()) if name != self._own.name]
        return tuple((host.address, host.port) for host in found if host.controller)

    async def enrol(self) -> None:
        """Have it in the store that this host, a member already, carries a controller.

        It may: whoever reads the store holds the key of the farm's authority. Raises `StoreError`.
        """
        while True:
            kept = await self._records.host(self._own.name)
            if kept is None or kept.record.controller:
                return
            record = kept.record.model_copy(update={"controller": True})
            puts = {kept.key: encode(record)}
            if await self._records.store.transact(compares=[kept.unchanged], puts=puts) is not None:
                return


async def demand_own_or_empty(records: FarmRecords, own: HostConfig) -> None:
    """Raise `Conflict` when the store has a farm that host `own` is no member of. Raises `StoreError`."""
    hosts = await records.hosts()
    if hosts and all(kept.record.name != own.name for kept in hosts):
        names = ", ".join(kept.record.name for kept in hosts[:5])
        raise Conflict(
            f"the store holds a farm already ({names}), and host {own.name} is not in it: let "
            f"`transhume token` on {hosts[0].record.name} print the command with which it joins"
        )
