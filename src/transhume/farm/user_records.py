"""What the store keeps of users, of their tokens and of what was done."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from transhume.farm.rights import Grant


class UserRecord(BaseModel):
    """A person or a program with rights of its own."""

    model_config = ConfigDict(frozen=True)

    name: str
    grants: tuple[Grant, ...]


class UserTokenRecord(BaseModel):
    """One token of a user, under the hash of its secret."""

    model_config = ConfigDict(frozen=True)

    user: str
    expires_at_s: float


class AuditRecord(BaseModel):
    """A change that was asked for. `outcome` is "begun" until it is known, and stays so if the controller
    dies meanwhile.
    """

    model_config = ConfigDict(frozen=True)

    at_s: float
    who: str
    source: str
    what: str
    why: str = ""
    outcome: str = "begun"
    told: str = ""
