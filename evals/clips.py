"""Measure how many samples of the dense model a codec needs, how long and how large.

    python -m evals.clips --out evals/results/clips.jsonl

Codecs are fitted to sets of samples that differ in one respect, and measured on held-out clips of
the demo world at the model's own length and size, streamed. The row of `world` is a codec fitted to
clips of the demo world itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    MediaConfig,
    RuntimeConfig,
    Sizes,
)
from vmla_convert.console import out
from vmla_convert.fitting.calibrate import calibrate, model_blocks
from vmla_convert.fitting.codec import fit_model
from vmla_convert.generating.make_clips import Need, ready_clips
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import build, open_named
from vmla_convert.measuring.evaluate import HeldOut
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress
from vmla_convert.results import Metric, Row, put_rows

COUNTS = (1, 2, 4, 8, 16, 24, 48, 96)
LENGTHS = (4, 6, 10, 20)
SIDES = (6, 8, 12)
FRAMES, SIDE, COUNT = 10, 12, 24
"""The demo model's window and latent size, and the number of clips of the other two series."""
BYTES = (16.3, 31.5)
HELD_OUT_CLIPS = 24


@dataclass(frozen=True)
class Clips:
    """A set of calibration clips: how many, of how many frames, and the side of a latent frame."""

    source: str = "self"
    count: int = COUNT
    frames: int = FRAMES
    side: int = SIDE

    def data(self, seed: int) -> DataConfig:
        """The clips of a seed."""
        return DataConfig(self.source, self.frames, (self.side, self.side), seed=seed)


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
) -> None:
    """Fit codecs to samples of the demo model, and measure each on held-out clips."""
    dense = open_named("demo")
    teacher = build(dense)
    evaluate = EvaluateConfig(HELD_OUT_CLIPS, DataConfig("demo", seed=1))
    held_out = HeldOut(teacher, evaluate, streamed=True)
    rows: list[Row] = []
    with TemporaryDirectory() as folder, out.progress() as progress:
        media = MediaConfig(clips_dir=folder)
        for clips in progress.track(list(_grid()), "sets of clips"):
            for seed in range(seeds):
                need = Need(clips.data(seed), "train", clips.count)
                [ready] = ready_clips(dense, [need], media, progress)
                model = _fitted(teacher, ready, clips.count, progress)
                rows += [_row(model, held_out, clips, size, seed) for size in BYTES]
    put_rows(rows_file, rows)
    _show(rows)


def _grid() -> Iterator[Clips]:
    yield Clips("demo", 48)
    yield from (Clips(count=count) for count in COUNTS)
    yield from (Clips(frames=frames) for frames in LENGTHS if frames != FRAMES)
    yield from (Clips(side=side) for side in SIDES if side != SIDE)


def _fitted(
    teacher: CausalWanModel, data: DataConfig, count: int, progress: Progress
) -> CausalWanModel:
    statistics = calibrate(
        teacher, model_blocks(teacher), open_clips(data), count, progress=progress
    )
    return fit_model(teacher, ConvertConfig(dtype="float32"), statistics)


def _row(model: CausalWanModel, held_out: HeldOut, clips: Clips, size: float, seed: int) -> Row:
    error = held_out.measure(model, RuntimeConfig(Sizes(bytes_per_token=size))).velocity_error
    return Row(
        Metric.VELOCITY_ERROR,
        error,
        "relative",
        f"{clips.count} clips" if clips.source == "self" else "world",
        seed=seed,
        product="codec",
        bytes_per_token=size,
        frames=clips.frames,
        note=f"{clips.side}x{clips.side}",
    )


def _show(rows: list[Row]) -> None:
    sets = dict.fromkeys((row.run, row.frames, row.note) for row in rows)
    cells = [[*key, *(median(_values(rows, key, size)) for size in BYTES)] for key in sets]
    header = ["clips", "frames", "latent size", *(f"error at {size} bytes" for size in BYTES)]
    out.table("Codec by calibration clips, median over seeds", header, cells)


def _values(rows: list[Row], key: tuple[str, int | None, str | None], size: float) -> list[float]:
    return [
        row.value
        for row in rows
        if (row.run, row.frames, row.note, row.bytes_per_token) == (*key, size)
    ]


if __name__ == "__main__":
    typer.run(main)
