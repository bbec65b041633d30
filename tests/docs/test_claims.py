"""docs/CLAIMS.md goes through all claims, and no test of a claim is left out of it."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT, spans, table_rows

CLAIMS = 38
DOCUMENT = ROOT / "docs" / "CLAIMS.md"


def test_every_claim_has_its_line() -> None:
    assert sorted(_rows()) == list(range(1, CLAIMS + 1))


def test_every_claim_is_shown_by_a_test_or_called_open() -> None:
    for claim, (_, status, shown_by) in _rows().items():
        kind, _, why = status.partition(":")
        assert kind in ("covered", "in part", "open"), f"claim {claim}: {status}"
        assert bool(why) == (kind != "covered"), f"claim {claim} says no reason, or one too many"
        assert bool(re.search(r"`tests/[\w/]+\.py", shown_by)) == (kind != "open"), f"claim {claim}"


def test_every_test_of_a_claim_is_named() -> None:
    """That the tests which are named exist is looked at with all other references."""
    named = {span.partition("::")[0] for span in spans(DOCUMENT)}
    files = {f"tests/claims/{path.name}" for path in (ROOT / "tests" / "claims").glob("test_*.py")}
    assert files <= named


def _rows() -> dict[int, list[str]]:
    """The cells behind the number of each claim."""
    rows = [row for row in table_rows(DOCUMENT) if row[0].isdigit()]
    assert len({row[0] for row in rows}) == len(rows)
    return {int(row[0]): row[1:] for row in rows}
