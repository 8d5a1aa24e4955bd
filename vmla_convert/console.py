"""The only file that prints: data to stdout, talk to stderr, for people or (`--json`) programs.

Commands use the one `out` below. With `--json` every piece of data is one JSON document on a line
of its own, and stdout holds nothing else. rich is imported where it is used, for a quick `--help`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from vmla_convert.errors import VmlaError
from vmla_convert.progress import Advance, Progress

if TYPE_CHECKING:
    import rich.console
    import rich.progress

# Where there is no terminal there is no edge to wrap at: a pipe wants one record per line.
_UNBOUNDED = 10_000


class Console:
    """Where a command's words go.

    Attributes:
        json: Whether data is written as JSON; each command sets it from its own `--json`.
    """

    def __init__(self, json: bool = False) -> None:
        self.json = json

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Data: a table; as JSON, its rows as objects keyed by the header.

        Numbers are rounded for people only, so cells had better be numbers than text.
        """
        cells = [[_plain(cell) for cell in row] for row in rows]
        if self.json:
            self._write_json([dict(zip(header, row, strict=True)) for row in cells])
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        if title:
            _print(sys.stdout, title, "", style="bold")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in header:
            table.add_column(Text(name))
        for row in cells:
            table.add_row(*(Text(_word(cell)) for cell in row))
        _rich(sys.stdout).print(table)

    def data(self, obj: Any) -> None:
        """Data: a mapping or dataclass; for people, a line per value with dotted keys."""
        obj = _plain(obj)
        if self.json:
            self._write_json(obj)
            return
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for key, value in _flatten(obj):
            grid.add_row(Text(key, style="bold"), Text(value))
        _rich(sys.stdout).print(grid)

    def path(self, label: str, path: Path | str) -> None:
        """Data: something that now lies at a path, such as `wrote: runs/a/report.md`."""
        if self.json:
            self._write_json({label: str(path)})
        else:
            _print(sys.stdout, f"{label}: ", str(path), style="bold")

    def say(self, text: str) -> None:
        """Talk: what the command is doing."""
        _print(sys.stderr, "", text)

    def fail(self, error: VmlaError) -> None:
        """Talk: why the command ends here, and what to try next."""
        _print(sys.stderr, "Error: ", error.message, style="bold red")
        if error.hint:
            _print(sys.stderr, "hint: ", error.hint, style="cyan")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on a terminal; elsewhere, such as in a log, one line per finished bar."""
        terminal = _rich(sys.stderr)
        if not terminal.is_interactive:
            yield _Lines(self)
            return
        from rich import progress

        bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=terminal,
            # rich would send captured stdout to the console of the bars, which is stderr.
            redirect_stdout=False,
        )
        with bars:
            yield _Bars(bars)

    def _write_json(self, obj: Any) -> None:
        sys.stdout.write(json.dumps(obj, ensure_ascii=False) + "\n")


out = Console()


class _Bars(Progress):
    """Progress drawn by rich. A bar inside another bar disappears when it ends."""

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars
        self._running: list[rich.progress.TaskID] = []

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        task = self._bars.add_task(label, total=total, note="")
        self._running.append(task)
        try:
            yield partial(self._bars.advance, task)
        finally:
            self._running.remove(task)
            self._bars.stop_task(task)
            if self._running:
                self._bars.remove_task(task)

    def note(self, text: str) -> None:
        if self._running:
            self._bars.update(self._running[-1], note=text)
        else:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Lines(Progress):
    """Progress for a log: a line per finished bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._notes: list[str] = []

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG002
        start, done, depth = monotonic(), list[int](), len(self._notes)
        self._notes.append("")
        try:
            yield done.append
            took = f"{label}: {sum(done)} in {_duration(monotonic() - start)}"
            self._console.say(", ".join(filter(None, (took, self._notes[depth]))))
        finally:
            del self._notes[depth:]

    def note(self, text: str) -> None:
        if self._notes:
            self._notes[-1] = text
        else:
            self._console.say(text)


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _rich(stream: Any) -> rich.console.Console:
    """A rich console on the stream as it is now: tests and shells replace it."""
    from rich.console import Console as RichConsole

    console = RichConsole(file=stream, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def _print(stream: Any, lead: str, text: str, style: str = "") -> None:
    from rich.text import Text

    # A Text, not a string: brackets in messages, as in `pip install "x[wan]"`, are not markup.
    _rich(stream).print(Text.assemble((lead, style), text), soft_wrap=True)


def _plain(obj: Any) -> Any:
    """A value as JSON has it: dataclasses and paths resolved, and null for what is not a number."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: _plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(item) for item in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if obj is None or isinstance(obj, str | int | float | bool):
        return obj
    return str(obj)


def _flatten(obj: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and readable values; a list of plain values stays on one line."""
    if isinstance(obj, dict):
        for name, value in obj.items():
            yield from _flatten(value, f"{key}.{name}" if key else name)
    elif isinstance(obj, list) and any(isinstance(item, dict | list) for item in obj):
        for index, item in enumerate(obj):
            yield from _flatten(item, f"{key}[{index}]")
    elif isinstance(obj, list):
        yield key, ", ".join(_word(item) for item in obj)
    else:
        yield key, _word(obj)


def _word(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
