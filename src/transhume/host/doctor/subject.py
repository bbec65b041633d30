"""What is examined: a server that is to be a host, or is one already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Subject:
    """`address` and `port` are where its daemon would answer; an empty address means all of its addresses.

    `controller` is where the farm is that it would join. `daemon_runs`: it is a host, and its daemon holds
    the port. `try_kvm`: run a guest under KVM even where KVM will not be used.
    """

    state_dir: Path
    vm_user: str
    port: int
    address: str = ""
    controller: tuple[str, int] | None = None
    daemon_runs: bool = False
    try_kvm: bool = False
