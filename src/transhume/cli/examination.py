"""The doctor from the command line: before `up` and `join`, and by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from transhume.api.client import FarmClient
from transhume.api.http_connection import TlsMaker
from transhume.host.doctor import clock
from transhume.host.doctor.subject import Subject
from transhume.model.errors import HostLost, NotFound, Refused, TranshumeError, Unauthorized
from transhume.model.finding import Finding, Level, error, note
from transhume.model.host import HostInventory
from transhume.trust.credentials import joining, unproven
from transhume.trust.names import CONTROLLER_NAME
from transhume.trust.token import Token

_STYLES = {Level.OK: "green", Level.NOTE: "", Level.WARNING: "yellow", Level.ERROR: "bold red"}


@dataclass(frozen=True)
class Candidate:
    """A server that would join as `name`. Without a token the farm tells nothing."""

    name: str
    token: Token | None


def examine_alone(subject: Subject) -> list[Finding]:
    """Everything about this server; nothing is asked of a farm."""
    return asyncio.run(_examine(replace(subject, controller=None), None))


def examine_towards(subject: Subject, candidate: Candidate) -> list[Finding]:
    """As `examine_alone`, and the way to the controller, its clock, and what joining would change."""
    return asyncio.run(_examine(subject, candidate))


def demand_fit(findings: Sequence[Finding], despite: bool, what: str) -> None:
    """Show the warnings on stderr, and raise `Refused` for errors, unless `despite`: then show them too."""
    errors = [finding for finding in findings if finding.level is Level.ERROR]
    if errors and not despite:
        raise Refused(
            f"this server is not fit to {what}: {'; '.join(in_words(finding) for finding in errors)}; "
            "mend that, or go on with --despite-findings"
        )
    for finding in findings:
        if finding.level in (Level.WARNING, Level.ERROR):
            typer.echo(f"{finding.level.value}: {in_words(finding)}", err=True)


def in_words(finding: Finding) -> str:
    """A finding with its mend, in one line."""
    return f"{finding.words} (mend: {finding.mend})" if finding.mend else finding.words


def findings_table(findings: Sequence[Finding]) -> Table:
    """Each finding; below those that are not well, the mend."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "CHECK"):
        table.add_column(heading, no_wrap=True)
    table.add_column("FINDING", overflow="fold")
    for finding in findings:
        words = Text(finding.words)
        if finding.mend:
            words.append(f"\nmend: {finding.mend}", style="dim")
        table.add_row(Text(finding.level.value, style=_STYLES[finding.level]), finding.check, words)
    return table


async def _examine(subject: Subject, candidate: Candidate | None) -> list[Finding]:
    # Loaded here: what it needs would slow every other command down.
    from transhume.host.doctor.examine import examine

    with Console(stderr=True).status("examining this server", spinner="line") as status:

        def progress(part: str) -> None:
            status.update(f"examining this server: {part}")

        examined = await examine(subject, progress)
        if candidate is None or subject.controller is None:
            return [*examined.findings, *clock.judge(clock.ClockFacts(clock.synchronized()))]
        progress("the farm")
        try:
            tls = await _tls_to(subject.controller, candidate.token)
        except HostLost as failure:
            return [*examined.findings, _not_asked(failure)]
        async with FarmClient(subject.controller, tls) as farm:
            return [*examined.findings, *await _ask(farm, candidate, examined.inventory)]


async def _tls_to(controller: tuple[str, int], token: Token | None) -> TlsMaker:
    """The token proves who the controller is. Without one it is believed, as far as the time goes."""
    if token is None:
        return unproven
    # Loaded here: `transhume doctor` without a farm needs nothing of it.
    from transhume.api.joining import authority_of

    authority_pem = await authority_of(controller, token)
    return lambda: joining(authority_pem, CONTROLLER_NAME)


async def _ask(farm: FarmClient, candidate: Candidate, inventory: HostInventory | None) -> list[Finding]:
    """What the controller knows better: the time, and the other hosts."""
    asked_at_s = time.time()
    try:
        told_s = await farm.clock_s()
    except (Unauthorized, NotFound):
        # A release that has no such route takes the path for one that needs a secret.
        unknown = clock.judge(clock.ClockFacts(clock.synchronized()))
        return [*unknown, note("farm", "the controller is of an older release and tells nothing of the farm")]
    except TranshumeError as failure:
        return [_not_asked(failure)]
    apart_s, error_s = clock.offset(asked_at_s, time.time(), told_s)
    findings = clock.judge(clock.ClockFacts(clock.synchronized(), apart_s, error_s))
    if candidate.token is not None and inventory is not None:
        findings += await farm.preview_join(candidate.token.secret, candidate.name, inventory)
    return findings


def _not_asked(failure: TranshumeError) -> Finding:
    mend = "look at its daemon (`transhume status` there)"
    return error("farm", f"the controller was not asked: {failure.message}", mend)
