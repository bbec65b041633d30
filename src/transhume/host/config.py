"""What a daemon must know to start: written by `up` and `join`, read by the daemon and its movers."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from transhume.model.vm import NAME_PATTERN

DEFAULT_STATE_DIR = Path("/var/lib/transhume")
DEFAULT_PORT = 7461
DEFAULT_VM_USER = "transhume-vm"


class HostConfig(BaseModel):
    """The file `host.json` in the state folder, readable by root alone: it holds the host's secret.

    A host whose `controller_address` is empty carries the controller itself.
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    state_dir: Path
    address: str
    port: int = DEFAULT_PORT
    secret: str
    controller_address: str = ""
    controller_port: int = DEFAULT_PORT
    vm_user: str = DEFAULT_VM_USER

    @property
    def carries_controller(self) -> bool:
        return not self.controller_address

    @property
    def api_socket(self) -> Path:
        """Where this machine's daemon answers local commands; root alone may connect."""
        return self.state_dir / "api.sock"

    @property
    def store_file(self) -> Path:
        return self.state_dir / "farm.sqlite"

    @property
    def vms_dir(self) -> Path:
        return self.state_dir / "vms"

    @property
    def migrations_dir(self) -> Path:
        return self.state_dir / "migrations"
