"""Measure which places a model remembers, at equal bytes of cache.

    python -m evals.memory_for_bytes --out evals/results/memory_for_bytes.jsonl \
        --picture docs/images/memory_for_bytes.png

The model of the photograph world samples chunks after true pasts, so nothing drifts. Every sampled
pixel shows a place that was last seen some frames ago, or never. `revisit_psnr` is the PSNR of the
pixels of one range of ages against the truth, over all clips. Dense caches with short windows stand
beside codecs with the whole window.

Shapes: B clips, F frames, N pixels on a side of a frame.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from evals.codec import fitted
from evals.worlds.photographs import PhotographClips, ages, decode, encode
from evals.worlds.train import CONFIG
from evals.worlds.worlds import TEACHER
from vmla_convert.config import ConvertConfig, RuntimeConfig, Sizes
from vmla_convert.console import out
from vmla_convert.generating.rollout import write_clean
from vmla_convert.generating.sampler import denoise
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.measuring.rows import row_fields
from vmla_convert.media.clips import seeded
from vmla_convert.progress import Progress
from vmla_convert.report.plots import Chart, Line, Panel, draw_chart
from vmla_convert.results import Metric, Row, put_rows, read_rows

CLIPS, AT_ONCE = 32, 8
PAST_FRAMES, SAMPLED_FRAMES = 48, 9
AGES = (1, 4, 7, 13, 25, 49)
"""First age of each range; the last range is open."""
OLD = 7
"""Pixels of this age or older are summed up as old."""
CALIBRATION_CLIPS = 24
ALL_OLD = "all old"
COLOURS = ("#595959", "#E69F00", "#0072B2", "#D55E00")
DENSE_TOKEN_BYTES = CONFIG.geometry.dense_token_bytes


class Memory(NamedTuple):
    """A cache to measure: its window and how it stores a token."""

    window_frames: int
    runtime: RuntimeConfig | None = None

    @property
    def is_codec(self) -> bool:
        """Whether the cache is a codec's."""
        return self.runtime is not None and self.runtime.size is not None


def codec_memory(window: int, frames: float) -> Memory:
    """A codec with a window, in the bytes of a dense cache of `frames` frames at a window of 48."""
    return Memory(window, RuntimeConfig(Sizes(cut=1 - frames / 48)))


MEMORIES = (
    *(Memory(window) for window in (4, 6, 7, 13, 25, 48)),
    *(Memory(48, RuntimeConfig(cache_dtype=dtype)) for dtype in ("int4", "int2")),
    *(codec_memory(48, frames) for frames in (1, 2, 4, 7)),
    codec_memory(25, 2),
)


def main(
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    checkpoint: Annotated[str, typer.Option(help="Model of the photograph world.")] = str(TEACHER),
    clips: Annotated[int, typer.Option(min=1, help="Number of held-out clips.")] = CLIPS,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    drawn: Annotated[bool, typer.Option("--drawn", help="Draw rows that exist.")] = False,
) -> None:
    """Measure what dense caches with short windows and codecs with long ones remember."""
    if not drawn:
        with out.progress() as progress:
            put_rows(rows_file, measured(checkpoint, clips, progress))
    rows = read_rows(rows_file)
    header = ["run", "window", "bytes per token", "age", "PSNR in dB"]
    cells = [[r.run, r.window_frames, r.bytes_per_token, r.age, r.value] for r in rows]
    out.table("Pixels of places by age", header, cells)
    if picture:
        draw_chart(chart(rows)).savefig(picture)


def measured(checkpoint: str, clips: int, progress: Progress) -> list[Row]:
    """Rows of every cache."""
    teacher, rows = load(checkpoint), list[Row]()
    window = teacher.config.cache.window_frames
    config = ConvertConfig(calibration_clips=CALIBRATION_CLIPS, dtype="float32")
    source = PhotographClips(window)
    model = fitted(teacher, config, source, progress)
    for memory in progress.track(MEMORIES, "caches"):
        rows += memory_rows(model if memory.is_codec else teacher, memory, clips, progress)
    return rows


