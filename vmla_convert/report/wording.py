"""Numbers as text, formatted alike in every table, sentence and plot."""

from __future__ import annotations

import math

ABSENT = "–"
GIGABYTE, MEGABYTE = 1e9, 1e6


def format_number(value: float | None) -> str:
    """Three significant digits; whole numbers in full."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "diverged"
    if value == round(value):
        return str(round(value))
    return f"{value:.3g}" if abs(value) < 1000 else str(round(value))


def format_range(value: float | None, spread: tuple[float, float] | None) -> str:
    """A median, with the least and the greatest value over seeds where the two differ."""
    text = format_number(value)
    if spread is None or spread[0] == spread[1]:
        return text
    return f"{text} ({format_number(spread[0])} to {format_number(spread[1])})"


def format_cut(cut: float | None) -> str:
    """A share as a percentage with one decimal."""
    return ABSENT if cut is None else f"{100 * cut:.1f} %"


def format_excess(share: float | None) -> str:
    """Flow loss above dense, signed; one decimal below 10 %."""
    if share is None or not math.isfinite(share):
        return format_number(share)
    percent = 100 * share
    return f"{percent:+.1f} %" if abs(percent) < 10 else f"{percent:+.0f} %"


def format_seconds(seconds: float | None) -> str:
    """A short time in seconds or milliseconds."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def format_memory(nbytes: float | None) -> str:
    """Decimal megabytes, or gigabytes from one on."""
    if nbytes is None:
        return ABSENT
    if nbytes >= GIGABYTE:
        return f"{nbytes / GIGABYTE:.3g} GB"
    return f"{nbytes / MEGABYTE:.3g} MB"
