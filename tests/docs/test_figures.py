"""The table of figures in docs/SPEC.md is made from the benchmark's own lines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from tests.docs.documents import ROOT

from transhume.bench.figure import Figure, Target, write_figures
from transhume.bench.machine import machine_facts


@pytest.fixture
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_for_each_figure(figures: ModuleType, tmp_path: Path) -> None:
    measured = [
        Figure("bulk rate", 1234.5, "MB/s", Target.under(2000, "MB/s"), {"raw": 1700.0}, (1234.5, 1240.0)),
        Figure("scan of 1 GiB", 7.0, "ms", Target.under(5, "ms")),
        Figure("work", 3.0, "pages/s", conditions="at rest"),
    ]
    file = tmp_path / "figures.jsonl"
    write_figures(file, "engine", machine_facts(), measured)
    text = figures.text_of([json.loads(line) for line in file.read_text().splitlines()])
    assert "Medians of 2." in text
    assert "| bulk rate | 1,234 MB/s | at most 2000 MB/s (2,000 MB/s) | yes | raw: 1,700 | - |" in text
    assert "| scan of 1 GiB | 7.00 ms | at most 5 ms (5.00 ms) | **no** | - | - |" in text
    assert "| work | 3.00 pages/s | - | - | - | at rest |" in text


def test_the_document_has_a_place_for_them(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    document, file = tmp_path / "SPEC.md", tmp_path / "figures.jsonl"
    document.write_text((ROOT / "docs" / "SPEC.md").read_text())
    write_figures(file, "engine", machine_facts(), [Figure("work", 3.0, "pages/s", beside={"free": 4.0})])
    monkeypatch.setattr(figures, "SPEC", document)
    assert figures.main([str(file)]) == 0
    assert "| work | 3.00 pages/s |" in document.read_text()
    assert figures.main([str(tmp_path / "none.jsonl")]) == 1
