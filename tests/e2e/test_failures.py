"""What happens when something dies, hangs or lies in the middle of a migration.

In each case: the VM runs on exactly one host, its memory is whole, the record says where it is, nothing
is left on the other host, and a second attempt succeeds.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest
from tests.e2e.farm import Farm, until

from transhume.demo.observer import Observer
from transhume.migration.driver.job import MoverFolder, Role
from transhume.model.errors import Conflict
from transhume.model.migration import Engine, Migration, Outcome, Phase
from transhume.vmm.paths import VmPaths

pytestmark = pytest.mark.timeout(300)

SLOW_BYTES_S = 128 << 10
SILENCE_LIMIT_S = 2.0


async def _in_precopy(farm: Farm, engine: Engine = Engine.TRANSHUME) -> str:
    """A migration that will stay in its pre-copy for a while."""
    await farm.boot("vm")
    migration = await farm.begin(
        "vm",
        "beta",
        engine=engine,
        bandwidth_bytes_s=SLOW_BYTES_S,
        peer_silence_limit_s=SILENCE_LIMIT_S,
    )
    await farm.in_phase(migration, Phase.PRECOPY)
    return migration


async def _goes_on_at_the_source(farm: Farm, migration: str) -> Migration:
    record = await farm.ended(migration)
    assert record.outcome is Outcome.FAILED
    assert record.runs_at == "source host alpha"
    assert record.error
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")
    await _moves(farm, "beta")
    return record


async def _moves(farm: Farm, there: str) -> None:
    again = await farm.migrate("vm", there, verify=True)
    assert again.outcome is Outcome.COMPLETED, again.error
    await farm.assert_sound("vm", there)


@pytest.mark.parametrize("engine", list(Engine))
async def test_the_destinations_qemu_dies(farm: Farm, engine: Engine) -> None:
    migration = await _in_precopy(farm, engine)
    os.kill(farm.qemu_pid("vm", "beta"), signal.SIGKILL)
    await _goes_on_at_the_source(farm, migration)


@pytest.mark.parametrize("engine", list(Engine))
async def test_the_destinations_mover_dies(farm: Farm, engine: Engine) -> None:
    migration = await _in_precopy(farm, engine)
    os.kill(farm.mover_pid(migration, "beta", Role.DESTINATION), signal.SIGKILL)
    await _goes_on_at_the_source(farm, migration)


@pytest.mark.parametrize("engine", list(Engine))
async def test_the_sources_mover_dies(farm: Farm, engine: Engine) -> None:
    migration = await _in_precopy(farm, engine)
    os.kill(farm.mover_pid(migration, "alpha", Role.SOURCE), signal.SIGKILL)
    await _goes_on_at_the_source(farm, migration)


async def test_both_movers_die(farm: Farm) -> None:
    migration = await _in_precopy(farm)
    os.kill(farm.mover_pid(migration, "beta", Role.DESTINATION), signal.SIGKILL)
    os.kill(farm.mover_pid(migration, "alpha", Role.SOURCE), signal.SIGKILL)
    await _goes_on_at_the_source(farm, migration)


async def test_the_sources_qemu_dies(farm: Farm) -> None:
    migration = await _in_precopy(farm)
    os.kill(farm.qemu_pid("vm", "alpha"), signal.SIGKILL)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.FAILED
    assert record.runs_at.startswith("nowhere")
    assert farm.runs_on("vm") == []
    await farm.assert_nothing_left("vm", "beta")
    async with farm.client() as client:
        await client.start_vm("vm")
    assert farm.runs_on("vm") == ["alpha"]


async def test_the_destinations_daemon_dies(farm: Farm) -> None:
    """The movers need no daemon: the migration goes on, and the next daemon finds the VM."""
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=4 * SLOW_BYTES_S)
    await farm.in_phase(migration, Phase.PRECOPY)
    farm.kill_daemon("beta")
    await farm.daemon_gone("beta")
    async with farm.client() as client:

        async def completed() -> bool:
            return (await client.migration(migration)).outcome is Outcome.COMPLETED

        await until(completed, "the migration ends without the daemon")
    assert farm.runs_on("vm") == ["beta"]
    await farm.start_daemon("beta")
    await farm.ended(migration)
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "alpha")
    await _moves(farm, "alpha")


async def test_the_sources_daemon_dies_and_comes_back(farm: Farm) -> None:
    """Alpha's daemon carries the controller too: the commit waits for the register, then it goes through."""
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=4 * SLOW_BYTES_S)
    await farm.in_phase(migration, Phase.PRECOPY)
    farm.kill_daemon("alpha")
    await farm.daemon_gone("alpha")
    await farm.start_daemon("alpha")
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "alpha")


