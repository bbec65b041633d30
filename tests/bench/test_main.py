"""`python -m transhume.bench`: what ends it with which exit code, on real but idle hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transhume.bench.__main__ import main
from transhume.bench.figure import Figure, Target
from transhume.bench.machine import machine_facts
from transhume.bench.play import Bench
from transhume.bench.stage import PagesWrong


def slow(bench: Bench) -> list[Figure]:
    assert len(bench.lab.hosts) == 2
    return [Figure("slow", float(bench.rounds), "s", Target.under(1, "s"))]


def wrong(_: Bench) -> list[Figure]:
    raise PagesWrong("3 pages were wrong")


def test_a_missed_target_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench" / "figures.jsonl"
    assert main(["--rounds", "3", "--output", str(output)], {"trial": (slow,)}) == 0
    (line,) = output.read_text().splitlines()
    assert (json.loads(line)["value"], json.loads(line)["met"]) == (3.0, False)
    assert "not met" in capsys.readouterr().out


def test_a_wrong_page_is_one_and_the_rest_is_measured_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.jsonl"
    groups = {"trial": (wrong, slow), "other": (wrong,)}
    assert main(["--only", "trial", "--output", str(output)], groups) == 1
    assert len(output.read_text().splitlines()) == 1
    assert "3 pages were wrong" in capsys.readouterr().out


def test_an_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "nothing"])
    assert ended.value.code == 2
    assert "engine" in capsys.readouterr().err


def test_the_machine_is_described() -> None:
    facts = machine_facts()
    assert facts["cpus"] >= 1
    assert facts["accel"] in ("kvm", "tcg")
    assert all(value != "" for value in facts.values())
