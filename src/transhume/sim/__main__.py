"""`python -m transhume.sim`: play many seeds, and show the story of each that goes wrong."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from transhume.sim.farm import Parts, SeedResult, SimFarm
from transhume.sim.mover import RuleTaken

MAX_SHOWN = 5
TELL_EACH_SEEDS = 10_000
"""How often a long run says that it goes on."""


def main(arguments: list[str] | None = None, parts: Parts | None = None) -> int:
    """Play the seeds of the command line; exit code 1 when one of them went wrong."""
    parser = argparse.ArgumentParser(prog="python -m transhume.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds to play (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--transcript", action="store_true", help="tell the story of every seed played")
    options = parser.parse_args(arguments)
    began_s = time.perf_counter()
    endings: Counter[str] = Counter()
    broken: list[SeedResult] = []
    rules: set[RuleTaken] = set()
    simulated_s = 0.0
    for seed in range(options.first, options.first + options.seeds):
        result = SimFarm(seed, parts, rules=rules).run()
        endings[result.ending] += 1
        simulated_s += result.simulated_s
        if result.violation:
            broken.append(result)
        played = seed + 1 - options.first
        if played % TELL_EACH_SEEDS == 0 and played < options.seeds:
            _print(f"{played} of {options.seeds} seeds, {len(broken)} went wrong")
        if options.transcript or (result.violation and len(broken) <= MAX_SHOWN):
            _tell(seed, parts)
    took_s = time.perf_counter() - began_s
    _print(
        f"{options.seeds} seeds from {options.first}, {simulated_s / 3600:.1f} simulated hours, "
        f"in {took_s:.1f} s ({options.seeds / max(took_s, 1e-9):.0f} seeds/s)"
    )
    _print(f"{len(rules)} pairs of state and event were met")
    _print(", ".join(f"{count} {ending}" for ending, count in sorted(endings.items())))
    for result in broken:
        _print(f"seed {result.seed}: {result.violation}")
    _print(f"{len(broken)} seeds went wrong" if broken else "no seed went wrong")
    return 1 if broken else 0


def _tell(seed: int, parts: Parts | None) -> None:
    transcript: list[str] = []
    SimFarm(seed, parts, transcript).run()
    _print(f"--- seed {seed} ---")
    for line in transcript:
        _print(line)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
