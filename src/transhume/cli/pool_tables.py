"""The pool, rules and drains as tables and lines. Nothing here asks or decides."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transhume.cli.progress_line import bar
from transhume.cli.tables import bytes_in_words, clock, ms_in_words, plain_table
from transhume.farm.drain_record import Drain, DrainKind, DrainState, DrainStep, StepKind, StepState
from transhume.farm.overview import FarmView, HostShare
from transhume.farm.rulebook import RuleView
from transhume.model.host import HostState

_MIB = 1 << 20
_BAR_CELLS = 20

_STATE_STYLES = {
    StepState.MOVED: "green",
    StepState.FAILED: "red",
    StepState.BLOCKED: "red",
    StepState.LEFT: "yellow",
}


def farm_report(view: FarmView) -> Group:
    """The pool: its hosts, its sum, and whether one could be lost."""
    hosts = plain_table(
        "HOST", "STATE", "VCPUS", "MEMORY PROMISED", "LEFT", "ITS OWN", "VMS", "LABELS", "CAN BE LOST"
    )
    for host in view.hosts:
        hosts.add_row(
            host.name,
            state_in_words(host),
            f"{host.promised_cpus} of {int(host.cpus * host.cpu_overcommit)}",
            f"{_mib(host.promised_bytes)} of {_mib(host.memory_bytes)} MiB",
            f"{_mib(host.left_bytes)} MiB",
            f"{_mib(host.reserved_bytes)} MiB",
            f"{host.running} of {host.vms} run",
            ", ".join(host.labels) or "-",
            Text("yes", style="green") if not host.stranded else Text(_short(host.short_bytes), style="red"),
        )
    parts: list[RenderableType] = [hosts, Text("")]
    promised = f"{_mib(view.promised_bytes)} of {_mib(view.memory_bytes)} MiB promised"
    parts.append(
        Text(
            f"{view.cpus} CPUs with {view.promised_cpus} vCPUs promised; {promised}, "
            f"{_mib(view.left_bytes)} MiB left; {view.running} of {view.vms} VMs run"
        )
    )
    if view.can_lose_one:
        parts.append(Text("can lose 1 host: yes", style="green"))
    else:
        words = f"can lose 1 host: {_short(view.short_bytes)} for the VMs of {view.worst_host}"
        parts.append(Text(words, style="red"))
    parts += [Text(f"! {words}", style="yellow") for words in view.broken_rules]
    return Group(*parts)


def state_in_words(host: HostShare) -> Text:
    if host.fenced:
        return Text("fenced", style="red")
    if host.silent:
        return Text("unknown", style="red")
    return Text(host.state.value, style="green" if host.state is HostState.ACTIVE else "yellow")


def rules_table(rules: list[RuleView]) -> Table:
    found = plain_table("RULE", "KIND", "VMS", "HOSTS", "WARNINGS")
    for view in rules:
        rule = view.rule
        found.add_row(
            rule.name,
            rule.kind.value + (", if it can be" if rule.preferred else ""),
            _selected(rule.vms, view.vms),
            _selected(rule.hosts, view.hosts) or "-",
            Text("; ".join(view.warnings), style="yellow"),
        )
    return found


def plan_report(drain: Drain) -> Group:
    """What a drain would do, before anybody has said yes."""
    going = [step for step in drain.steps if not step.state.over]
    staying = [step for step in drain.steps if step.state in (StepState.BLOCKED, StepState.LEFT)]
    parts: list[RenderableType] = []
    if going:
        rows = plain_table("WAVE", "VM", "FROM", "TO", "HOW", "MEMORY", "TO SEND", "TIME")
        for step in going:
            live = step.kind is StepKind.LIVE
            rows.add_row(
                str(step.wave or "-"),
                step.vm,
                step.source,
                step.destination,
                ("on its way" if step.state is StepState.MOVING else "live") if live else "stopped",
                f"{_mib(step.memory_bytes)} MiB",
                bytes_in_words(step.wire_bytes) if live else "-",
                ms_in_words(step.seconds * 1000) if live else "-",
            )
        parts += [rows, Text("")]
    for step in staying:
        parts.append(Text(f"{step.vm} {step.state.value}: {step.reason}", style=_STATE_STYLES[step.state]))
    parts += [Text(note) for note in drain.notes]
    blocked = sum(step.state is StepState.BLOCKED for step in staying)
    words = f"{len(going)} VMs, {bytes_in_words(drain.wire_bytes)}, about {ms_in_words(drain.seconds * 1000)}"
    if blocked:
        words += f"; {blocked} cannot go"
    parts.append(Text(words if drain.steps else f"{drain.host} has no VMs: nothing has to move"))
    return Group(*parts)


def drain_report(drain: Drain) -> Group:
    """What has come of a drain."""
    rows = plain_table("VM", "STATE", "FROM", "TO", "SENT", "TIME", "MIGRATION", "WHY")
    for step in drain.steps:
        rows.add_row(
            step.vm,
            Text(step.state.value, style=_STATE_STYLES.get(step.state, "")),
            step.source,
            step.destination or "-",
            bytes_in_words(step.wire_bytes) if step.wire_bytes else "-",
            ms_in_words(step.seconds * 1000) if step.seconds else "-",
            step.migration or "-",
            Text(step.reason),
        )
    parts: list[RenderableType] = [rows, Text("")] if drain.steps else []
    parts.append(Text(headline(drain)))
    return Group(*parts)


def headline(drain: Drain) -> str:
    """One sentence about the whole."""
    counts = Counter(step.state.value for step in drain.steps)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no VMs"
    what = "drain of" if drain.kind is DrainKind.DRAIN else "way back to"
    begun = f"since {clock(drain.created_at_s)}"
    if drain.ended_at_s is not None:
        begun = f"in {ms_in_words((drain.ended_at_s - drain.created_at_s) * 1000)}"
    sentence = f"{what} {drain.host}: {drain.state.value} {begun}; {told}"
    if drain.kind is DrainKind.DRAIN and drain.state in (DrainState.DONE, DrainState.INCOMPLETE):
        sentence += f". {drain.host} gets no VMs until `transhume undrain {drain.host}`"
    return sentence


def drain_lines(drain: Drain, width: int) -> list[str]:
    """The whole and each VM under way, a line each, cut at `width`."""
    done = sum(step.state.over for step in drain.steps)
    share = fraction(drain)
    first = (
        f"{drain.host} {bar(share, _BAR_CELLS)} {share * 100:3.0f}%  {drain.state.value}  "
        f"{done} of {len(drain.steps)} VMs"
    )
    each = [
        f"  {step.vm} {bar(step.progress, _BAR_CELLS)} {step.progress * 100:3.0f}%  "
        f"{step.source} -> {step.destination}"
        for step in drain.moving
    ]
    return [line[: max(0, width)] for line in (first, *each)]


def fraction(drain: Drain) -> float:
    """How much is done, by memory; a VM that does not go counts as done."""
    whole = sum(step.memory_bytes for step in drain.steps)
    if not whole:
        return 1.0 if drain.state.over else 0.0
    done = sum(step.memory_bytes * (1.0 if step.state.over else step.progress) for step in drain.steps)
    return done / whole


def step_in_words(step: DrainStep) -> str:
    """What has just become of a VM."""
    match step.state:
        case StepState.MOVING:
            return f"{step.vm}: moving from {step.source} to {step.destination} (migration {step.migration})"
        case StepState.MOVED:
            took = f" in {ms_in_words(step.seconds * 1000)}" if step.seconds else ""
            return f"{step.vm}: moved to {step.destination}{took}"
        case StepState.WAITING:
            return f"{step.vm}: waiting{f', after {step.reason}' if step.reason else ''}"
        case _:
            return f"{step.vm}: {step.state.value}: {step.reason}"


def _selected(selectors: tuple[str, ...], meant: tuple[str, ...]) -> str:
    if any(selector.startswith("@") for selector in selectors):
        return f"{', '.join(selectors)} ({', '.join(meant) or 'nobody'})"
    return ", ".join(selectors)


def _short(short_bytes: int) -> str:
    return f"no, short of {short_bytes / (1 << 30):.1f} GiB"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes // _MIB:,}"
