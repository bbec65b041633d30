"""What a change of the farm's records means to whoever follows the farm. Pure: no clock and no store.

Only what differs is told, so the little that each kind of record is compared by is remembered here.
Migrations are told by `farm.watcher`, because not each of their phases is written.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import JsonValue, ValidationError

from transhume.farm.drain_record import Drain, StepState
from transhume.farm.feed import Kind, News
from transhume.farm.records import FarmSettings, HostRecord, VmRecord
from transhume.farm.rules import Rule
from transhume.model.vm import Ownership

_MIB = 1 << 20


class RecordNews:
    """Takes the records as they are written, and says what is new in each."""

    def __init__(self) -> None:
        self._vms: dict[str, dict[str, JsonValue]] = {}
        self._owners: dict[str, str] = {}
        self._hosts: dict[str, dict[str, JsonValue]] = {}
        self._drains: dict[str, Drain] = {}
        self._rules: set[str] = set()
        self._kinds: dict[str, Callable[[str, bytes | None], list[News]]] = {
            "vms": self._vm,
            "ownership": self._ownership,
            "hosts": self._host,
            "drains": self._drain,
            "rules": self._rule,
            "settings": self._settings,
        }

    def owner(self, vm: str) -> str:
        """Whom the register names; empty for a VM that is none."""
        return self._owners.get(vm, "")

    def written(self, key: str, value: bytes | None) -> list[News]:
        """What is new by this record, which was written (None: deleted). Nothing for records of other kinds,
        nor for one that cannot be read: whoever needs it will say so.
        """
        kind, _, name = key.partition("/")
        change = self._kinds.get(kind)
        if change is None:
            return []
        try:
            return change(name, value)
        except ValidationError:
            return []

    def _vm(self, name: str, value: bytes | None) -> list[News]:
        known = self._vms.get(name)
        if value is None:
            self._vms.pop(name, None)
            return [News(kind=Kind.VM_DELETED, vm=name, text=f"VM {name} was deleted")] if known else []
        record = VmRecord.model_validate_json(value)
        facts: dict[str, JsonValue] = {
            "labels": list(record.labels),
            "reserve": record.reserve,
            "memory_bytes": record.spec.memory_bytes,
        }
        self._vms[name] = facts
        if known is None:
            text = f"VM {name} was created: {record.spec.memory_bytes // _MIB} MiB, {record.spec.cpus} CPUs"
            return [News(kind=Kind.VM_CREATED, vm=name, text=text, data=facts)]
        changed = _changed(known, facts)
        if not changed:
            return []
        return [_news_of(Kind.VM_CHANGED, f"VM {name}", changed, vm=name)]

    def _ownership(self, vm: str, value: bytes | None) -> list[News]:
        if value is None:
            self._owners.pop(vm, None)
            return []
        new, old = Ownership.model_validate_json(value), self._owners.get(vm)
        self._owners[vm] = new.owner
        if old is None or old == new.owner:
            return []
        text = f"VM {vm} belongs to {new.owner} and no longer to {old} (epoch {new.epoch})"
        data: dict[str, JsonValue] = {"source": old, "destination": new.owner, "epoch": new.epoch}
        return [News(kind=Kind.VM_MOVED, vm=vm, host=new.owner, text=text, data=data)]

    def _host(self, name: str, value: bytes | None) -> list[News]:
        known = self._hosts.get(name)
        if value is None:
            self._hosts.pop(name, None)
            if known is None:
                return []
            return [News(kind=Kind.HOST_REMOVED, host=name, text=f"host {name} was taken out of the farm")]
        record = HostRecord.model_validate_json(value)
        facts: dict[str, JsonValue] = {
            "state": record.state.value,
            "address": record.address,
            "labels": list(record.labels),
            "reserve_memory_bytes": record.reserve_memory_bytes,
            "cpu_overcommit": record.cpu_overcommit,
        }
        self._hosts[name] = facts
        if known is None:
            text = f"host {name} joined at {record.address}:{record.port}"
            return [News(kind=Kind.HOST_JOINED, host=name, text=text, data=facts)]
        changed = _changed(known, facts)
        if not changed:
            return []
        return [_news_of(Kind.HOST_CHANGED, f"host {name}", changed, host=name)]

    def _drain(self, host: str, value: bytes | None) -> list[News]:
        if value is None:
            self._drains.pop(host, None)
            return []
        drain, known = Drain.model_validate_json(value), self._drains.get(host)
        self._drains[host] = drain
        if known is None or known.created_at_s != drain.created_at_s:
            text = f"the {drain.kind} of {host} has begun: {len(drain.waiting)} VMs to go"
            begun: dict[str, JsonValue] = {"kind": drain.kind.value, "vms": [step.vm for step in drain.steps]}
            return [News(kind=Kind.DRAIN_BEGUN, host=host, text=text, data=begun)]
        news = _steps(known, drain)
        if known.state is not drain.state:
            data: dict[str, JsonValue] = {
                "kind": drain.kind.value,
                "state": drain.state.value,
                **_counts(drain),
            }
            text = f"the {drain.kind} of {host} is {drain.state}"
            news.append(News(kind=Kind.DRAIN_STATE, host=host, text=text, data=data))
        return news

    def _rule(self, name: str, value: bytes | None) -> list[News]:
        if value is None:
            known = name in self._rules
            self._rules.discard(name)
            text = f"rule {name} was removed"
            return [News(kind=Kind.RULE_REMOVED, text=text, data={"rule": name})] if known else []
        rule = Rule.model_validate_json(value)
        self._rules.add(name)
        data: dict[str, JsonValue] = {"rule": rule.model_dump(mode="json")}
        return [News(kind=Kind.RULE_ADDED, text=f"rule {name} was added", data=data)]

    def _settings(self, name: str, value: bytes | None) -> list[News]:
        if value is None:
            return []
        settings = FarmSettings.model_validate_json(value).model_dump(mode="json")
        return [News(kind=Kind.FARM_CHANGED, text="the farm's settings were changed", data=settings)]


def _steps(before: Drain, after: Drain) -> list[News]:
    """A line for each VM of a drain that is further than it was."""
    known = {step.vm: step for step in before.steps}
    news = []
    for step in after.steps:
        old = known.get(step.vm)
        if old is not None and (old.state, old.migration) == (step.state, step.migration):
            continue
        words = [f"{after.kind} of {after.host}: VM {step.vm} is {step.state}"]
        if step.destination and step.state in (StepState.MOVING, StepState.MOVED):
            words.append(f"to {step.destination}")
        if step.reason:
            words.append(f"({step.reason})")
        data: dict[str, JsonValue] = {
            "state": step.state.value,
            "destination": step.destination,
            "reason": step.reason,
            **_counts(after),
        }
        news.append(
            News(
                kind=Kind.DRAIN_STEP,
                vm=step.vm,
                host=after.host,
                migration=step.migration,
                text=" ".join(words),
                data=data,
            )
        )
    return news


def _counts(drain: Drain) -> dict[str, JsonValue]:
    return {"vms_over": sum(step.state.over for step in drain.steps), "vms_total": len(drain.steps)}


def _changed(before: dict[str, JsonValue], after: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {name: value for name, value in after.items() if before[name] != value}


def _news_of(kind: Kind, what: str, changed: dict[str, JsonValue], vm: str = "", host: str = "") -> News:
    words = ", ".join(f"{name} is {_word(value)}" for name, value in changed.items())
    return News(kind=kind, vm=vm, host=host, text=f"{what} was changed: {words}", data=changed)


def _word(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(str(each) for each in value) or "none"
    return "as the farm has it" if value is None else str(value)
