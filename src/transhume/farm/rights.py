"""Who may do what to what: the decision, without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Set
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from transhume.model.vm import NAME_PATTERN


class Role(StrEnum):
    """What a person may do: see; see and operate; everything, users included."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class Action(StrEnum):
    """What a request is: it looks, operates VMs and hosts, or changes who and what is of the farm."""

    VIEW = "view"
    OPERATE = "operate"
    ADMINISTER = "administer"


class Grant(BaseModel):
    """A role on the VMs that carry the label `on`, or, when that is empty, on the whole farm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    on: str = Field(default="", pattern=rf"^$|{NAME_PATTERN}")


_ALLOWED = {
    Role.VIEWER: frozenset({Action.VIEW}),
    Role.OPERATOR: frozenset({Action.VIEW, Action.OPERATE}),
    Role.ADMIN: frozenset(Action),
}


def may(grants: Iterable[Grant], action: Action, labels: Set[str] | None) -> bool:
    """Whether `grants` allow `action` on a VM with these labels; `labels` is None for the farm as a whole."""
    return any(
        action in _ALLOWED[grant.role] and (not grant.on or (labels is not None and grant.on in labels))
        for grant in grants
    )
