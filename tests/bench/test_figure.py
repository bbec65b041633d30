"""Figures: their targets, the file and the table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from transhume.bench.figure import Figure, Target, shown, table_of, write_figures
from transhume.bench.play import in_turn, median_figure


def test_a_target_may_depend_on_what_was_measured_beside() -> None:
    figure = median_figure(
        "gap",
        "ms",
        [30.0, 10.0, 20.0],
        {"QEMU": [100.0, 50.0, 60.0]},
        lambda beside: Target.at_most_times(0.5, "QEMU's", beside["QEMU"]),
    )
    assert (figure.value, figure.beside, figure.met) == (20.0, {"QEMU": 60.0}, True)
    assert figure.target == Target("at most 0.5 x QEMU's", 30.0)


@pytest.mark.parametrize(
    ("target", "kept", "missed"),
    [
        (Target.under(25, "ms"), 25.0, 25.1),
        (Target.at_most_times(1, "QEMU's", 10.0), 10.0, 10.1),
        (Target.at_least_times(0.7, "the raw rate", 100.0), 70.0, 69.9),
    ],
)
def test_the_limit_itself_is_kept(target: Target, kept: float, missed: float) -> None:
    assert target.met_by(kept)
    assert not target.met_by(missed)


def test_each_line_of_the_file_is_complete_in_itself(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    figures = [
        Figure("a", 1.0, "ms", Target.under(2, "ms"), {"b": 3.0}, (1.0,), "idle"),
        Figure("c", 4.0, "%"),
    ]
    write_figures(path, "engine", {"cpus": 2}, figures[:1])
    write_figures(path, "engine", {"cpus": 2}, figures[1:])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "group": "engine",
        "figure": "a",
        "value": 1.0,
        "unit": "ms",
        "target": "at most 2 ms",
        "limit": 2.0,
        "met": True,
        "beside": {"b": 3.0},
        "series": [1.0],
        "conditions": "idle",
        "machine": {"cpus": 2},
    }
    assert (second["target"], second["met"], second["machine"]) == (None, None, {"cpus": 2})


def test_the_table_says_what_is_met() -> None:
    figures = [
        Figure("kept", 1.0, "ms", Target.under(2, "ms")),
        Figure("missed", 3.0, "ms", Target.under(2, "ms")),
        Figure("shown", 5.0, "ms"),
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(table_of("engine", figures))
    assert isinstance(console.file, io.StringIO)
    lines = {line.split()[0]: line for line in console.file.getvalue().splitlines() if " ms" in line}
    assert "not met" in lines["missed"]
    assert "met" in lines["kept"]
    assert "not met" not in lines["kept"]
    assert "met" not in lines["shown"]


def test_contenders_take_turns_and_the_first_place() -> None:
    turns = [contender for _, contender in in_turn(("a", "b", "c"), 2)]
    assert turns == ["a", "b", "c", "b", "c", "a"]


def test_numbers_for_people() -> None:
    assert [shown(value) for value in (0, 0.1234, 12.34, 1234.5)] == ["0", "0.12", "12.3", "1,234"]
