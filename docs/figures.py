"""Writes the measured figures into docs/SPEC.md, out of the file that `make bench` leaves.

    .venv/bin/python docs/figures.py [build/bench/figures.jsonl]

What stands between `<!-- figures -->` and `<!-- end of figures -->` is replaced. A figure's median goes in
as it was measured, met or not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPEC = Path(__file__).with_name("SPEC.md")
FIGURES = SPEC.parents[1] / "build" / "bench" / "figures.jsonl"

_MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_COLUMNS = ("figure", "measured", "target", "kept", "beside it, in the same run", "conditions")


def text_of(figures: Sequence[dict[str, Any]]) -> str:
    """The machine in a sentence, and a row for each figure."""
    machine = figures[0]["machine"]
    rounds = max(len(each["series"]) for each in figures if each["beside"])
    about = (
        f"Machine of the run: {machine['cpus']} CPUs ({machine['cpu_model']}), {machine['memory_mib']} MiB, "
        f"Linux {machine['kernel']}, QEMU {machine['qemu']}, {machine['accel'].upper()}, "
        f"Python {machine['python']}; load average at its begin {machine['load_average_at_begin']:g}. "
        f"Medians of {rounds}.\n\n"
    )
    rule = "|---" * len(_COLUMNS) + "|\n"
    return about + _line(_COLUMNS) + rule + "".join(_row(each) for each in figures)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the document; exit code 1 when nothing was measured."""
    source = Path(arguments[0]) if arguments else FIGURES
    figures = [json.loads(line) for line in source.read_text().splitlines()] if source.exists() else []
    if not figures:
        sys.stderr.write(f"{source} holds no figures: run `make bench` first\n")
        return 1
    text = text_of(figures)
    SPEC.write_text(_MARKED.sub(lambda match: f"{match[1]}{text}{match[2]}", SPEC.read_text()))
    return 0


def _row(figure: dict[str, Any]) -> str:
    kept = {True: "yes", False: "**no**", None: "-"}[figure["met"]]
    target = "-"
    if figure["target"] is not None:
        target = f"{figure['target']} ({_shown(figure['limit'])} {figure['unit']})"
    beside = ", ".join(f"{what}: {_shown(value)}" for what, value in figure["beside"].items()) or "-"
    cells = (
        figure["figure"],
        f"{_shown(figure['value'])} {figure['unit']}",
        target,
        kept,
        beside,
        figure["conditions"] or "-",
    )
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _shown(value: float) -> str:
    """Three digits are more than such measurements are worth."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
