"""Whose word counts when a host runs a VM that the register gives to another: the higher epoch's.

As long as the store is the farm's own, the register's epoch is never below that of a VM that runs. It is when
an old copy of the store was brought back. Then the host is right, and the register is raised to what it says.
"""

from __future__ import annotations

from enum import Enum, auto

from transhume.model.vm import Ownership


class Verdict(Enum):
    """What to do about a VM that a host has running."""

    ITS_OWN = auto()
    """The register gives it to this host."""
    DISOWNED = auto()
    """It went to another host after this one began to run it: it is to be ended here."""
    RAISE = auto()
    """The register is older than the VM: it has to be raised to this host."""
    CONTESTED = auto()
    """The register is older than the VM, and its owner runs one too: people must decide."""


def judge(held: Ownership, host: str, claim: int, owner_runs_it: bool) -> Verdict:
    """`claim` is the epoch under which `host` runs the VM, 0 when it does not know; `owner_runs_it` is about
    the register's owner.
    """
    if held.owner == host:
        return Verdict.ITS_OWN
    if not claim or claim < held.epoch:
        return Verdict.DISOWNED
    return Verdict.CONTESTED if owner_runs_it else Verdict.RAISE


def raised(held: Ownership, host: str, claim: int) -> Ownership:
    """What the register becomes then."""
    return Ownership(owner=host, epoch=max(claim, held.epoch + 1))
