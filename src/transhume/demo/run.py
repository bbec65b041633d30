"""The demo: two hosts on this machine, one Linux guest, moved there and back while it works.

It does what a person would do with two servers, through the command line, and watches from outside: the
guest rewrites and verifies its memory all the time and beats on its serial console, so a page that was
lost or a pause that was not told would be seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from transhume.demo.guest.build import Guest, Workload, ensure_guest
from transhume.demo.lab import Lab, LabHost, sweep
from transhume.demo.observer import Observer
from transhume.demo.record import DemoRecord, record_of, table_of, write_json
from transhume.demo.serial_log import Timeline
from transhume.model.errors import Refused, TranshumeError, VmmError
from transhume.model.migration import Engine, Migration, Outcome, Progress
from transhume.model.vm import Vm

VM = "shepherd"
MEMORY_MIB = 256
WORKLOAD = Workload(memory_mib=96, rate_pages_s=2000, verify_pages_s=20000)
WIRE_BITS_S = 1_000_000_000
MOVES: tuple[tuple[Engine, tuple[str, ...]], ...] = (
    (Engine.TRANSHUME, ()),
    (Engine.TRANSHUME, ("--mode", "pre-copy")),
    (Engine.QEMU, ()),
    (Engine.QEMU, ()),
    (Engine.TRANSHUME, ("--mode", "post-copy")),
    (Engine.TRANSHUME, ("--mode", "hybrid")),
    (Engine.TRANSHUME, ("--mode", "pre-copy", "--iterations", "1", "--rest", "after-state")),
    (Engine.TRANSHUME, ("--mode", "pre-copy", "--iterations", "1", "--rest", "on-demand", "--deadline", "5")),
)
"""There and back by each engine, then in each order of transfer."""

_BOOT_LIMIT_S = 60.0
_VERIFY_LIMIT_S = 60.0
_AT_REST_S = 2.0


def run_demo(json_path: Path | None = None, console: Console | None = None) -> int:
    """Run the whole demo; with `json_path` write its records there too, as far as it came.

    Returns 0, or 1 when a migration failed, a page was wrong or the demo could not go on. Nothing is
    left behind, also after Ctrl-C (130).
    """
    console = console or Console()
    records: list[DemoRecord] = []
    try:
        with _sigterm_as_ctrl_c():
            _run(console, records)
    except KeyboardInterrupt:
        console.print("stopped; the hosts, the VM and the wire are removed")
        return 130
    except TranshumeError as error:
        console.print(f"the demo failed: {error.message}", style="bold red", markup=False, soft_wrap=True)
        return 1
    finally:
        if json_path is not None:
            write_json(json_path, records)
    return 0 if all(record.went_well for record in records) else 1


def _run(console: Console, records: list[DemoRecord]) -> None:
    if os.geteuid() != 0:
        raise Refused(
            "root is needed, to make network namespaces and to open a userfaultfd in another process:"
            " run it with sudo"
        )
    sweep()
    with console.status("making the guest") as status:
        guest = ensure_guest()
        status.update("making two hosts, joined by a wire of 1 Gbit/s")
        with Lab() as lab:
            lab.form_farm()
            lab.shape(rate_bits_s=WIRE_BITS_S)
            logs = [host.vm_dir(VM) / "serial.log" for host in lab.hosts]
            with Observer(logs) as observer:
                _boot(lab.hosts[0], guest, observer, status)
                at_rest_ms = _silence_at_rest_ms(observer, status)
                _move_there_and_back(lab, observer, console, status, records)
                status.update("removing the hosts and the VM")
    console.print(table_of(records))
    console.print(
        f"The guest rewrote {WORKLOAD.rate_pages_s} of its pages a second and verified every page after"
        f" each move.\nIts longest gap in {_AT_REST_S:g} s while nothing moved was {at_rest_ms:.1f} ms.",
        highlight=False,
        soft_wrap=True,
    )


def _boot(host: LabHost, guest: Guest, observer: Observer, status: Status) -> None:
    status.update(f"booting a Linux guest of {MEMORY_MIB} MiB on {host.name}")
    files = ("--kernel", str(guest.kernel), "--initrd", str(guest.initrd))
    size = ("--memory", f"{MEMORY_MIB}M", "--cpus", "1", "--host", host.name)
    host.transhume("vm", "create", VM, *size, *files, "--append", WORKLOAD.arguments()).require_success()
    host.transhume("vm", "start", VM).require_success()
    observer.wait_until_ready(_BOOT_LIMIT_S)


def _silence_at_rest_ms(observer: Observer, status: Status) -> float:
    """The yardstick of the gaps: this machine's own hiccups, while nothing moves."""
    status.update("watching the guest at rest")
    start_s = time.monotonic()
    end_s = start_s + _AT_REST_S
    observer.wait_for(lambda timeline: timeline.beats_s[-1:] > [end_s], _BOOT_LIMIT_S)
    return observer.longest_silence_ms(start_s, end_s)


