"""Looking before a VM moves: the facts of both ends, the reasons against, and which host to choose."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from transhume.farm.admission import Admission
from transhume.farm.members import HostStatus, Members
from transhume.farm.pool import Demand
from transhume.farm.preflight import destination_reasons, source_reasons
from transhume.farm.shared_storage import folder_reasons
from transhume.model.errors import HostLost, NotFound, PreflightFailed
from transhume.model.migration import MigrationOptions
from transhume.model.orders import DestinationFacts, SourceFacts
from transhume.model.vm import Vm


@dataclass(frozen=True)
class Survey:
    """What was found. `destination` is None when none was named and no host would do."""

    vm: Vm
    source: HostStatus
    facts: SourceFacts
    destination: HostStatus | None
    reasons: tuple[str, ...]

    def demand_clear(self) -> HostStatus:
        """The destination. Raises `PreflightFailed` with all reasons if there are any."""
        if self.reasons or self.destination is None:
            where = f" to {self.destination.name}" if self.destination else ""
            raise PreflightFailed(
                f"VM {self.vm.spec.name} cannot move{where}; it runs on {self.source.name} as before",
                self.reasons,
            )
        return self.destination


@dataclass(frozen=True)
class Entrance:
    """Who lets the VM in at its destination: the pool and the rules, which hold a share for it there.

    `leaving` are VMs that leave the same source: where those are now does not matter.
    """

    admission: Admission
    leaving: frozenset[str] = frozenset()
    hold: bool = True


async def survey(
    members: Members,
    vm: Vm,
    to: str | None,
    options: MigrationOptions,
    entrance: Entrance,
) -> Survey:
    """Ask the source and the possible destinations, all at once; then the pool and the rules.

    Raises `NotFound` for a host that is none and `HostLost` when the source does not answer. Without `to`,
    the best host of those without a reason against them is chosen.
    """
    source = members.host(vm.ownership.owner)
    if to is not None:
        candidates = [members.host(to)]
    else:
        candidates = [host for host in await members.hosts() if host.name != source.name]
    facts, found = await asyncio.gather(
        _source_facts(members, vm),
        asyncio.gather(*(_destination_facts(members, vm, source, host) for host in candidates)),
    )
    general = source_reasons(vm, source, facts, options)
    against = [
        destination_reasons(vm, source, facts, host, answer, options)
        for host, answer in zip(candidates, found, strict=True)
    ]
    if options.safe_dir is not None:
        unshared, by_host = await folder_reasons(
            options.safe_dir,
            facts.spec.memory_bytes,
            (source.name, members.link(source.name)),
            [(host.name, members.link(host.name)) for host in candidates],
        )
        general += unshared
        against = [(*reasons, *more) for reasons, more in zip(against, by_host, strict=True)]
    best, against = await _chosen(vm, source, candidates, found, against, options, entrance)
    if to is not None:
        return Survey(vm, source, facts, candidates[0], (*general, *against[0]))
    if best is not None:
        return Survey(vm, source, facts, best, general)
    if not candidates:
        alone = f"host {source.name} is the farm's only one; `transhume join` adds another"
        return Survey(vm, source, facts, None, (*general, alone))
    named = [
        f"to {host.name}: {reason}"
        for host, reasons in zip(candidates, against, strict=True)
        for reason in reasons
    ]
    return Survey(vm, source, facts, None, (*general, *named))


async def _chosen(
    vm: Vm,
    source: HostStatus,
    candidates: list[HostStatus],
    found: list[DestinationFacts | None],
    against: list[tuple[str, ...]],
    options: MigrationOptions,
    entrance: Entrance,
) -> tuple[HostStatus | None, list[tuple[str, ...]]]:
    """The best of those without a reason against them, and the reasons with those of pool and rules added."""
    available = {
        host.name: 0 if answer is None else answer.memory_available_bytes
        for host, answer in zip(candidates, found, strict=True)
        if host.name != source.name
    }
    judged = await entrance.admission.judge(
        Demand.of(vm.spec),
        available,
        source.name,
        frozenset(host.name for host, reasons in zip(candidates, against, strict=True) if reasons),
        entrance.leaving,
        options.ignore_rules,
        entrance.hold,
    )
    merged = [
        (*reasons, *judged.against.get(host.name, ()))
        for host, reasons in zip(candidates, against, strict=True)
    ]
    return next((host for host in candidates if host.name == judged.chosen), None), merged


async def _source_facts(members: Members, vm: Vm) -> SourceFacts:
    name, owner = vm.spec.name, vm.ownership.owner
    try:
        return await members.link(owner).source_facts(name)
    except HostLost as error:
        raise HostLost(
            f"host {owner}, which owns VM {name}, does not answer ({error.message}); "
            f"where the VM runs is unknown until {owner} does"
        ) from error
    except NotFound:
        # The owner has never started it: not running, which the pre-flight says in its own words.
        return SourceFacts(state=vm.state, spec=vm.spec)


async def _destination_facts(
    members: Members, vm: Vm, source: HostStatus, host: HostStatus
) -> DestinationFacts | None:
    if host.name == source.name:
        return None
    try:
        return await members.link(host.name).destination_facts(vm.spec)
    except HostLost:
        return None
