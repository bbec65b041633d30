"""One measured figure: its value, what it must keep, what it is compared with, and the series behind it.

A benchmark emits series and asserts nothing (the habit is Firecracker's): whoever reads the file can compare
two runs by a statistic of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Target:
    """What a value must keep: `words` for a person, `limit` in the figure's unit, and which side is good."""

    words: str
    limit: float
    at_most: bool = True

    @classmethod
    def under(cls, limit: float, unit: str) -> Target:
        return cls(f"at most {limit:g} {unit}", limit)

    @classmethod
    def at_most_times(cls, factor: float, whose: str, value: float) -> Target:
        return cls(f"at most {_times(factor)}{whose}", factor * value)

    @classmethod
    def at_least_times(cls, factor: float, whose: str, value: float) -> Target:
        return cls(f"at least {_times(factor)}{whose}", factor * value, at_most=False)

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Figure:
    """`value` is the median of `series`. `beside` was measured in the same run, in the same unit.

    A figure without a target is shown for information. `conditions` say under what it was measured.
    """

    figure: str
    value: float
    unit: str
    target: Target | None = None
    beside: Mapping[str, float] = field(default_factory=dict)
    series: Sequence[float] = ()
    conditions: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is kept; None without one."""
        return None if self.target is None else self.target.met_by(self.value)

    def as_json(self) -> dict[str, Any]:
        """The figure's line in the file, without the machine's facts."""
        return {
            "figure": self.figure,
            "value": _rounded(self.value),
            "unit": self.unit,
            "target": self.target.words if self.target else None,
            "limit": _rounded(self.target.limit) if self.target else None,
            "met": self.met,
            "beside": {what: _rounded(value) for what, value in self.beside.items()},
            "series": [_rounded(value) for value in self.series],
            "conditions": self.conditions,
        }


def write_figures(path: Path, group: str, machine: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """Add one line a figure, each complete in itself."""
    with path.open("a") as file:
        for figure in figures:
            file.write(json.dumps({"group": group, **figure.as_json(), "machine": dict(machine)}) + "\n")


def table_of(title: str, figures: Sequence[Figure]) -> Table:
    """The figures for a person."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("target")
    table.add_column("", no_wrap=True)
    table.add_column("beside it, in the same run")
    for figure in figures:
        table.add_row(
            figure.figure,
            f"{shown(figure.value)} {figure.unit}",
            "" if figure.target is None else f"{figure.target.words} ({shown(figure.target.limit)})",
            _verdict(figure.met),
            ", ".join(f"{what} {shown(value)}" for what, value in figure.beside.items()),
        )
    return table


def shown(value: float) -> str:
    """Three digits are more than such measurements are worth."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _verdict(met: bool | None) -> Text:
    if met is None:
        return Text("")
    return Text("met", style="green") if met else Text("not met", style="bold red")


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _times(factor: float) -> str:
    return "" if factor == 1 else f"{factor:g} x "
