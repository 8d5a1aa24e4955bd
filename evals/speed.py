"""Time a denoising step of converted models beside the dense model, at equal window.

    python -m evals.speed --shapes wan-1.3b --out rows.jsonl

Models have the true width, few layers and random weights. Each denoises one chunk of one clip
while its cache is full. Every variant runs in turns with the dense model. Rows hold medians:
`step_seconds` is the time of a step, `seconds_ratio` the variant's time over the dense model's.

The dense model rotates cached keys at every step, like all models of this package. Programs that
cache rotated keys, such as Self-Forcing's own, save that work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import typer

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.config import (
    CachePolicy,
    ConvertConfig,
    Geometry,
    MLAConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.fitting.codec import fit_model
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import compute_device
from vmla_convert.measuring.timing import step_rows
from vmla_convert.results import Metric, Row, put_rows


class Shapes(NamedTuple):
    """Sizes to time: widths, size of a latent frame, frames of a chunk, and windows in frames."""

    geometry: Geometry
    latent_size: tuple[int, int]
    chunk_frames: int
    windows: tuple[int, ...]


SHAPES = {
    "wan-1.3b": Shapes(
        Geometry(1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
        latent_size=(60, 104),
        chunk_frames=3,
        windows=(7, 21),
    ),
    "demo": Shapes(
        Geometry(
            160,
            ffn_dim=640,
            num_heads=5,
            num_layers=6,
            in_dim=12,
            out_dim=12,
            freq_dim=128,
            text_dim=10,
            text_len=1,
        ),
        latent_size=(12, 12),
        chunk_frames=2,
        windows=(10,),
    ),
}

Latent = Literal["joint", "split"]
Kind = Literal["quantised", "codec", "mla"]
KINDS: tuple[Kind, ...] = ("quantised", "codec", "mla")
BACKENDS: tuple[Literal["materialised", "absorbed", "auto"], ...] = (
    "materialised",
    "absorbed",
    "auto",
)
DENSE_DTYPES: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
CODEC_CUTS = (0.95, 0.975)
# For Wan 1.3B: 192 + 32 numbers per token and layer (the paper), 96 + 32, split 96 + 96 + 32.
MLA_SIZES: tuple[tuple[Latent, float], ...] = (
    ("joint", 1 / 8),
    ("joint", 1 / 16),
    ("split", 1 / 8),
)


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    shapes: Annotated[str, typer.Option(help="wan-1.3b or demo.")] = "wan-1.3b",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the timed models.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of each variant.")] = 3,
    only: Annotated[Kind | None, typer.Option(help="Time variants of one kind.")] = None,
) -> None:
    """Time a denoising step of each variant beside the dense model, at equal window."""
    if shapes not in SHAPES:
        raise ConfigError(f"no shapes '{shapes}'", did_you_mean(shapes, SHAPES))
    rows: list[Row] = []
    kinds = KINDS if only is None else (only,)
    for window in SHAPES[shapes].windows:
        for timed in measure(SHAPES[shapes], window, layers, rounds, kinds):
            put_rows(rows_file, timed)  # one variant takes minutes
            rows += timed
    cells = [[r.run, r.backend or "", r.frames, r.metric, r.value, r.unit] for r in rows]
    out.table("Speed", ["run", "backend", "frames", "metric", "value", "unit"], cells)


def measure(
    shapes: Shapes, window: int, layers: int, rounds: int, kinds: Sequence[Kind] = KINDS
) -> Iterator[list[Row]]:
    """Rows of each variant at one window, the dense model's with the first."""
    torch.manual_seed(0)
    config = ModelConfig(
        replace(shapes.geometry, num_layers=layers),
        shapes.latent_size,
        shapes.chunk_frames,
        CachePolicy(window),
        SamplerConfig(),
    )
    device = compute_device()
    dense = CausalWanModel(config).to(device)
    for index, (model, runtime) in enumerate(variants(dense, kinds)):
        rows = step_rows(dense, model.to(device), runtime, rounds)
        backend = runtime.backend if model.config.mla else None
        yield [
            replace(row, frames=window, backend=None if row.run == "dense" else backend)
            for row in rows
            if index == 0 or (row.run, row.metric) != ("dense", Metric.STEP_SECONDS)
        ]


def variants(
    dense: CausalWanModel, kinds: Sequence[Kind]
) -> Iterator[tuple[CausalWanModel, RuntimeConfig]]:
    """Models and runtimes to time: quantised dense caches, codecs, MLA layers."""
    if "quantised" in kinds:
        for dtype in DENSE_DTYPES:
            yield dense, RuntimeConfig(cache_dtype=dtype)
    if "codec" in kinds:
        codec = fit_model(dense, ConvertConfig(calibrate=False))
        for cut in CODEC_CUTS:
            yield codec, RuntimeConfig(Sizes(cut=cut))
    if "mla" in kinds:
        for latent, share in MLA_SIZES:
            config = replace(dense.config, mla=mla_config(dense.config, latent, share))
            mla = CausalWanModel(config)
            for backend in BACKENDS:
                yield mla, RuntimeConfig(backend=backend)


def mla_config(model: ModelConfig, latent: Latent, share: float) -> MLAConfig:
    """Latents of a share of the width, and a rotary key of a quarter of a head's pairs."""
    geometry = model.geometry
    layers, rank = geometry.num_layers, round(geometry.dim * share)
    pairs = tuple(range(geometry.head_dim // 8))
    key_ranks = (rank // 2,) * layers if latent == "split" else ()
    return MLAConfig((rank,) * layers, (pairs,) * layers, "none", latent, key_ranks)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
