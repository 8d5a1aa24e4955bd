"""Measure what checking hashes adds to the time of loading a checkpoint of a true size.

    python -m evals.verify_cost --out rows.jsonl [--rounds 9]

The program writes an MLA checkpoint of Wan 1.3B's size with random weights (2.7 GB of bfloat16) and
loads it again and again, with and without `verify`, in turns. A cold load comes after the file was
dropped from the page cache. The rows hold medians over rounds of three ratios: seconds of one load
against the other of the same round, their seconds of the processor, and, within one load, the
seconds of the check against all others. Other programs disturb the first most and the last least.
The rows name the load of the machine.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Annotated
from unittest.mock import patch

import torch
import typer

from evals.scale import SIZES, random_weight
from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.checkpoint import integrity
from vmla_convert.checkpoint.integrity import CONVERSION_NAME
from vmla_convert.checkpoint.layouts import NATIVE
from vmla_convert.checkpoint.settings import converted_config
from vmla_convert.checkpoint.source import weight_files
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import CachePolicy, MLAConfig, ModelConfig, SamplerConfig
from vmla_convert.console import out
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.results import Metric, Row, put_rows

GEOMETRY = SIZES["1.3b"]
# The sizes of the paper's 1.3B model.
RANK, PAIRS = 192, tuple(range(16))
MODEL = ModelConfig(
    GEOMETRY,
    latent_size=(60, 104),
    chunk_frames=3,
    cache=CachePolicy(window_frames=21, sink_frames=3),
    sampler=SamplerConfig(),
    mla=MLAConfig((RANK,) * GEOMETRY.num_layers, (PAIRS,) * GEOMETRY.num_layers, "random"),
)
CHECKSUM = integrity.checksum
# The quickest load, where a check weighs most; and the load of a first command on a CPU.
KINDS = ((torch.bfloat16, False), (torch.float32, True))


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to add rows to.")],
    rounds: Annotated[int, typer.Option(help="Loads of each kind.")] = 9,
    folder: Annotated[
        Path | None, typer.Option(help="Folder that keeps the random checkpoint.")
    ] = None,
) -> None:
    """Measure, add the rows and print them."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = (folder or Path(temporary)) / "1.3b-mla"
        if not checkpoint.exists():
            write_random(checkpoint)
        rows = [row for dtype, cold in KINDS for row in compared(checkpoint, dtype, cold, rounds)]
    put_rows(rows_file, rows)
    cells = [[row.run, row.metric, f"{row.value:.3f}", row.unit, row.note or ""] for row in rows]
    out.table("Cost of verification", ["run", "metric", "value", "unit", "note"], cells)


def write_random(checkpoint: Path) -> None:
    """Write the checkpoint with its hashes."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalWanModel(MODEL).state_dict().items()}
    weights = {name: random_weight(name, tuple(s)).bfloat16() for name, s in shapes.items()}
    files = {"config.json": converted_config(MODEL), CONVERSION_NAME: {"source": {}}}
    write_checkpoint(checkpoint, weights, files, NATIVE)


def compared(checkpoint: Path, dtype: torch.dtype, cold: bool, rounds: int) -> list[Row]:
    """Seconds of loads with and without a check, and their ratios, as medians."""
    spent: dict[bool, list[Spent]] = {True: [], False: []}
    timed(checkpoint, dtype, True, cold)  # imports, and memory that the process has from now on
    for number in range(rounds):
        # Neither kind always comes first.
        for verify in (number % 2 == 0, number % 2 == 1):
            spent[verify].append(timed(checkpoint, dtype, verify, cold))
    run = f"{'cold' if cold else 'warm'} load, {str(dtype).removeprefix('torch.')}"
    note = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {rounds} rounds"
    rows = [
        Row(Metric.STAGE_SECONDS, median(each.wall for each in spent[verify]), "s", name, note=note)
        for verify, name in ((True, f"{run}, verified"), (False, f"{run}, not verified"))
    ]
    pairs = list(zip(spent[True], spent[False], strict=True))
    ratios = {
        "verified / not verified": [one.wall / other.wall for one, other in pairs],
        "the same, CPU seconds": [one.processor / other.processor for one, other in pairs],
        "whole load / load without its check": [
            each.wall / (each.wall - each.check) for each in spent[True]
        ],
    }
    return rows + [
        Row(Metric.SECONDS_RATIO, median(values), unit, run, note=note)
        for unit, values in ratios.items()
    ]


@dataclass
class Spent:
    """Seconds of one load.

    Attributes:
        wall: Seconds of the load.
        processor: Seconds of the processor.
        check: Seconds of the load in which tensors were compared with their checksums.
    """

    wall: float = 0.0
    processor: float = 0.0
    check: float = 0.0


def timed(checkpoint: Path, dtype: torch.dtype, verify: bool, cold: bool) -> Spent:
    """Time one load."""
    gc.collect()
    for file in weight_files(checkpoint):
        drop(file) if cold else file.read_bytes()
    spent = Spent()

    def checksum(tensor: torch.Tensor) -> str:
        started = perf_counter()
        found = CHECKSUM(tensor)
        spent.check += perf_counter() - started
        return found

    started, worked = perf_counter(), process_time()
    with patch.object(integrity, "checksum", checksum):
        load(checkpoint, dtype=dtype, verify=verify)
    spent.wall, spent.processor = perf_counter() - started, process_time() - worked
    # A checkpoint without checksums would make both kinds of load the same.
    assert (spent.check > 0) == verify, f"{checkpoint} has no checksums: remove it"
    return spent


def drop(file: Path) -> None:
    """Drop a file from the page cache of the system."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
