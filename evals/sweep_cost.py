"""What many ranks of one sweep cost before recovery, beside one conversion.

    python -m evals.sweep_cost --out rows.jsonl [--checkpoint demo]

Side by side in one run: one conversion, a sweep of eight cuts that shares what can be shared, and
the eight conversions one after the other. `seconds_ratio` is over one conversion, the median of the
repeats. Calibration is most of it, so ratios of what comes after are told apart.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import typer

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import ConvertConfig
from vmla_convert.console import out
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines.load import load
from vmla_convert.pipelines.shelf import MemoryShelf
from vmla_convert.pipelines.sweep.shared import Shared
from vmla_convert.results import Row, append_rows

CUTS = (0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.94, 0.96)
Seconds = tuple[float, float]
"""Of calibration, and of what comes after."""


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="The dense checkpoint, or 'demo'.")] = "demo",
    repeats: Annotated[int, typer.Option(min=1, help="Of each way, in turns.")] = 3,
) -> None:
    """Measure, append the rows and print them."""
    teacher, conversions = load(checkpoint), [ConvertConfig(cut=cut) for cut in CUTS]
    rows = _rows([_round(teacher, conversions) for _ in range(repeats)])
    append_rows(rows_file, rows)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Cost of a sweep before recovery", ["run", "metric", "value", "unit"], cells)


def _round(teacher: CausalWanModel, conversions: list[ConvertConfig]) -> dict[str, Seconds]:
    """One conversion, all shared, and all one by one."""
    one = _prepared(teacher, conversions[len(conversions) // 2 :][:1])
    shared = _prepared(teacher, conversions)
    apart = [_prepared(teacher, [each]) for each in conversions]
    first, second = (sum(parts) for parts in zip(*apart, strict=True))
    return {"one": one, "shared": shared, "one by one": (first, second)}


def _prepared(teacher: CausalWanModel, conversions: list[ConvertConfig]) -> Seconds:
    shared = Shared(teacher, conversions[0], conversions, MemoryShelf())
    started = perf_counter()
    shared.measure()
    measured = perf_counter()
    shared.convert()
    return measured - started, perf_counter() - measured


def _rows(rounds: list[dict[str, Seconds]]) -> list[Row]:
    rows: list[Row] = []
    for way in ("one", "shared", "one by one"):
        run = "1 size" if way == "one" else f"{len(CUTS)} sizes {way}"
        whole = median(sum(each[way]) for each in rounds)
        ratio = median(sum(each[way]) / sum(each["one"]) for each in rounds)
        after = median(each[way][1] / each["one"][1] for each in rounds)
        rows += [
            Row("convert_seconds", whole, "s", run),
            Row("seconds_ratio", ratio, "of one conversion", run),
            Row("seconds_ratio", after, "of one conversion, calibration aside", run),
        ]
    return rows


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
