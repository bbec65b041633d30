"""CHANGELOG.md keeps to the form that it promises, and knows the version of this tree."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT

from transhume import __version__

KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_headings() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    releases = [line for line in lines if line.startswith("## ")]
    assert releases[0] == "## [Unreleased]"
    assert all(
        re.fullmatch(r"## \[\d+\.\d+\.\d+\] - (Unreleased|\d{4}-\d\d-\d\d)", line) for line in releases[1:]
    )
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= KINDS


def test_this_version_has_its_section() -> None:
    assert f"## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
