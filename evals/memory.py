"""What caches take, and what reading them takes for a moment, beside the formula.

    python -m evals.memory --shapes wan-1.3b|demo --out rows.jsonl

`cache_bytes` are the whole model's for B = 1 in bfloat16, allocated for one layer and multiplied;
with the unit `bytes, by formula` it is `ModelConfig.cache_bytes` of the same. `bytes_ratio` is the
dense cache's over this one's. `transient_bytes` is how far memory rises while one layer reads a
full window in float32 (resident set on a CPU, allocator on a GPU), its projections within; inputs,
cache and weights are there before.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import torch
import typer
from torch import Tensor

from evals.speed import PAPERS, SHAPES, Bench, Run, Shapes, Variant
from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import CachePolicy, ModelConfig, SamplerConfig
from vmla_convert.console import out
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.pipelines.load import compute_device
from vmla_convert.pipelines.rows import row_fields
from vmla_convert.results import Row, append_rows

TILES = (16, 64, 4096)
REPEATS = 3


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    shapes: Annotated[str, typer.Option(help="wan-1.3b or demo.")] = "wan-1.3b",
) -> None:
    """Measure, append the rows and print them."""
    if shapes not in SHAPES:
        raise ConfigError(f"no shapes '{shapes}'", did_you_mean(shapes, SHAPES))
    rows: list[Row] = []
    for window in SHAPES[shapes].windows:
        rows += cache_rows(SHAPES[shapes], window)
        rows += transient_rows(SHAPES[shapes], window)
    append_rows(rows_file, rows)
    names = ["run", "frames", "metric", "value", "unit"]
    cells = [["" if (v := getattr(row, n)) is None else v for n in names] for row in rows]
    out.table("Memory", names, cells)


def cache_rows(shapes: Shapes, window: int) -> list[Row]:
    """Bytes of caches, allocated and by formula."""
    dense = model_config(shapes, window)
    layers = shapes.geometry.num_layers
    rows: list[Row] = []
    for variant in (None, Variant("joint", PAPERS)):
        mla = variant.mla(shapes.geometry) if variant else None
        config = replace(dense, mla=mla)
        fields = {**row_fields(config), "frames": window}
        nbytes = layers * one_layer_bytes(config)
        formula, whole = config.cache_bytes(window), dense.cache_bytes(window)
        rows += [
            Row("cache_bytes", nbytes, "bytes", **fields),
            Row("cache_bytes", formula, "bytes, by formula", **fields),
            Row("bytes_ratio", whole / nbytes, "dense over this", **fields),
        ]
    return rows


def model_config(shapes: Shapes, window: int) -> ModelConfig:
    """The dense model of some shapes."""
    return ModelConfig(
        shapes.geometry,
        shapes.latent_size,
        shapes.chunk_frames,
        CachePolicy(window),
        SamplerConfig(),
    )


@torch.no_grad()
def one_layer_bytes(config: ModelConfig) -> int:
    """Bytes of a cache that is really allocated, for the first layer."""
    mla, geometry = config.mla, replace(config.geometry, num_layers=1)
    if mla is not None:
        mla = replace(
            mla,
            kv_lora_rank=mla.kv_lora_rank[:1],
            rope_pairs=mla.rope_pairs[:1],
            key_ranks=mla.key_ranks[:1],
        )
    with torch.device("meta"):
        model = CausalWanModel(replace(config, geometry=geometry, mla=mla)).bfloat16()
    return model.to_empty(device=compute_device()).new_cache(1).nbytes


@torch.no_grad()
def transient_rows(shapes: Shapes, window: int) -> list[Row]:
    """How far memory rises while a layer reads."""
    bench = Bench(shapes, window)
    cases = {"dense": bench.dense(rotated=True)}
    for tile in TILES:
        cases[f"tiles of {tile} MiB"] = bench.converted(
            Variant("joint", PAPERS, backend="materialised", tile_mib=tile)
        )
    cases["absorbed"] = bench.converted(Variant("joint", PAPERS, backend="absorbed"))
    rows: list[Row] = []
    for name, case in cases.items():
        risen = median(rise(case.run, bench.chunk) for _ in range(REPEATS))
        fields = {**case.fields, "run": name}
        rows.append(Row("transient_bytes", risen, "bytes", **fields))
    return rows


def rise(run: Run, chunk: Tensor) -> int:
    """Most bytes in use during a run, above those before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(chunk)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = psutil.Process().memory_info().rss
    run(chunk)
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(peak.split()[1]) * 1024 - before


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
