"""What the tests of installing share: programs that are run to their end, and this tree's own files."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0


def run(*command: str | Path) -> str:
    """What a program printed. It must end well; otherwise all that it said is told."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=LIMIT_S,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "COLUMNS": "200", "NO_COLOR": "1", "HOME": "/root"},
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def own_files() -> set[str]:
    """Every file of the package in this tree, as paths that begin with `transhume/`."""
    sources = ROOT / "src"
    return {
        str(path.relative_to(sources))
        for path in (sources / "transhume").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