def _move_there_and_back(
    lab: Lab, observer: Observer, console: Console, status: Status, records: list[DemoRecord]
) -> None:
    home, away = lab.hosts
    for number, (engine, order) in enumerate(MOVES):
        destination = home if number % 2 else away
        records.append(_move(home, destination, engine, order, observer, status))
        console.print(_sentence(records[-1], destination), highlight=False, soft_wrap=True)


def _move(
    asked: LabHost,
    destination: LabHost,
    engine: Engine,
    order: tuple[str, ...],
    observer: Observer,
    status: Status,
) -> DemoRecord:
    """Move the VM, wait until the guest has verified every page, and tell what was seen.

    Raises `TimedOut` when the guest does not go on: a failed migration leaves it running too.
    """
    corrupt_before = observer.ask(Timeline.corrupt_pages)
    start_s = time.monotonic()
    migration = _migrate(asked, destination, engine, order, status)
    status.update("the guest verifies every page")
    observer.wait_for_full_verification(_VERIFY_LIMIT_S)
    return record_of(
        migration,
        guest_gap_ms=observer.longest_silence_ms(start_s, time.monotonic()),
        corrupt_pages=observer.ask(Timeline.corrupt_pages) - corrupt_before,
        vm_runs_on=_owner(asked),
    )


def _migrate(
    asked: LabHost, destination: LabHost, engine: Engine, order: tuple[str, ...], status: Status
) -> Migration:
    """Run `transhume migrate --json` and show its progress; gives the migration as its last line has it."""
    words = ("migrate", VM, "--to", destination.name, "--engine", engine.value, *order, "--json")
    command = asked.transhume_command(*words)
    status.update(f"moving the VM to {destination.name} by {engine.value}")
    with tempfile.TemporaryFile() as complaints:
        process = asked.start(*command, stdout=subprocess.PIPE, stderr=complaints)
        assert process.stdout is not None
        migration = None
        for line in process.stdout:
            migration = _shown(json.loads(line), destination, engine, status) or migration
        process.wait()
        if migration is None:
            complaints.seek(0)
            reason = complaints.read().decode(errors="replace").strip()
            raise VmmError(f"`transhume {' '.join(words)}` gave no report: {reason}")
    return migration


def _shown(line: dict[str, Any], destination: LabHost, engine: Engine, status: Status) -> Migration | None:
    """Show one line of progress; the last line gives the migration."""
    if line["type"] == "report":
        return Migration.model_validate(line["migration"])
    if line["type"] == "progress":
        progress = Progress.model_validate(line["progress"])
        status.update(
            f"moving the VM to {destination.name} by {engine.value}: {progress.phase.value},"
            f" pass {progress.iteration}, {progress.wire_bytes / 1e6:.0f} MB sent"
        )
    return None


def _owner(asked: LabHost) -> str:
    """Where the VM runs, as the farm's register has it."""
    vm = Vm.model_validate(asked.transhume("vm", "show", VM, "--json").require_success().json())
    return vm.ownership.owner


def _sentence(record: DemoRecord, destination: LabHost) -> str:
    who = f"{record.engine}, {record.mode}"
    if record.outcome != Outcome.COMPLETED:
        return f"{who}: the move to {destination.name} {record.outcome}; VM on {record.vm_runs_on}"
    return (
        f"{who}: moved to {destination.name} in {record.total_ms / 1000:.2f} s; the guest stood still for"
        f" {record.guest_gap_ms:.0f} ms; {record.corrupt_pages} wrong pages"
    )


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Clean up when a service manager or a time limit ends the demo, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
