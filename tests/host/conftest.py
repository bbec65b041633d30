"""Real QEMUs, as in the tests of the room below."""

from __future__ import annotations

from tests.vmm.conftest import machines, root, vm_user

__all__ = ["machines", "root", "vm_user"]
