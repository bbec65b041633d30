"""What a migration would meet: the reasons against it, and a prediction from a sample of the running VM."""

from __future__ import annotations

from transhume.farm.members import Members
from transhume.farm.prediction import dirty_rate_bytes_s, effective_rate_bytes_s, experience, predict
from transhume.farm.preflight import queued_already
from transhume.farm.records import FarmRecords
from transhume.farm.survey import Entrance, survey
from transhume.model.errors import TranshumeError
from transhume.model.migration import DryRun, MigrationOptions
from transhume.model.vm import Vm


async def dry_run(
    members: Members,
    records: FarmRecords,
    vm: Vm,
    to: str | None,
    options: MigrationOptions,
    sample_s: float,
    entrance: Entrance,
) -> DryRun:
    """Survey and predict; `to` None chooses the destination. Changes nothing, and takes `sample_s` at least.

    Raises as `survey`. A VM whose writes cannot be sampled is told without a prediction.
    """
    found = await survey(members, vm, to, options, entrance)
    waiting = (queued_already(vm.spec.name, vm.queued),) if vm.queued else ()
    answer = DryRun(
        vm=vm.spec.name,
        source=found.source.name,
        destination=found.destination.name if found.destination else "",
        reasons=(*waiting, *found.reasons),
    )
    try:
        sample = await members.link(found.source.name).sample_dirty_rate(vm.spec.name, sample_s)
    except TranshumeError as error:
        return answer.model_copy(update={"verdict": f"no prediction: {error.message}"})
    past = [kept.record for kept in await records.migrations()]
    known = experience(past, answer.source, answer.destination)
    prediction = predict(sample, known, options, found.facts.spec.memory_bytes)
    return answer.model_copy(
        update={
            "wire_bytes": prediction.wire_bytes,
            "total_ms": prediction.total_ms,
            "downtime_ms": prediction.downtime_ms,
            "dirty_rate_bytes_s": dirty_rate_bytes_s(sample),
            "link_rate_bytes_s": effective_rate_bytes_s(known, options),
            "sample_ms": sample.sample_ms,
            "verdict": prediction.verdict,
        }
    )
