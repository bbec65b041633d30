"""docs/API.md is what `make docs` would write, and what it promises of the whole API holds."""

from __future__ import annotations

from tests.docs.documents import ROOT, table_rows

from transhume.api.document import markdown, openapi
from transhume.model import errors


def test_the_document_is_current() -> None:
    assert (ROOT / "docs" / "API.md").read_text() == markdown(openapi()), "run `make docs`"


def test_every_path_has_its_version() -> None:
    assert all(path.startswith("/v1/") for path in openapi()["paths"])


def test_every_error_has_a_code_of_its_own_that_is_told() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.TranshumeError)
    ]
    codes = {kind.code for kind in kinds}
    assert len(codes) == len(kinds)
    rows = table_rows(ROOT / "docs" / "API.md")
    told = {row[0].strip("`"): row[1] for row in rows if row[1].isdigit()}
    assert {code: told.get(code) for code in codes} == {kind.code: str(kind.status) for kind in kinds}
