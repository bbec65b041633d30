"""The demo: once for real, and its ways out without the farm."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from transhume.demo import namespaces, run
from transhume.demo.guest.build import Guest
from transhume.demo.lab import Lab
from transhume.model.errors import VmmError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.mark.timeout(400)
def test_a_running_vm_is_moved_there_and_back_by_each_engine(guest: Guest, tmp_path: Path) -> None:
    records_file = tmp_path / "records.json"
    done = subprocess.run(
        [sys.executable, "-m", "transhume", "demo", "--json", str(records_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(records_file.read_text())
    moves = [(record["engine"], record["mode"], record["vm_runs_on"]) for record in records]
    assert moves == [
        ("transhume", "pre-copy", "beta"),
        ("transhume", "pre-copy", "alpha"),
        ("qemu", "pre-copy", "beta"),
        ("qemu", "pre-copy", "alpha"),
        ("transhume", "post-copy", "beta"),
        ("transhume", "hybrid", "alpha"),
        ("transhume", "pre-copy/after-state", "beta"),
        ("transhume", "pre-copy/on-demand", "alpha"),
    ]
    for record in records:
        assert record["outcome"] == "completed"
        assert record["corrupt_pages"] == 0
        assert record["guest_gap_ms"] > 0
        assert record["wire_bytes"] > 0
        assert record["iterations"] > 0
    assert "wrong" in done.stdout


class Watched:
    """Stands in for the lab: `form_farm` does what the test says, on hosts that are really there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
        self.labs: list[Lab] = []

        def form_farm(lab: Lab) -> None:
            self.labs.append(lab)
            act()

        monkeypatch.setattr(Lab, "form_farm", form_farm)

    def nothing_is_left(self) -> bool:
        return len(self.labs) == 1 and not any(
            namespaces.exists(host.namespace) or host.state_dir.exists() for host in self.labs[0].hosts
        )


def raise_error(error: BaseException) -> object:
    raise error


def console_and_text() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    watched = Watched(monkeypatch, lambda: os.kill(os.getpid(), number))
    console, text = console_and_text()
    # Whoever runs the tests in the background lets them ignore Ctrl-C; the demo in front does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run.run_demo(console=console) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in text.getvalue()
    assert watched.nothing_is_left()


@pytest.mark.usefixtures("guest")
def test_a_failure_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, lambda: raise_error(VmmError("QEMU has [no] mood")))
    console, text = console_and_text()
    assert run.run_demo(tmp_path / "records.json", console) == 1
    assert "QEMU has [no] mood" in text.getvalue()
    assert json.loads((tmp_path / "records.json").read_text()) == []
    assert watched.nothing_is_left()


def test_without_root_it_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    console, text = console_and_text()
    assert run.run_demo(console=console) == 1
    assert "root is needed" in text.getvalue()
    assert "sudo" in text.getvalue()
    assert text.getvalue().count("\n") == 1
