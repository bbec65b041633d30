"""Transhume: live migration and farm management for Linux servers running QEMU virtual machines."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client"]

if TYPE_CHECKING:
    from transhume.sdk import AsyncClient, Client


def __getattr__(name: str) -> Any:
    """The clients, when somebody asks for them: a mover must not load what they need."""
    if name in __all__:
        from transhume import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
