"""Measure the time and memory of converting a checkpoint of a true size.

    python -m evals.scale 1.3b|14b --conversion assumed|calibrated|mla --out rows.jsonl

The program writes a checkpoint of random weights in the released form of that size (1.3B: a float32
`.pt` like Self-Forcing's; 14B: bf16 shards like Wan's). Then it runs `vmla convert` in another
process, into a codec without data (`assumed`), a calibrated codec, or the paper's MLA layers. It
appends `convert_seconds` (the whole command), `peak_rss_bytes`, `written_bytes` (the whole output
folder) and the seconds of each stage. Random weights say nothing about quality.
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
from vmla_convert.results import Metric, Row, put_rows

SIZES = {
    "1.3b": Geometry(1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16),
    "14b": Geometry(5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16),
}
# Two clips of three chunks of three latent frames, at a quarter of the deployed area.
CLIPS, FRAMES, LATENT_SIZE = 2, 9, (30, 52)
CONVERSIONS = {
    "assumed": ["--no-calibration"],
    "calibrated": [],
    "mla": ["--preset", "videomla"],
}


def main(
    size: Annotated[str, typer.Argument(help="1.3b or 14b.")],
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    conversion: Annotated[str, typer.Option(help="assumed, calibrated or mla.")] = "assumed",
    folder: Annotated[
        Path | None, typer.Option(help="Folder that keeps the random checkpoint.")
    ] = None,
) -> None:
    """Measure, append the rows and print them."""
    if size not in SIZES:
        raise ConfigError(f"no size '{size}'", did_you_mean(size, SIZES))
    if conversion not in CONVERSIONS:
        raise ConfigError(f"no conversion '{conversion}'", did_you_mean(conversion, CONVERSIONS))
    geometry = SIZES[size]
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        source = write_source(place, size, geometry)
        rows = converted_rows(source, place, geometry, conversion, f"{size} {conversion}")
    put_rows(rows_file, rows)
    cells = [[row.run, row.metric, row.value, row.unit] for row in rows]
    out.table("Scale", ["run", "metric", "value", "unit"], cells)


def write_source(place: Path, size: str, geometry: Geometry) -> Path:
    """Write the random checkpoint, unless an earlier run kept it."""
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
    """Normal numbers that keep the size of signals; gains are near one, biases small."""
    if name.endswith(".bias") or len(shape) == 1 or "modulation" in name:
        return 0.02 * torch.randn(shape) + float("norm" in name and name.endswith("weight"))
    return torch.randn(shape) * prod(shape[1:]) ** -0.5


def converted_rows(
    source: Path, place: Path, geometry: Geometry, conversion: str, run: str
) -> list[Row]:
    """Convert on the command line, and return what the conversion cost."""
    target, clips = place / "converted", place / "clips.safetensors"
    command = [sys.executable, "-m", "vmla_convert", "convert", str(source), "-o", str(target)]
    command += CONVERSIONS[conversion]
    if conversion == "calibrated":
        write_clips(clips, geometry)
        command += ["--data", str(clips), "--set", f"convert.calibration_clips={CLIPS}"]
    started = perf_counter()
    subprocess.run(command, check=True)
    seconds = perf_counter() - started
    record: dict[str, Any] = json.loads((target / "conversion.json").read_text())
    written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    shutil.rmtree(target)
    rows = [
        Row(Metric.CONVERT_SECONDS, seconds, "s", run),
        Row(Metric.PEAK_RSS_BYTES, record["peak_rss_bytes"], "bytes", run),
        Row(Metric.WRITTEN_BYTES, written, "bytes", run),
        Row(Metric.FACTOR_SECONDS, record["factor_seconds"], "s", run),
    ]
    for stage, spent in record["stage_seconds"].items():
        rows.append(Row(Metric.STAGE_SECONDS, spent, "s", f"{run}, {stage}"))
    return rows


def write_clips(file: Path, geometry: Geometry) -> None:
    """Write noise in place of latents and prompts: calibration clips and one held-out clip."""
    latents = torch.randn(CLIPS + 1, FRAMES, geometry.in_dim, *LATENT_SIZE)
    context = torch.randn(CLIPS + 1, geometry.text_len, geometry.text_dim)
    save_file({"latents": latents, "context": context}, file)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