async def test_everything_on_the_source_but_qemu_dies_and_comes_back(farm: Farm) -> None:
    migration = await _in_precopy(farm)
    mover = farm.mover_pid(migration, "alpha", Role.SOURCE)
    farm.kill_daemon("alpha")
    os.kill(mover, signal.SIGKILL)
    await farm.daemon_gone("alpha")
    await farm.start_daemon("alpha")
    await _goes_on_at_the_source(farm, migration)


async def test_a_restarted_daemon_finds_its_vms(farm: Farm) -> None:
    await farm.boot("vm")
    newest = await farm.assert_sound("vm", "alpha")
    pid = farm.qemu_pid("vm", "alpha")
    farm.kill_daemon("alpha")
    await farm.daemon_gone("alpha")
    await farm.start_daemon("alpha")
    assert farm.qemu_pid("vm", "alpha") == pid
    await farm.assert_sound("vm", "alpha", newest)


@pytest.mark.parametrize("engine", list(Engine))
async def test_the_link_drops(farm: Farm, engine: Engine) -> None:
    migration = await _in_precopy(farm, engine)
    farm.lab.cut()
    gone = MoverFolder.of(farm.lab["alpha"].state_dir / "migrations", migration, Role.SOURCE)

    async def source_gave_up() -> bool:
        return not gone.path.exists()

    await until(source_gave_up, "the source noticed")
    farm.lab.restore()
    await _goes_on_at_the_source(farm, migration)


async def test_the_destination_stops_answering(farm: Farm) -> None:
    migration = await _in_precopy(farm)
    mover = farm.mover_pid(migration, "beta", Role.DESTINATION)
    os.kill(mover, signal.SIGSTOP)
    try:
        record = await _ended_at_source(farm, migration)
        assert "beta" in record.error
    finally:
        os.kill(mover, signal.SIGCONT)
    await _goes_on_at_the_source(farm, migration)


async def test_the_source_stops_answering(farm: Farm) -> None:
    """The destination gives up by itself; the source, woken again, hears of it and goes on."""
    migration = await _in_precopy(farm)
    mover = farm.mover_pid(migration, "alpha", Role.SOURCE)
    os.kill(mover, signal.SIGSTOP)
    try:

        async def destination_empty() -> bool:
            return not farm.vm_dir("vm", "beta").exists()

        await until(destination_empty, "the destination gave up")
        assert farm.runs_on("vm") == ["alpha"]
    finally:
        os.kill(mover, signal.SIGCONT)
    await _goes_on_at_the_source(farm, migration)


async def test_the_register_does_not_answer_before_the_switchover(farm: Farm) -> None:
    """While the controller stands still the VM is not suspended: it runs, and moves once that answers."""
    await farm.boot("vm")
    migration = await farm.begin("vm", "beta", bandwidth_bytes_s=4 * SLOW_BYTES_S, peer_silence_limit_s=30.0)
    await farm.in_phase(migration, Phase.PRECOPY)
    journal = MoverFolder.of(farm.lab["alpha"].state_dir / "migrations", migration, Role.SOURCE).journal_file
    farm.kill_daemon("alpha", signal.SIGSTOP)
    try:

        async def thought_better() -> bool:
            states = [json.loads(line).get("state") for line in journal.read_text().splitlines()]
            states = [state for state in states if state]
            return "suspending" in states and states[states.index("suspending") + 1 :][:1] == ["precopy"]

        await until(thought_better, "the source found the register silent")
        assert farm.runs_on("vm") == ["alpha", "beta"]
    finally:
        farm.kill_daemon("alpha", signal.SIGCONT)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    await farm.assert_sound("vm", "beta")
    await farm.assert_nothing_left("vm", "alpha")


async def _held_at_the_commit(farm: Farm) -> str:
    """A migration whose destination has everything and asks a controller that stands still."""
    await farm.boot_linux("vm")
    with Observer([farm.vm_dir("vm", "alpha") / "serial.log"]) as observer:
        observer.wait_until_ready(90)
    migration = await farm.begin("vm", "beta", verify=True, post_copy=False, peer_silence_limit_s=30.0)
    source = MoverFolder.of(farm.lab["alpha"].state_dir / "migrations", migration, Role.SOURCE)
    destination = MoverFolder.of(farm.lab["beta"].state_dir / "migrations", migration, Role.DESTINATION)

    async def suspended() -> bool:
        # Comparing the hashes of all RAM gives the test the time to strike.
        return source.journal_file.exists() and '"last-pages"' in source.journal_file.read_text()

    await until(suspended, "the VM is suspended")
    farm.kill_daemon("alpha", signal.SIGSTOP)

    async def committing() -> bool:
        return '"committing"' in destination.journal_file.read_text()

    try:
        await until(committing, "the destination asks for the commit")
    except BaseException:
        farm.kill_daemon("alpha", signal.SIGCONT)
        raise
    return migration


