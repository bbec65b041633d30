"""The release before this one, as a tree of its own that daemons can be started from.

The newest tag `v*` that is not this very commit counts. Before the first release there is none: then the last
commit stands for it, so that what plays two trees against each other is itself always tried.
"""

from __future__ import annotations

import compileall
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUFFIX = "+previous"
"""Added to the version of the unpacked tree: so whoever answers tells which tree it was started from."""


@dataclass(frozen=True)
class PreviousRelease:
    """`name` is a tag, or the last commit. `sources` is what its PYTHONPATH must be."""

    name: str
    sources: Path

    @property
    def is_released(self) -> bool:
        return self.name.startswith("v")


def unpack(folder: Path) -> PreviousRelease | None:
    """Put the previous release into `folder`; None where this tree has no history to take it from."""
    name = _name()
    if name is None:
        return None
    archive = _git("archive", "--format=tar", name, "src")
    assert archive is not None, f"git has no tree for {name}"
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True, timeout=60)
    sources = folder / "src"
    with (sources / "transhume/__init__.py").open("a") as file:
        file.write(f'\n__version__ += "{SUFFIX}"\n')
    # Or each of its movers would translate all that it imports anew, next to a moving VM.
    compileall.compile_dir(sources, quiet=2)
    return PreviousRelease(name, sources)


def _name() -> str | None:
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    tags = (_git("tag", "--list", "v*", "--merged", "HEAD", "--sort=-v:refname") or b"").decode().split()
    for tag in tags:
        if _git("rev-parse", f"{tag}^{{commit}}") != head:
            return tag
    return head.decode().strip()


def _git(*words: str) -> bytes | None:
    """What git printed; None when it failed or is not there."""
    try:
        # The tree may belong to another user than root, who runs the tests.
        done = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *words],
            capture_output=True,
            check=False,
            timeout=60,
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
