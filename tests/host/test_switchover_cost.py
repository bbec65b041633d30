"""What a switchover cost lately, for each kind of VM."""

from __future__ import annotations

from pathlib import Path

import pytest

from transhume.host.switchover_cost import FIRST_GUESS_S, WEIGHT_OF_LATEST, SwitchoverCost
from transhume.model.migration import DowntimeReport
from transhume.model.vm import Accel, Display, VmSpec

PLAIN = VmSpec(name="plain", memory_bytes=64 << 20, cpus=1, accel=Accel.TCG)
DRAWING = PLAIN.model_copy(update={"name": "drawing", "display": Display.VNC})
TOOK_100_MS = DowntimeReport(last_pages_ms=40.0, verify_ms=10.0, total_ms=150.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "switchover.json"


def test_before_anything_was_measured_it_is_a_guess(file: Path) -> None:
    assert SwitchoverCost(file).expected_s(PLAIN) == FIRST_GUESS_S
    assert not file.exists()


def test_it_comes_near_to_what_is_measured(file: Path) -> None:
    """Without the last pages and the hashes, which are not part of it."""
    cost = SwitchoverCost(file)
    cost.learn(PLAIN, TOOK_100_MS)
    first = (1 - WEIGHT_OF_LATEST) * FIRST_GUESS_S + WEIGHT_OF_LATEST * 0.1
    assert cost.expected_s(PLAIN) == pytest.approx(first)
    for _ in range(30):
        cost.learn(PLAIN, TOOK_100_MS)
    assert cost.expected_s(PLAIN) == pytest.approx(0.1, rel=0.01)


def test_it_survives_the_daemon(file: Path) -> None:
    SwitchoverCost(file).learn(PLAIN, TOOK_100_MS)
    assert SwitchoverCost(file).expected_s(PLAIN) > FIRST_GUESS_S


def test_kinds_of_vms_are_kept_apart(file: Path) -> None:
    cost = SwitchoverCost(file)
    cost.learn(DRAWING, TOOK_100_MS)
    assert cost.expected_s(PLAIN) == FIRST_GUESS_S
    assert cost.expected_s(DRAWING) > FIRST_GUESS_S
    for changes in ({"cpus": 2}, {"accel": Accel.KVM}):
        assert cost.expected_s(DRAWING.model_copy(update=changes)) == FIRST_GUESS_S
    assert cost.expected_s(DRAWING.model_copy(update={"name": "other"})) > FIRST_GUESS_S


def test_a_migration_without_a_downtime_teaches_nothing(file: Path) -> None:
    SwitchoverCost(file).learn(PLAIN, DowntimeReport())
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": "y"}', "null", "\0"])
def test_a_damaged_file_costs_only_precision(file: Path, text: str) -> None:
    file.write_text(text)
    cost = SwitchoverCost(file)
    assert cost.expected_s(PLAIN) == FIRST_GUESS_S
    cost.learn(PLAIN, TOOK_100_MS)
    assert cost.expected_s(PLAIN) > FIRST_GUESS_S


def test_a_place_that_cannot_be_written_costs_only_precision(tmp_path: Path) -> None:
    cost = SwitchoverCost(tmp_path / "gone" / "switchover.json")
    cost.learn(PLAIN, TOOK_100_MS)
    assert cost.expected_s(PLAIN) == FIRST_GUESS_S