async def test_the_register_does_not_answer_at_the_commit(farm: Farm) -> None:
    """Too late to think better of it: the VM waits, suspended, and runs once the register has answered."""
    migration = await _held_at_the_commit(farm)
    farm.kill_daemon("alpha", signal.SIGCONT)
    record = await farm.ended(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert farm.runs_on("vm") == ["beta"]
    await farm.assert_nothing_left("vm", "alpha")


async def test_the_destination_mover_dies_while_it_commits(farm: Farm) -> None:
    """The hardest moment: nobody knows whether the commit was made. The register tells, once it answers."""
    migration = await _held_at_the_commit(farm)
    try:
        os.kill(farm.mover_pid(migration, "beta", Role.DESTINATION), signal.SIGKILL)
    finally:
        farm.kill_daemon("alpha", signal.SIGCONT)
    record = await farm.ended(migration)
    here, other = ("beta", "alpha") if record.outcome is Outcome.COMPLETED else ("alpha", "beta")
    assert here in record.runs_at
    assert farm.runs_on("vm") == [here]
    assert (await farm.vm("vm")).ownership.owner == here
    await farm.assert_nothing_left("vm", other)
    await farm.linux_goes_on("vm", here)


async def test_a_stranger_at_the_destinations_port(farm: Farm) -> None:
    """Garbage, and frames larger than allowed, cost the stranger the connection and nobody anything."""
    migration = await _in_precopy(farm)
    folder = MoverFolder.of(farm.lab["alpha"].state_dir / "migrations", migration, Role.SOURCE)
    prepared = json.loads(folder.job_file.read_text())["prepared"]
    for garbage in (b"GET / HTTP/1.0\r\n\r\n" * 100, b"\0" * 4096, b"Tshm" + b"\xff" * 4096):
        await asyncio.to_thread(
            farm.lab["alpha"].run,
            "python3",
            "-c",
            f"import socket; s=socket.create_connection({(prepared['address'], prepared['port'])!r}, 5);"
            f" s.sendall({garbage!r}); s.recv(100)",
        )
    async with farm.client() as client:
        assert (await client.migration(migration)).outcome is Outcome.RUNNING
        await client.cancel(migration)
    await farm.ended(migration)
    await _moves(farm, "beta")


async def test_device_state_that_does_not_fit(farm: Farm) -> None:
    """The destination is led to build another machine, whose QEMU refuses the state."""
    await farm.boot("vm")
    spec_file = VmPaths(farm.vm_dir("vm", "alpha")).spec_file
    before = spec_file.read_text()
    spec_file.write_text(before.replace('"cpus":1', '"cpus":2'))
    record = await farm.migrate("vm", "beta")
    spec_file.write_text(before)
    assert record.outcome is Outcome.FAILED
    assert record.runs_at == "source host alpha"
    assert "device state" in record.error
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")
    await _moves(farm, "beta")


async def test_two_migrations_of_one_vm_at_once(farm: Farm) -> None:
    migration = await _in_precopy(farm)
    async with farm.client("beta") as client:
        with pytest.raises(Conflict, match=migration):
            await client.migrate("vm", "beta", (await client.migration(migration)).options)
        await client.cancel(migration)
    await farm.ended(migration)
    await farm.assert_sound("vm", "alpha")


async def test_the_deadline_aborts(farm: Farm) -> None:
    await farm.boot("vm")
    record = await farm.migrate(
        "vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S, deadline_s=1.5, on_deadline="abort"
    )
    assert record.error_code == "deadline"
    assert record.outcome is Outcome.FAILED
    await farm.assert_sound("vm", "alpha")
    await farm.assert_nothing_left("vm", "beta")


async def test_the_deadline_switches(farm: Farm) -> None:
    """In the middle of the first pass: the rest travels while the VM is suspended, and nothing is lost."""
    await farm.boot("vm")
    record = await farm.migrate(
        "vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S, deadline_s=1.5, verify=True, post_copy=False
    )
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.switch_reason == "the deadline passed"
    await farm.assert_sound("vm", "beta")


async def test_the_deadline_leaves_the_rest_for_after_the_resume(farm: Farm) -> None:
    """In mode auto a deadline costs no downtime."""
    await farm.boot("vm")
    record = await farm.migrate("vm", "beta", bandwidth_bytes_s=SLOW_BYTES_S, deadline_s=1.5)
    assert record.outcome is Outcome.COMPLETED, record.error
    assert record.report.switch_reason == "the deadline passed: the rest follows after the resume"
    assert record.report.paging is not None
    await farm.assert_sound("vm", "beta")


async def _ended_at_source(farm: Farm, migration: str) -> Migration:
    async def over() -> Migration | None:
        async with farm.client() as client:
            record = await client.migration(migration)
        return record if record.outcome is not Outcome.RUNNING else None

    record: Migration = await until(over, "the source gave up")
    return record
