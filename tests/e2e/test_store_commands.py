"""`transhume store`, as a person types it: backup of a running farm, refusals, and the way back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from transhume.demo.lab import Lab, LabHost


@pytest.fixture
def alpha() -> Iterator[LabHost]:
    """One host, which carries the controller."""
    with Lab(["alpha"]) as lab:
        host = lab["alpha"]
        host.transhume("up", "--name", "alpha", "--address", "127.0.0.1").require_success()
        yield host


def refused(host: LabHost, *words: str) -> str:
    """What a command said that was refused."""
    done = host.transhume(*words)
    assert done.exit_code == 2, done
    return done.stderr


def test_a_farm_is_backed_up_and_brought_back(alpha: LabHost, tmp_path: Path) -> None:
    backup, later = tmp_path / "farm.jsonl", tmp_path / "later.jsonl"
    said = alpha.transhume("store", "backup", str(backup), "--json").require_success().json()
    assert said["records"] == len(backup.read_text().splitlines()) - 2
    assert backup.stat().st_mode & 0o777 == 0o600
    assert "exists already" in refused(alpha, "store", "export", str(backup))
    alpha.transhume("host", "set", "alpha", "--label", "rack-1").require_success()

    assert "transhume down" in refused(alpha, "store", "restore", str(backup), "--replace")
    alpha.transhume("down").require_success()
    assert "not empty" in refused(alpha, "store", "restore", str(backup))
    changed = tmp_path / "changed.jsonl"
    changed.write_text(backup.read_text().replace("alpha", "gamma"))
    assert "checksum" in refused(alpha, "store", "import", str(changed), "--replace")
    assert "not an export" in refused(alpha, "store", "import", "/etc/hostname")

    alpha.transhume("store", "restore", str(backup), "--replace").require_success()
    (kept,) = alpha.state_dir.glob("replaced-*.jsonl")
    assert "rack-1" in kept.read_text()
    alpha.transhume("up").require_success()
    alpha.transhume("store", "export", str(later)).require_success()
    assert "rack-1" not in later.read_text()
    since = {key for key in keys(later) if key.startswith(("tokens/", "audit/"))}
    assert keys(later) - since == keys(backup) - since


def keys(export: Path) -> set[str]:
    """The records in an export."""
    lines = [json.loads(line) for line in export.read_text().splitlines()]
    return {line["key"] for line in lines if "key" in line}
