"""A drain on the command line: the plan, the yes, the progress, the exit codes."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import typer
from tests.api.daemons import Daemons, two_daemons
from tests.cli.command import finish, start, transhume

from transhume.cli.drain_commands import confirm
from transhume.cli.drain_follow import LiveView
from transhume.cli.pool_tables import drain_lines, fraction
from transhume.cli.session import Session
from transhume.farm.drain_record import Drain, DrainState, DrainStep, StepState
from transhume.model.errors import Refused
from transhume.model.migration import Migration, MigrationReport, Outcome, Phase
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import Ownership, VmState

Capsys = pytest.CaptureFixture[str]


async def complete(d: Daemons, migration: Migration) -> None:
    hosts = {"alpha": d.alpha, "beta": d.beta}
    source, destination = hosts[migration.source], hosts[migration.destination]
    await d.controller.swap_ownership(
        migration.vm,
        Ownership(owner=migration.source, epoch=migration.epoch),
        Ownership(owner=migration.destination, epoch=migration.epoch + 1),
    )
    destination.specs[migration.vm] = source.specs.pop(migration.vm)
    destination.states[migration.vm] = source.states.pop(migration.vm)
    update = MigrationUpdate(
        migration=migration.id,
        host=migration.source,
        phase=Phase.DONE,
        outcome=Outcome.COMPLETED,
        report=MigrationReport(wire_bytes=1000, total_ms=20.0),
    )
    await d.controller.report(update)


async def fail(d: Daemons, migration: Migration) -> None:
    update = MigrationUpdate(
        migration=migration.id,
        host=migration.source,
        phase=Phase.ABORTED,
        outcome=Outcome.FAILED,
        error="the link broke",
        error_code="host-lost",
    )
    await d.controller.report(update)


@asynccontextmanager
async def movers(d: Daemons, broken: str = "", held: bool = False) -> AsyncIterator[None]:
    """Play every mover: each migration completes, but for those of one VM."""

    async def play() -> None:
        while True:
            for each in d.controller.migrations.under_way():
                begun = d.alpha.begun | d.beta.begun
                if each.id in begun and each.phase is not Phase.REQUESTED and not held:
                    await (fail if each.vm == broken else complete)(d, each)
            await asyncio.sleep(0.02)

    playing = asyncio.create_task(play())
    try:
        yield
        assert not playing.done()
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


async def test_a_plan_then_the_drain_then_the_way_back() -> None:
    async with two_daemons() as d:
        beta = d.beta_config.state_dir
        for name in ("web", "db", "old"):
            await d.running_vm(name, "alpha")
        await d.controller.vms.kill("old")
        plan = await transhume(beta, "drain", "alpha", "plan")
        assert plan.code == 0
        assert [line.split()[:4] for line in plan.out.splitlines()[1:4]] == [
            ["-", "old", "alpha", "beta"],
            ["1", "db", "alpha", "beta"],
            ["1", "web", "alpha", "beta"],
        ]
        assert "alpha carries the controller" in plan.out
        assert "3 VMs, 537 MB, about 4." in plan.out
        unsaid = await transhume(beta, "drain", "alpha")
        assert unsaid.code == 2
        assert "nothing was changed" in unsaid.err
        assert (await transhume(beta, "drain", "alpha", "show")).code == 2
        async with movers(d):
            done = await transhume(beta, "drain", "alpha", "--yes")
        assert done.code == 0, done
        assert "web: moved to beta in 20.0 ms" in done.out
        assert done.out.splitlines()[-1].startswith("drain of alpha: done in ")
        assert done.out.splitlines()[-1].endswith("alpha gets no VMs until `transhume undrain alpha`")
        hosts = await transhume(beta, "hosts")
        assert "maintenance" in hosts.out.splitlines()[1]
        shown = await transhume(beta, "drain", "alpha", "show", "--json")
        assert {step["state"] for step in shown.json["steps"]} == {"moved"}
        async with movers(d):
            back = await transhume(beta, "undrain", "alpha", "--restore", "--json")
        assert back.code == 0
        assert back.json_lines[-1]["type"] == "report"
        assert back.json_lines[-1]["drain"]["kind"] == "restore"
        assert {vm.ownership.owner for vm in await d.controller.vms.list()} == {"alpha"}
        assert (await transhume(beta, "undrain", "alpha")).code == 2


async def test_exit_codes_of_a_drain_that_leaves_something() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        for name in ("web", "db"):
            await d.running_vm(name, "alpha")
        async with movers(d, broken="db"):
            done = await transhume(alpha, "drain", "alpha", "--yes", "--parallel", "1", "--json")
        assert done.code == 3
        steps = {step["vm"]: step for step in done.json_lines[-1]["drain"]["steps"]}
        assert (steps["web"]["state"], steps["db"]["state"]) == ("moved", "failed")
        assert "the link broke" in steps["db"]["reason"]
        last = await transhume(alpha, "drain", "beta", "--yes")
        assert last.code == 2
        assert "is the last one that may have VMs (alpha is maintenance)" in last.err
        assert (await transhume(alpha, "undrain", "alpha")).out == "host alpha takes VMs again\n"
        d.alpha.source_changes = {"device_obstacles": ("it has a VFIO device",)}
        plan = await transhume(alpha, "drain", "alpha", "plan", "--json")
        assert plan.code == 2
        assert plan.json["drain"]["steps"][0]["reason"] == "it has a VFIO device"
        for words in (("--now",), ("--parallel", "0"), ("--deadline", "soon")):
            assert (await transhume(alpha, "drain", "alpha", *words)).code == 2


async def test_pause_resume_and_cancel_from_elsewhere() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        for name in ("a", "b"):
            await d.running_vm(name, "alpha")
        begun = await transhume(alpha, "drain", "alpha", "--yes", "--parallel", "1", "--detach")
        assert begun.code == 0
        assert "transhume drain alpha show" in begun.out
        paused = await transhume(alpha, "drain", "alpha", "pause", "--json")
        assert paused.json["state"] == "paused"
        assert (await transhume(alpha, "drain", "alpha", "pause")).code == 2
        resumed = await transhume(alpha, "drain", "alpha", "resume")
        assert "drain of alpha: running" in resumed.out
        following = await start(alpha, "drain", "alpha", "follow")
        cancelled = await transhume(alpha, "drain", "alpha", "cancel", "--json")
        assert cancelled.json["state"] == "cancelling"
        async with movers(d):
            done = await finish(following)
        assert done.code == 4
        assert "b: left: the drain was cancelled" in done.out
        assert d.beta.states == {"a": VmState.RUNNING}


async def test_ctrl_c_asks_for_the_end_and_a_second_one_leaves_it_alone() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        await d.running_vm("web", "alpha")
        process = await start(alpha, "drain", "alpha", "--yes")
        async with asyncio.timeout(30):
            assert process.stdout is not None
            line = await process.stdout.readline()
            assert line.startswith(b"web: ")
            process.send_signal(signal.SIGINT)
            while b"cancelling" not in line:
                line = await process.stdout.readline()
            process.send_signal(signal.SIGINT)
        done = await finish(process)
        assert done.code == 5
        assert "left alone" in done.out
        async with movers(d), asyncio.timeout(30):
            while not (await d.controller.drains.show("alpha")).state.over:
                await asyncio.sleep(0.02)
        assert (await d.controller.drains.show("alpha")).state is DrainState.CANCELLED


def test_the_whole_and_each_vm_on_lines_of_their_own() -> None:
    steps = (
        DrainStep(vm="a", source="x", destination="y", state=StepState.MOVED, memory_bytes=100),
        DrainStep(
            vm="b", source="x", destination="y", state=StepState.MOVING, memory_bytes=100, progress=0.5
        ),
        DrainStep(vm="c", source="x", memory_bytes=100),
    )
    drain = Drain(host="x", steps=steps)
    assert fraction(drain) == 0.5
    whole, each = drain_lines(drain, 80)
    assert whole.endswith(" 50%  running  1 of 3 VMs")
    assert each.startswith("  b ")
    assert each.endswith(" 50%  x -> y")
    assert [len(line) for line in drain_lines(drain, 10)] == [10, 10]
    assert fraction(Drain(host="x")) == 0.0
    assert fraction(Drain(host="x", state=DrainState.DONE)) == 1.0


def test_a_plan_is_shown_and_done_only_after_a_yes(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    steps = (
        DrainStep(vm="web", source="alpha", destination="beta", wave=1, wire_bytes=5_000_000, seconds=2.0),
        DrainStep(vm="gpu", source="alpha", state=StepState.BLOCKED, reason="it has a VFIO device"),
    )
    plan = Drain(host="alpha", steps=steps, wire_bytes=5_000_000, seconds=2.0)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    current = Session(Path("/none"))
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: False)
    with pytest.raises(Refused, match="nothing was changed"):
        confirm(current, plan)
    told = capsys.readouterr().out
    assert "gpu blocked: it has a VFIO device" in told
    assert "1 VMs, 5 MB, about 2.0 s; 1 cannot go" in told
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: True)
    confirm(current, plan)
    with pytest.raises(Refused, match="--yes does it"):
        confirm(Session(Path("/none"), as_json=True), plan)


def test_the_live_view_ends_with_the_report(capsys: Capsys) -> None:
    step = DrainStep(vm="b", source="x", destination="y", state=StepState.MOVING, memory_bytes=100)
    view = LiveView()
    view.update(Drain(host="x", steps=(step,)))
    view.note("cancelling")
    view.close()
    moved = step.model_copy(update={"state": StepState.MOVED})
    view.report(Drain(host="x", steps=(moved,), state=DrainState.DONE, ended_at_s=3.0))
    told = capsys.readouterr().out
    assert "cancelling" in told
    assert "drain of x: done in 3.0 s; 1 moved. x gets no VMs until `transhume undrain x`" in told
