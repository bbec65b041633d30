"""What must be known before a drain is planned: which VMs are to go, and what keeps each where."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from transhume.farm.admission import Admission, Situation
from transhume.farm.drain_plan import Leaver, expected_sample, plan_steps, total_seconds
from transhume.farm.drain_record import Drain, DrainKind, DrainOptions, DrainStep, StepKind, StepState
from transhume.farm.members import HostStatus, Members
from transhume.farm.pool import Demand
from transhume.farm.prediction import Experience, experience
from transhume.farm.preflight import destination_reasons, source_reasons
from transhume.farm.records import FarmRecords
from transhume.model.errors import HostLost, NotFound
from transhume.model.migration import Migration, MigrationOptions, Outcome, Phase
from transhume.model.orders import DestinationFacts, SourceFacts
from transhume.model.vm import Vm, VmState

MOST_QUESTIONS = 8
"""So many questions are asked of hosts at once."""


class DrainSurvey:
    """Plans drains and restorations. Changes nothing; raises `StoreError`."""

    def __init__(self, records: FarmRecords, members: Members, admission: Admission) -> None:
        self._records = records
        self._members = members
        self._admission = admission
        self._questions = asyncio.Semaphore(MOST_QUESTIONS)

    async def plan(
        self, host: str, kind: DrainKind, vms: Mapping[str, str], options: DrainOptions, now_s: float
    ) -> Drain:
        """How the VMs would go, `vms` naming the host that each is on: off `host`, or back to it."""
        past = [kept.record for kept in await self._records.migrations()]
        under_way = {each.vm: each for each in past if each.outcome is Outcome.RUNNING}
        found = await self._admission.situation()
        leavers, facts = await self._leavers(vms, found, past, under_way, options.migration)
        hosts = frozenset(found.pool.hosts)
        candidates = frozenset({host}) if kind is DrainKind.RESTORE else hosts - {host}
        asked: set[tuple[str, str]] = set()

        def known(source: str, destination: str) -> Experience:
            return experience(past, source, destination)

        while True:
            situation = await self._admission.situation()
            pool = situation.pool
            steps = plan_steps(leavers.values(), pool, situation.rules, candidates, options, known)
            new = [
                step
                for step in steps
                if step.state is StepState.WAITING and (step.vm, step.destination) not in asked
            ]
            if not new:
                break
            asked |= {(step.vm, step.destination) for step in new}
            told = await asyncio.gather(
                *(self._against(step, found, facts, options.migration) for step in new)
            )
            for step, reasons in zip(new, told, strict=True):
                if reasons:
                    excluded = {**leavers[step.vm].excluded, step.destination: "; ".join(reasons)}
                    leavers[step.vm] = replace(leavers[step.vm], excluded=excluded)
        return Drain(
            host=host,
            kind=kind,
            options=options,
            steps=steps,
            notes=self._notes(host, kind),
            wire_bytes=sum(step.wire_bytes for step in steps if not step.state.over),
            seconds=total_seconds(steps),
            created_at_s=now_s,
        )

    async def _leavers(
        self,
        vms: Mapping[str, str],
        found: Situation,
        past: list[Migration],
        under_way: Mapping[str, Migration],
        options: MigrationOptions,
    ) -> tuple[dict[str, Leaver], dict[str, SourceFacts]]:
        names = [vm for vm in sorted(vms) if vm in found.vms]
        answers = await asyncio.gather(*(self._facts(vm, vms[vm], found, under_way) for vm in names))
        leavers, facts = {}, {}
        for vm, answer in zip(names, answers, strict=True):
            record = found.vms[vm]
            moving = under_way.get(vm)
            stopped = found.states[vm] is VmState.STOPPED
            leaver = Leaver(
                demand=Demand.of(record.spec),
                source=vms[vm],
                kind=StepKind.REHOME if stopped else StepKind.LIVE,
                sample=expected_sample(past, vm, record.spec.memory_bytes),
            )
            if moving is not None and moving.phase is not Phase.QUEUED:
                leaver = replace(
                    leaver, kind=StepKind.LIVE, migration=moving.id, destination=moving.destination
                )
            elif isinstance(answer, HostLost):
                leaver = replace(leaver, blockers=(answer.message,))
            elif answer is not None and not stopped:
                source = self._members.host(vms[vm])
                leaver = replace(leaver, blockers=source_reasons(_view(vm, found), source, answer, options))
            if isinstance(answer, SourceFacts):
                facts[vm] = answer
            leavers[vm] = leaver
        return leavers, facts

    async def _facts(
        self, vm: str, host: str, found: Situation, under_way: Mapping[str, Migration]
    ) -> SourceFacts | HostLost | None:
        """What the source says of a VM; None where it need not be asked."""
        if found.states[vm] is VmState.STOPPED or vm in under_way:
            return None
        async with self._questions:
            try:
                return await self._members.link(host).source_facts(vm)
            except NotFound:
                return SourceFacts(state=found.states[vm], spec=found.vms[vm].spec)
            except HostLost as error:
                return error

    async def _against(
        self,
        step: DrainStep,
        found: Situation,
        facts: Mapping[str, SourceFacts],
        options: MigrationOptions,
    ) -> tuple[str, ...]:
        """What the destination itself has against it."""
        spec = found.vms[step.vm].spec
        answer: DestinationFacts | None = None
        async with self._questions:
            try:
                answer = await self._members.link(step.destination).destination_facts(spec)
            except HostLost:
                answer = None
        destination = self._members.host(step.destination)
        if step.kind is StepKind.REHOME:
            if answer is None:
                return (f"host {step.destination} does not answer",)
            return (*answer.disk_obstacles, *answer.file_obstacles)
        source: HostStatus = self._members.host(step.source)
        view = _view(step.vm, found)
        return destination_reasons(view, source, facts[step.vm], destination, answer, options)

    def _notes(self, host: str, kind: DrainKind) -> tuple[str, ...]:
        if kind is DrainKind.DRAIN and self._members.record(host).controller:
            return (f"{host} carries the controller: its VMs go, its daemon and the controller stay",)
        return ()


def _view(vm: str, found: Situation) -> Vm:
    record = found.vms[vm]
    return Vm(spec=record.spec, ownership=found.owners[vm], state=found.states[vm])
