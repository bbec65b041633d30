"""`python -m transhume.bench`: measure, write build/bench/figures.jsonl, and show the figures as a table.

The exit code is 0 also when a target is missed, for a benchmark asserts no times; it is 1 when a migration
failed or a page was wrong, which no load excuses.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from transhume.bench.engine import ENGINE
from transhume.bench.figure import Figure, table_of, write_figures
from transhume.bench.machine import machine_facts
from transhume.bench.play import Bench, Part
from transhume.bench.postcopy import POSTCOPY
from transhume.demo.guest.build import ensure_guest
from transhume.demo.lab import Lab, sweep
from transhume.model.errors import TranshumeError

GROUPS: Mapping[str, tuple[Part, ...]] = {"engine": ENGINE, "postcopy": POSTCOPY}
FIGURES_FILE = Path("build/bench/figures.jsonl")


def main(arguments: Sequence[str] | None = None, groups: Mapping[str, tuple[Part, ...]] = GROUPS) -> int:
    """Measure what the command line asks for; returns the exit code."""
    options = _options(arguments, groups)
    console = Console(highlight=False)
    if os.geteuid() != 0:
        console.print("root is needed, to make network namespaces and to track other processes: use sudo")
        return 2
    chosen = {options.only: groups[options.only]} if options.only else groups
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    troubles = 0
    try:
        for name, parts in chosen.items():
            troubles += _measure(name, parts, options.rounds, options.output, console)
    except KeyboardInterrupt:
        console.print("stopped; the hosts and the VMs are removed")
        return 130
    return 1 if troubles else 0


def _options(arguments: Sequence[str] | None, groups: Mapping[str, tuple[Part, ...]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m transhume.bench", description=__doc__)
    parser.add_argument("--only", choices=sorted(groups), help="measure one group of figures")
    parser.add_argument("--rounds", type=int, default=5, help="how often to measure each (default 5)")
    parser.add_argument("--output", type=Path, default=FIGURES_FILE, help=f"default {FIGURES_FILE}")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _measure(name: str, parts: Sequence[Part], rounds: int, output: Path, console: Console) -> int:
    """Measure one group, show it and write it down; returns how many of its parts failed."""
    machine = machine_facts()
    figures: list[Figure] = []
    troubles: list[str] = []
    began_s = time.monotonic()
    sweep()
    with console.status("making the guest") as status:
        guest = ensure_guest()
        with Lab() as lab:
            status.update("making two hosts")
            lab.form_farm()
            for part in parts:
                bench = Bench(lab, guest, rounds, status.update)
                try:
                    measured = part(bench)
                except TranshumeError as error:
                    troubles.append(f"{part.__name__}: {error.message}")
                    continue
                figures += measured
                write_figures(output, name, machine, measured)
    _show(name, figures, troubles, machine, rounds, time.monotonic() - began_s, console)
    console.print(f"written to {output}")
    return len(troubles)


def _show(
    name: str,
    figures: Sequence[Figure],
    troubles: Sequence[str],
    machine: Mapping[str, object],
    rounds: int,
    took_s: float,
    console: Console,
) -> None:
    console.print(table_of(f"{name}: medians of {rounds}, in {took_s / 60:.1f} minutes", figures))
    console.print(", ".join(f"{fact.replace('_', ' ')} {value}" for fact, value in machine.items()))
    for trouble in troubles:
        console.print(trouble, style="bold red", markup=False)


if __name__ == "__main__":
    sys.exit(main())
