"""Convert a checkpoint of a true size: how long it takes, and how much memory.

    python -m evals.scale --size 1.3b|14b --init spectral|calibrated --out rows.jsonl

Writes a checkpoint of random weights in the released form of that size (1.3B: a float32 `.pt` as
Self-Forcing's; 14B: bf16 shards as Wan's), converts it by the command that users run, in a process
of its own, and appends `convert_seconds` (the whole command), `peak_rss_bytes` and the seconds of
each stage. Then it factors two layers side by side: `factor_seconds` and `truncation_error` of
`ours`, of `torch.linalg.svd` as it is called plainly (`full_svd`), without the vectors that no rank
needs (`thin_svd`), and that in float32. Nothing about quality can be learned from it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.checkpoint.families import open_checkpoint
from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import Geometry
from vmla_convert.console import out
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.maths.factor import INITS
from vmla_convert.maths.spectra import truncate
from vmla_convert.pipelines.factoring import layer_weights
from vmla_convert.results import Row, append_rows

SIZES = {
    "1.3b": Geometry(1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    "14b": Geometry(5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16),
}
# Two clips of three chunks of three frames at a quarter of the deployed area, and one held out.
CLIPS, FRAMES, LATENT_SIZE = 2, 9, (30, 52)
LAYERS_SIDE_BY_SIDE, REPEATS = 2, 5


def main(
    size: Annotated[str, typer.Option(help="1.3b or 14b.")],
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    init: Annotated[str, typer.Option(help="spectral or calibrated.")] = "spectral",
    folder: Annotated[
        Path | None, typer.Option(help="Where the random checkpoint is written, and kept.")
    ] = None,
) -> None:
    """Measure, append the rows and print them."""
    if size not in SIZES:
        raise ConfigError(f"no size '{size}'", did_you_mean(size, SIZES))
    if init not in INITS:
        raise ConfigError(f"no init '{init}'", did_you_mean(init, INITS))
    geometry = SIZES[size]
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        source = write_source(place, size, geometry)
        run = f"{size} {init}"
        rows = converted_rows(source, place, geometry, init, run)
        rows += side_by_side(source, geometry, run)
    append_rows(rows_file, rows)
    cells = [[r.run, r.metric, "" if r.layer is None else r.layer, r.value, r.unit] for r in rows]
    out.table("Scale", ["run", "metric", "layer", "value", "unit"], cells)


def write_source(place: Path, size: str, geometry: Geometry) -> Path:
    """The random checkpoint; one that is there is taken."""
    shapes = native_shapes(geometry)
    source = place / (f"{size}.pt" if size == "1.3b" else size)
    if source.exists():
        return source
    with out.progress() as progress:
        names = progress.track(shapes, f"writing {source.name}")
        if size == "1.3b":
            state = {f"model.{name}": random_weight(name, shapes[name]) for name in names}
            partial = source.with_suffix(".partial")
            torch.save({"generator_ema": state}, partial)
            return partial.rename(source)
        specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
        with CheckpointWriter(source, specs) as writer:
            for name in names:
                writer.add(name, random_weight(name, shapes[name]).bfloat16())
    return source


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal, of a size that keeps signals about theirs; gains near one, biases small."""
    if name.endswith(".bias") or len(shape) == 1 or "modulation" in name:
        return 0.02 * torch.randn(shape) + float("norm" in name and name.endswith("weight"))
    return torch.randn(shape) * prod(shape[1:]) ** -0.5


def converted_rows(source: Path, place: Path, geometry: Geometry, init: str, run: str) -> list[Row]:
    """Convert by the command line, and read what it cost."""
    target, clips = place / "converted", place / "clips.safetensors"
    command = [sys.executable, "-m", "vmla_convert", "convert", str(source), "-o", str(target)]
    command += ["--init", init]
    if init == "calibrated":
        write_clips(clips, geometry)
        command += ["--data", str(clips), "--calibration-clips", str(CLIPS)]
    started = perf_counter()
    subprocess.run(command, check=True)
    seconds = perf_counter() - started
    told: dict[str, Any] = json.loads((target / "conversion.json").read_text())
    shutil.rmtree(target)
    rows = [
        Row("convert_seconds", seconds, "s", run, init=init),
        Row("peak_rss_bytes", told["peak_rss_bytes"], "bytes", run, init=init),
        Row("factor_seconds", told["factor_seconds"], "s", run, init=init),
    ]
    for stage, spent in told["stage_seconds"].items():
        rows.append(Row("stage_seconds", spent, "s", f"{run}, {stage}", init=init))
    return rows


def write_clips(file: Path, geometry: Geometry) -> None:
    """Noise in place of latents and prompts."""
    latents = torch.randn(CLIPS + 1, FRAMES, geometry.in_dim, *LATENT_SIZE)
    context = torch.randn(CLIPS + 1, geometry.text_len, geometry.text_dim)
    save_file({"latents": latents, "context": context}, file)


def side_by_side(source: Path, geometry: Geometry, run: str) -> list[Row]:
    """Our factorisation of joint weights against a full SVD of them, layer by layer."""
    checkpoint, rank = open_checkpoint(source), geometry.dim // 8
    rows: list[Row] = []
    for layer in range(LAYERS_SIDE_BY_SIDE):
        weights = layer_weights(checkpoint.read, layer, geometry.num_heads)
        joint = torch.cat([weights.key, weights.value])
        ways = {"ours": truncate, "full_svd": full_svd, "thin_svd": thin_svd}
        ways["thin_svd_float32"] = thin_svd_float32
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS if geometry.dim < 4096 else 1):
            for name, way in ways.items():
                spent[name].append(timed(way, joint, rank))
        for name, way in ways.items():
            up, down = way(joint, rank)
            error = (joint - up.double() @ down.double()).norm() / joint.norm()
            label = f"{run}, {name}" if name == "ours" else name
            rows.append(Row("factor_seconds", median(spent[name]), "s", label, layer=layer))
            rows.append(Row("truncation_error", error.item(), "relative", label, layer=layer))
        for name in ("full_svd", "thin_svd", "thin_svd_float32"):
            faster = median(spent[name]) / median(spent["ours"])
            rows.append(Row("seconds_ratio", faster, "over ours", name, layer=layer))
    return rows


def full_svd(joint: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As it is called plainly, with more left vectors than any rank needs."""
    return thin_svd(joint, rank, full_matrices=True)


def thin_svd(joint: Tensor, rank: int, full_matrices: bool = False) -> tuple[Tensor, Tensor]:
    left, singular, right = torch.linalg.svd(joint, full_matrices=full_matrices)
    return left[:, :rank] * singular[:rank], right[:rank]


def thin_svd_float32(joint: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return thin_svd(joint.float(), rank)


def timed(way: Callable[[Tensor, int], object], joint: Tensor, rank: int) -> float:
    started = perf_counter()
    way(joint, rank)
    return perf_counter() - started


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
