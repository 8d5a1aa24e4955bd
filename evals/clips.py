"""Measure how many samples of the dense model a codec needs, how long and how large.

    python -m evals.clips --out evals/results/clips.jsonl --picture docs/images/clips.png

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
from typing import Annotated, Any

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
from vmla_convert.report.plots import Chart, Line, Panel, draw_chart
from vmla_convert.results import Metric, Row, put_rows, read_rows

COUNTS = (1, 2, 4, 8, 16, 24, 48, 96)
LENGTHS = (4, 6, 10, 20)
SIDES = (6, 8, 12)
FRAMES, SIDE, COUNT = 10, 12, 24
"""The demo model's window and latent size, and the number of clips of the other two series."""
BYTES = (16.3, 31.5)
COLOURS = dict(zip(BYTES, ("#D55E00", "#0072B2"), strict=True))
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
    picture: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    drawn: Annotated[bool, typer.Option("--drawn", help="Draw rows that exist.")] = False,
) -> None:
    """Fit codecs to samples of the demo model, and measure each on held-out clips."""
    if not drawn:
        put_rows(rows_file, _measured(seeds))
    rows = read_rows(rows_file)
    _show(rows)
    if picture:
        draw_chart(_chart(rows)).savefig(picture)


def _measured(seeds: int) -> list[Row]:
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
    return rows


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


def _chart(rows: list[Row]) -> Chart:
    """Error over the number, the length and the side of samples; the world's clips dashed."""
    whole, own = f"{SIDE}x{SIDE}", [row for row in rows if row.run != "world"]
    series = {
        "Number of clips": {
            (row.run, FRAMES, whole): float(row.run.split()[0])
            for row in own
            if (row.frames, row.note) == (FRAMES, whole)
        },
        "Latent frames of a clip": {
            (row.run, row.frames, whole): float(row.frames or 0)
            for row in own
            if row.run == f"{COUNT} clips" and row.note == whole
        },
        "Side of a latent frame": {
            (row.run, FRAMES, row.note): float((row.note or "").split("x")[0])
            for row in own
            if row.run == f"{COUNT} clips" and row.frames == FRAMES
        },
    }
    return [
        Panel(
            name,
            "median of seeds; dashed: clips of the world",
            name.lower(),
            "velocity error",
            [line for size, colour in COLOURS.items() for line in _lines(rows, keys, size, colour)],
            xscale="log",
            yscale="log",
        )
        for name, keys in series.items()
    ]


def _lines(rows: list[Row], keys: dict[Any, float], size: float, colour: str) -> list[Line]:
    points = sorted((x, median(_values(rows, key, size))) for key, x in keys.items())
    xs, ys = [x for x, _ in points], [y for _, y in points]
    world = median(_values(rows, ("world", FRAMES, f"{SIDE}x{SIDE}"), size))
    name = f"{size:g} bytes"
    return [
        Line(name, colour, xs, ys, marker="o"),
        Line(f"{name}, world", colour, [xs[0], xs[-1]], [world] * 2, named=False, dash="--"),
    ]


def _values(rows: list[Row], key: tuple[str, int | None, str | None], size: float) -> list[float]:
    return [
        row.value
        for row in rows
        if (row.run, row.frames, row.note, row.bytes_per_token) == (*key, size)
    ]


if __name__ == "__main__":
    typer.run(main)
