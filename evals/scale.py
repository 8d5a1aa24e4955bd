"""Convert a checkpoint of a true size: how long it takes, and how much memory.

    python -m evals.scale --size 1.3b|14b --way assumed|calibrated|mla --out rows.jsonl

Writes a checkpoint of random weights in the released form of that size (1.3B: a float32 `.pt` as
Self-Forcing's; 14B: bf16 shards as Wan's) and converts it by the command that users run, in a
process of its own: into a codec without data (`assumed`), into a calibrated codec, or into the
paper's MLA layers. Appends `convert_seconds` (the whole command), `peak_rss_bytes`, `written_bytes`
(all that the folder holds) and the seconds of each stage. Nothing about quality can be learned from
it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.checkpoint.geometry import native_shapes
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.checkpoint.writer import CheckpointWriter
from vmla_convert.config import Geometry
from vmla_convert.console import out
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.results import Metric, Row, append_rows

SIZES = {
    "1.3b": Geometry(1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    "14b": Geometry(5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16),
}
# Two clips of three chunks of three frames at a quarter of the deployed area, and one held out.
CLIPS, FRAMES, LATENT_SIZE = 2, 9, (30, 52)
WAYS = {
    "assumed": ["--no-calibration"],
    "calibrated": [],
    "mla": ["--preset", "videomla"],
}


def main(
    size: Annotated[str, typer.Option(help="1.3b or 14b.")],
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL to append rows to.")],
    way: Annotated[str, typer.Option(help="assumed, calibrated or mla.")] = "assumed",
    folder: Annotated[
        Path | None, typer.Option(help="Where the random checkpoint is written, and kept.")
    ] = None,
) -> None:
    """Measure, append the rows and print them."""
    if size not in SIZES:
        raise ConfigError(f"no size '{size}'", did_you_mean(size, SIZES))
    if way not in WAYS:
        raise ConfigError(f"no way '{way}'", did_you_mean(way, WAYS))
    geometry = SIZES[size]
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        source = write_source(place, size, geometry)
        rows = converted_rows(source, place, geometry, way, f"{size} {way}")
    append_rows(rows_file, rows)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Scale", ["run", "metric", "value", "unit"], cells)


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


def converted_rows(source: Path, place: Path, geometry: Geometry, way: str, run: str) -> list[Row]:
    """Convert by the command line, and read what it cost."""
    target, clips = place / "converted", place / "clips.safetensors"
    command = [sys.executable, "-m", "vmla_convert", "convert", str(source), "-o", str(target)]
    command += WAYS[way]
    if way == "calibrated":
        write_clips(clips, geometry)
        command += ["--data", str(clips), "--set", f"convert.calibration_clips={CLIPS}"]
    started = perf_counter()
    subprocess.run(command, check=True)
    seconds = perf_counter() - started
    told: dict[str, Any] = json.loads((target / "conversion.json").read_text())
    written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    shutil.rmtree(target)
    rows = [
        Row(Metric.CONVERT_SECONDS, seconds, "s", run),
        Row(Metric.PEAK_RSS_BYTES, told["peak_rss_bytes"], "bytes", run),
        Row(Metric.WRITTEN_BYTES, written, "bytes", run),
        Row(Metric.FACTOR_SECONDS, told["factor_seconds"], "s", run),
    ]
    for stage, spent in told["stage_seconds"].items():
        rows.append(Row(Metric.STAGE_SECONDS, spent, "s", f"{run}, {stage}"))
    return rows


def write_clips(file: Path, geometry: Geometry) -> None:
    """Noise in place of latents and prompts."""
    latents = torch.randn(CLIPS + 1, FRAMES, geometry.in_dim, *LATENT_SIZE)
    context = torch.randn(CLIPS + 1, geometry.text_len, geometry.text_dim)
    save_file({"latents": latents, "context": context}, file)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
