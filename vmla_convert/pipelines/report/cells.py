"""Tables of a report: cells as people read them, and the value that each is sorted by."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

WORDS = {"diverged": math.inf}
ABSENT_CELLS = {"", "–"}
# Only what can share a column with another unit needs its size; `%` or `dB` never do.
UNITS = {
    "": 1.0, "%": 1.0, "×": 1.0, "dB": 1.0, "steps": 1.0,
    "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
    "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0,
}  # fmt: skip
UNSIGNED = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
# A number, the end of its range or its spread, its unit, and a remark: `1.3 ± 0.2 GB (16+8)`.
NUMBER = re.compile(rf"([+-]?{UNSIGNED})(?:\s?[–±]\s?{UNSIGNED})?\s?([^\W\d]*|%|×)(?: \(.*\))?")


def is_absent(cell: str) -> bool:
    """Whether the cell says that there is no value."""
    return cell.strip() in ABSENT_CELLS


def cell_value(cell: str) -> float | None:
    """The number that a cell stands for, in the base unit.

    Args:
        cell: Such as `+14 %`, `6.04 GB`, `1.3 ± 0.2`, `24.7 (24)` or `diverged`, which is larger
            than every number.

    Returns:
        None when the cell is not a number.
    """
    text = cell.strip().replace("−", "-")
    if text in WORDS:
        return WORDS[text]
    match = NUMBER.fullmatch(text)
    if match is None or match[2] not in UNITS:
        return None
    return float(match[1]) * UNITS[match[2]]


def numeric_columns(table: Sequence[Sequence[str]]) -> list[bool]:
    """For each column, below its header, whether all cells that say something are numbers."""
    columns = [
        [cell_value(line[i]) for line in table[1:] if not is_absent(line[i])]
        for i in range(len(table[0]))
    ]
    return [bool(values) and None not in values for values in columns]


def markdown_table(table: Sequence[Sequence[str]], marked: int | None) -> str:
    """A table as Markdown; the marked line is bold."""
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in table]
    if marked is not None:
        lines[marked] = [f"**{cell}**" for cell in lines[marked]]
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


def html_table(table: Sequence[Sequence[str]], marked: int | None, label: str) -> str:
    """A table as HTML that the page's script can sort.

    Args:
        table: Lines of cells, the first of which is the header.
        marked: Index into `table` of the line that stands out.
        label: What the table is called by screen readers.
    """
    numeric = numeric_columns(table)
    head = "".join(
        f'<th scope="col"{_kind(is_number)}>{escape(cell)}</th>'
        for cell, is_number in zip(table[0], numeric, strict=True)
    )
    lines = [
        _html_line(cells, numeric, number == marked)
        for number, cells in enumerate(table[1:], start=1)
    ]
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0">\n<table>\n'
        f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n"
        "</table>\n</div>"
    )


def _html_line(cells: Sequence[str], numeric: Sequence[bool], marked: bool) -> str:
    parts: list[str] = []
    for i, (cell, is_number) in enumerate(zip(cells, numeric, strict=True)):
        tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
        attributes = scope + _kind(is_number) + _sort_key(cell, is_number)
        parts.append(f"<{tag}{attributes}>{escape(cell)}</{tag}>")
    start = '<tr aria-current="true">' if marked else "<tr>"
    return f"{start}{''.join(parts)}</tr>"


def _kind(is_number: bool) -> str:
    return ' data-kind="number"' if is_number else ""


def _sort_key(cell: str, is_number: bool) -> str:
    """The attribute that a cell is sorted by; a cell without a value has none, and comes last."""
    if is_absent(cell):
        return ""
    # JavaScript's name for what Python writes as inf.
    key = repr(cell_value(cell)).replace("inf", "Infinity") if is_number else cell
    return f' data-sort="{escape(key)}"'
