"""Whether two hosts reach the same folder: one leaves a mark there, the other looks for it.

A path alone proves nothing: each host may have a folder of its own under it.
"""

from __future__ import annotations

import os
from pathlib import Path

from transhume.model.orders import FolderFacts, FolderProbe, ProbeStep

MARK_PREFIX = ".transhume-"


def probe(order: FolderProbe) -> FolderFacts:
    """Carry out one step; what is against it comes back in words, with the room that is there."""
    folder = Path(order.path)
    mark = folder / f"{MARK_PREFIX}{order.mark}"
    try:
        if order.step is ProbeStep.LEAVE:
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        elif order.step is ProbeStep.REMOVE:
            mark.unlink(missing_ok=True)
        elif not mark.exists():
            if not folder.is_dir():
                return FolderFacts(obstacle=f"there is no folder {folder}")
            return FolderFacts(obstacle=f"{folder} is another folder there, not storage that both share")
        facts = os.statvfs(folder)
    except OSError as error:
        return FolderFacts(obstacle=f"folder {folder} cannot be used: {error.strerror}")
    return FolderFacts(available_bytes=facts.f_bavail * facts.f_frsize)