def memory_rows(model: CausalWanModel, memory: Memory, clips: int, progress: Progress) -> list[Row]:
    """PSNR by age of one cache, over clips of the held-out photographs."""
    config = model.config
    model.config = replace(config, cache=replace(config.cache, window_frames=memory.window_frames))
    source = PhotographClips(PAST_FRAMES + SAMPLED_FRAMES, seed=2, return_within=PAST_FRAMES)
    squared, old = list[Tensor](), list[Tensor]()
    for index in progress.track(range(-(-clips // AT_ONCE)), "clips"):
        size = min(AT_ONCE, clips - index * AT_ONCE)
        batch = source.clips(index, size, "held_out")
        sampled = sample_after_truth(
            model, encode(batch.video, batch.path), batch.prompt, PAST_FRAMES, memory.runtime
        )
        error = (decode(sampled).clamp(-1, 1) - batch.video[:, PAST_FRAMES:]).square().mean(2)
        squared.append(error)
        old.append(ages(batch.path, config.chunk_frames)[:, PAST_FRAMES:])
    fields = row_fields(model.config, runtime=memory.runtime)
    fields["window_frames"] = memory.window_frames
    model.config = config
    return _age_rows(torch.cat(squared), torch.cat(old), fields)


@torch.no_grad()
def sample_after_truth(
    model: CausalWanModel,
    latents: Tensor,
    context: Tensor,
    first: int,
    runtime: RuntimeConfig | None = None,
) -> Tensor:
    """Sample each chunk after the true frames before it.

    Args:
        model: Dense or converted.
        latents: True clips (B, F, C, height, width).
        context: Prompts (B, text_len, text_dim).
        first: First frame to sample, the first of a chunk.
        runtime: Size and precision of the cache.

    Returns:
        (B, F − first, C, height, width).
    """
    size, cache = model.config.chunk_frames, model.new_cache(len(latents), runtime)
    prompt, sampled = model.project_prompt(context), list[Tensor]()
    for start, chunk in enumerate(latents.split(size, dim=1)):
        if start * size < first:
            write_clean(model, chunk, prompt, cache)
            continue
        generator = seeded(0, start, "after truth")
        cache.open_chunk(size)
        noise = torch.randn(chunk.shape, generator=generator)
        sampled.append(denoise(model, noise, prompt, cache, lambda noise=noise: noise))
        model.stream(chunk, chunk.new_zeros(chunk.shape[:2]), prompt, cache)
    return torch.cat(sampled, dim=1)


def _age_rows(squared: Tensor, age: Tensor, fields: dict[str, object]) -> list[Row]:
    """Rows of each range of ages, of old pixels, and of pixels never seen (age 0)."""
    ranges = [(0, 1), *pairwise((*AGES, math.inf))]
    rows: list[Row] = []
    for least, end in ranges:
        part = squared[(age >= least) & (age < end)]
        if len(part):
            rows.append(_row(part, fields, least, "never seen" if end == 1 else None))
    return [*rows, _row(squared[age >= OLD], fields, OLD, ALL_OLD)]


def _row(squared: Tensor, fields: dict[str, object], age: int, note: str | None) -> Row:
    psnr = 10 * torch.log10(4 / squared.mean()).item()
    return Row(Metric.REVISIT_PSNR, psnr, "dB", **fields, age=age, note=note)  # pyright: ignore


def chart(rows: list[Row]) -> Chart:
    """PSNR by age at equal bytes, and PSNR of old pixels over bytes of the cache."""
    by_age = [
        Line(
            _name(row),
            COLOURS[number % len(COLOURS)],
            [float(r.age) for r in _ages_of(rows, row) if r.age],
            [r.value for r in _ages_of(rows, row) if r.age],
            marker="o",
        )
        for number, row in enumerate(r for r in rows if r.note == ALL_OLD and _is_drawn(r))
    ]
    kinds = {"dense, shorter windows": "dense", "codec, window of 48": "codec"}
    by_bytes: list[Line] = []
    for number, (name, run) in enumerate(kinds.items()):
        points = sorted(
            (cache_kilobytes(r) / 1e3, r.value)
            for r in rows
            if r.note == ALL_OLD and r.run == run and (run == "dense" or r.window_frames == 48)
        )
        xs, ys = [x for x, _ in points], [y for _, y in points]
        by_bytes.append(Line(name, COLOURS[3 * number], xs, ys, marker="o"))
    return [
        Panel(
            "Places by the time since they were seen",
            "PSNR of sampled pixels against the truth",
            "frames since the place was last seen",
            "dB",
            by_age,
        ),
        Panel(
            f"Places last seen {OLD} or more frames ago",
            "the same bytes hold more frames of a codec",
            "MB of cache per layer",
            "dB",
            by_bytes,
            xscale="log",
        ),
    ]


def _ages_of(rows: list[Row], row: Row) -> list[Row]:
    """Rows of the ranges of ages of the same cache."""
    return [
        r
        for r in rows
        if r.note is None
        and (r.run, r.window_frames, r.bytes_per_token)
        == (row.run, row.window_frames, row.bytes_per_token)
    ]


def _is_drawn(row: Row) -> bool:
    """Whether a cache is in the picture of ages: the whole window, or the bytes of window 4."""
    return row.run in ("dense", "codec") and (
        (row.run == "dense" and row.window_frames in (4, 13, 48))
        or (row.run == "codec" and _frames_of_dense(row) == 4)
    )


def _frames_of_dense(row: Row) -> float:
    """Frames of a dense cache that the bytes of a cache would hold."""
    assert row.bytes_per_token is not None and row.window_frames is not None
    return round(row.bytes_per_token * row.window_frames / DENSE_TOKEN_BYTES, 2)


def cache_kilobytes(row: Row) -> float:
    """Bytes of a layer's whole window of one clip, in kB."""
    assert row.bytes_per_token is not None and row.window_frames is not None
    return row.bytes_per_token * row.window_frames * CONFIG.tokens_per_frame / 1e3


def _name(row: Row) -> str:
    if row.run == "dense":
        return f"dense, window {row.window_frames}"
    return f"codec, window {row.window_frames}, bytes of dense {_frames_of_dense(row):g}"


if __name__ == "__main__":
    typer.run(main)
