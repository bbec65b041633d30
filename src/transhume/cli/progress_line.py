"""A migration under way as one line of text. Pure: what it shows comes in, and so does the width."""

from __future__ import annotations

from transhume.cli.tables import bytes_in_words, ms_in_words
from transhume.model.migration import Migration, Phase

_FULL, _EMPTY = "━", "─"
_BAR_CELLS = 20
_NARROW_BAR_CELLS = 8
_NARROW_COLUMNS = 110


def progress_line(record: Migration, width: int) -> str:
    """Bar, share, phase, bytes, rates, time left, downtime to expect and verdict, cut at `width`."""
    progress = record.progress
    cells = _NARROW_BAR_CELLS if width < _NARROW_COLUMNS else _BAR_CELLS
    if progress is None:
        return _cut(f"{record.vm} {bar(0.0, cells)}   0% {record.phase.value}", width)
    parts = [
        f"{record.vm} {bar(progress.fraction, cells)} {progress.fraction * 100:3.0f}%",
        _phase_in_words(record.phase, progress.iteration),
        bytes_in_words(progress.wire_bytes),
    ]
    if progress.rate_bytes_s is not None:
        parts.append(f"{bytes_in_words(progress.rate_bytes_s)}/s")
    if progress.dirty_rate_bytes_s is not None:
        parts.append(f"dirty {bytes_in_words(progress.dirty_rate_bytes_s)}/s")
    if progress.eta_s is not None:
        parts.append(f"ETA {progress.eta_s:.0f} s")
    if progress.predicted_downtime_ms is not None:
        parts.append(f"downtime ~{ms_in_words(progress.predicted_downtime_ms)}")
    if progress.verdict:
        parts.append(progress.verdict)
    return _cut("  ".join(parts), width)


def bar(fraction: float, cells: int) -> str:
    """`fraction` of `cells`, never more than all."""
    full = min(cells, int(max(0.0, fraction) * cells))
    return _FULL * full + _EMPTY * (cells - full)


def _phase_in_words(phase: Phase, iteration: int) -> str:
    return f"pre-copy {iteration}" if phase is Phase.PRECOPY else phase.value


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"
