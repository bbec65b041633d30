"""Which right each route under /v1 demands. A test compares this table with the routes; the guard refuses
what is not in it to everybody but admins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from starlette.routing import compile_path

from transhume.farm.rights import Action


class Target(Enum):
    """What the right is asked for."""

    OPEN = auto()
    """Nothing is asked: proven otherwise, or known to all."""
    SELF = auto()
    """Whoever is known."""
    FARM = auto()
    VM = auto()
    MIGRATION = auto()
    """The VM of a migration, which is named by its id or by the VM's name."""
    SEEN = auto()
    """A list that shows only what the caller may see."""


@dataclass(frozen=True)
class Need:
    """A right, and whether the request changes something, so that it is noted."""

    action: Action
    target: Target
    changes: bool = True


_OPEN = Need(Action.VIEW, Target.OPEN, changes=False)
_SEE_FARM = Need(Action.VIEW, Target.FARM, changes=False)
_SEE_VM = Need(Action.VIEW, Target.VM, changes=False)
_RUN_VM = Need(Action.OPERATE, Target.VM)
_RUN_FARM = Need(Action.OPERATE, Target.FARM)
_ADMIN = Need(Action.ADMINISTER, Target.FARM)
_ADMIN_SEES = Need(Action.ADMINISTER, Target.FARM, changes=False)

NEEDS: dict[tuple[str, str], Need] = {
    ("GET", "/v1/authority"): _OPEN,
    ("GET", "/v1/clock"): _OPEN,
    ("POST", "/v1/join"): _OPEN,
    ("POST", "/v1/join/preview"): _OPEN,
    ("GET", "/v1/whoami"): Need(Action.VIEW, Target.SELF, changes=False),
    ("GET", "/v1/hosts"): _SEE_FARM,
    ("GET", "/v1/baseline"): _SEE_FARM,
    ("GET", "/v1/farm"): _SEE_FARM,
    ("GET", "/v1/rules"): _SEE_FARM,
    ("GET", "/v1/hosts/{name}/drain"): _SEE_FARM,
    ("GET", "/v1/migrations"): _SEE_FARM,
    ("GET", "/v1/events"): _SEE_FARM,
    ("GET", "/v1/events/history"): _SEE_FARM,
    ("GET", "/v1/operations"): _SEE_FARM,
    ("GET", "/v1/operations/{operation}"): _SEE_FARM,
    ("POST", "/v1/operations/{operation}/cancel"): _RUN_FARM,
    ("GET", "/v1/hosts/{name}/fence"): _SEE_FARM,
    ("POST", "/v1/hosts/{name}/fence"): _ADMIN,
    ("GET", "/v1/store"): _ADMIN_SEES,
    ("POST", "/v1/tokens"): _ADMIN,
    ("DELETE", "/v1/hosts/{name}"): _ADMIN,
    ("POST", "/v1/farm/settings"): _ADMIN,
    ("POST", "/v1/hosts/{name}/settings"): _ADMIN,
    ("POST", "/v1/rules"): _ADMIN,
    ("DELETE", "/v1/rules/{name}"): _ADMIN,
    ("POST", "/v1/hosts/{name}/drain/plan"): Need(Action.OPERATE, Target.FARM, changes=False),
    ("POST", "/v1/hosts/{name}/drain"): _RUN_FARM,
    ("POST", "/v1/hosts/{name}/drain/pause"): _RUN_FARM,
    ("POST", "/v1/hosts/{name}/drain/resume"): _RUN_FARM,
    ("DELETE", "/v1/hosts/{name}/drain"): _RUN_FARM,
    ("POST", "/v1/hosts/{name}/undrain"): _RUN_FARM,
    ("GET", "/v1/vms"): Need(Action.VIEW, Target.SEEN, changes=False),
    ("POST", "/v1/vms"): _RUN_FARM,
    ("GET", "/v1/vms/{name}"): _SEE_VM,
    ("DELETE", "/v1/vms/{name}"): _RUN_VM,
    ("POST", "/v1/vms/{name}/start"): _RUN_VM,
    ("POST", "/v1/vms/{name}/stop"): _RUN_VM,
    ("POST", "/v1/vms/{name}/kill"): _RUN_VM,
    # Labels are what grants name: whoever sets them for a VM decides who may do what to it.
    ("POST", "/v1/vms/{name}/settings"): _ADMIN,
    ("POST", "/v1/vms/{name}/memory"): _RUN_VM,
    ("GET", "/v1/vms/{name}/log"): _SEE_VM,
    ("GET", "/v1/vms/{name}/screendump"): _SEE_VM,
    ("WEBSOCKET", "/v1/vms/{name}/console"): _RUN_VM,
    ("POST", "/v1/vms/{name}/migrate"): _RUN_VM,
    ("POST", "/v1/vms/{name}/dry-run"): Need(Action.OPERATE, Target.VM, changes=False),
    ("GET", "/v1/vms/{name}/revival"): _SEE_VM,
    ("POST", "/v1/vms/{name}/revival"): _RUN_VM,
    ("GET", "/v1/migrations/{migration}"): Need(Action.VIEW, Target.MIGRATION, changes=False),
    ("GET", "/v1/migrations/{migration}/events"): Need(Action.VIEW, Target.MIGRATION, changes=False),
    ("POST", "/v1/migrations/{reference}/adjust"): Need(Action.OPERATE, Target.MIGRATION),
    ("POST", "/v1/migrations/{reference}/cancel"): Need(Action.OPERATE, Target.MIGRATION),
    ("GET", "/v1/users"): _ADMIN_SEES,
    ("POST", "/v1/users"): _ADMIN,
    ("GET", "/v1/users/{name}"): _ADMIN_SEES,
    ("DELETE", "/v1/users/{name}"): _ADMIN,
    ("POST", "/v1/users/{name}/token"): _ADMIN,
    ("POST", "/v1/users/{name}/grants"): _ADMIN,
    ("POST", "/v1/users/{name}/grants/revoke"): _ADMIN,
    ("GET", "/v1/audit"): _ADMIN_SEES,
}

_PATTERNS = [(verb, compile_path(path)[0], need) for (verb, path), need in NEEDS.items()]


def need_of(verb: str, path: str) -> tuple[Need, str]:
    """What a request needs, and the name or id in its path; what is not in the table needs an admin."""
    for known, pattern, need in _PATTERNS:
        found = pattern.match(path) if known == verb else None
        if found is not None:
            return need, next(iter(found.groupdict().values()), "")
    return _ADMIN, ""
