"""The farm of the end-to-end tests, for the claims."""

from __future__ import annotations

from tests.e2e.conftest import farm, running_farm

__all__ = ["farm", "running_farm"]
