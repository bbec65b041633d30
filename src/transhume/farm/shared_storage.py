"""Before a migration that keeps a safe copy: does the folder lie on storage that both hosts reach?"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from transhume.farm.host_link import HostLink
from transhume.model.errors import HostLost
from transhume.model.orders import FolderFacts, FolderProbe, ProbeStep


async def folder_reasons(
    path: str, needed_bytes: int, source: tuple[str, HostLink], others: Sequence[tuple[str, HostLink]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What is against a safe copy in `path`: for the source, and for each of the others.

    The source leaves a mark and takes it away again; nothing else changes.
    """
    mark = secrets.token_hex(8)
    name, link = source
    left = await _probe(link, FolderProbe(path=path, mark=mark, step=ProbeStep.LEAVE))
    if left.obstacle:
        return (f"host {name}: {left.obstacle}; name another with --safe",), [() for _ in others]
    try:
        found = await asyncio.gather(
            *(_probe(other, FolderProbe(path=path, mark=mark, step=ProbeStep.FIND)) for _, other in others)
        )
    finally:
        await _probe(link, FolderProbe(path=path, mark=mark, step=ProbeStep.REMOVE))
    against: list[tuple[str, ...]] = [
        (f"host {other}: {facts.obstacle}; name a folder on shared storage with --safe",)
        if facts.obstacle
        else ()
        for (other, _), facts in zip(others, found, strict=True)
    ]
    if left.available_bytes < needed_bytes:
        room = (
            f"folder {path} has room for {left.available_bytes >> 20} MiB, and the safe copy may need "
            f"{needed_bytes >> 20} MiB; make room, or name another with --safe"
        )
        return (room,), against
    return (), against


async def _probe(link: HostLink, order: FolderProbe) -> FolderFacts:
    try:
        return await link.probe_folder(order)
    except HostLost:
        return FolderFacts(obstacle="it does not answer")
