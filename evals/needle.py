"""Ask a model for a place that it saw once: in the sink, or in the middle of its window.

    python -m evals.needle CKPT --out evals/results/needle.jsonl

A clip of the photograph world glances at a far place in one chunk (the needle). The model continues
the clip freely. Then one chunk is asked for: its places are set, step by step, to those of the
needle, and the model fills in the pixels. `needle_psnr` compares them with the truth. A needle in
the sink is asked for after a minute. A needle in the middle of the window is asked for while the
window holds it, and, as a control, after the window has lost it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from evals.rollout import CUTS, MINUTE
from evals.worlds.photographs import (
    CHUNK_FRAMES,
    Path2D,
    decode,
    encode,
    film,
    glancing_path,
    with_places,
)
from evals.worlds.worlds import Photographs
from vmla_convert.config import RuntimeConfig, Sizes, SourceConfig
from vmla_convert.console import out
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.generating.sampler import State
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import load
from vmla_convert.loading.teacher import teacher_of
from vmla_convert.maths.flow import interpolate
from vmla_convert.measuring.rows import row_fields
from vmla_convert.measuring.video import interval
from vmla_convert.media.clips import seeded
from vmla_convert.progress import Progress
from vmla_convert.results import Metric, Row, put_rows

GIVEN = Photographs.given_frames
MIDDLE = GIVEN // CHUNK_FRAMES // 2


class Needle(NamedTuple):
    """When a place is seen, and how many frames after the given ones it is asked for."""

    name: str
    seen_in_chunk: int
    asked_after: int


def needles(minute: int) -> tuple[Needle, ...]:
    """The three needles."""
    return (
        Needle("in the sink", 0, minute),
        Needle("in the window", MIDDLE, CHUNK_FRAMES),
        Needle("lost from the window", MIDDLE, minute),
    )


def main(
    checkpoint: Annotated[str, typer.Argument(help="Conversion to measure beside its model.")],
    rows_file: Annotated[Path, typer.Option("--out", help="JSONL file to append rows to.")],
    teacher: Annotated[str | None, typer.Option(help="Dense model of MLA layers.")] = None,
    clips: Annotated[int, typer.Option(min=2, help="Number of scenes.")] = 16,
    frames: Annotated[int, typer.Option(min=CHUNK_FRAMES, help="Frames of a minute.")] = MINUTE,
    cuts: Annotated[list[float] | None, typer.Option("--cut", help="Sizes of a codec.")] = None,
) -> None:
    """Measure what a dense model and its conversion find again."""
    model, dense = load(checkpoint), SourceConfig(teacher) if teacher else None
    runs = [(load(teacher_of(SourceConfig(checkpoint), dense)), None)]
    sizes = [RuntimeConfig(Sizes(cut=cut)) for cut in cuts or CUTS]
    runs += [(model, runtime) for runtime in (sizes if model.config.codec else [None])]
    with out.progress() as progress:
        rows = [
            needle_row(each, needle, clips, runtime, progress)
            for needle in needles(frames)
            for each, runtime in runs
        ]
    put_rows(rows_file, rows)
    header = ["run", "bytes per token", "needle", "PSNR in dB", "low", "high"]
    cells = [[r.run, r.bytes_per_token, r.note, r.value, r.low, r.high] for r in rows]
    out.table("Places that were seen once", header, cells)


def needle_row(
    model: CausalWanModel,
    needle: Needle,
    clips: int,
    runtime: RuntimeConfig | None,
    progress: Progress,
) -> Row:
    """PSNR of the chunk that is asked for, over clips."""
    latents, prompts, asked = scenes(needle, clips)
    chunks = needle.asked_after // CHUNK_FRAMES
    made = rollout(
        model,
        chunks,
        lambda frame: NewPrompt(prompts) if frame == 0 else None,
        lambda index: [seeded(0, index, "rollout")],
        runtime,
        prefix=latents,
        after_step=asking_for(asked, chunks, len(model.config.sampler.denoising_step_list)),
    )
    total = GIVEN // CHUNK_FRAMES + chunks
    *_, last = progress.track(made, f"needle {needle.name}", total)
    error = (decode(last).clamp(-1, 1) - decode(asked)).square().mean((1, 2, 3, 4))
    psnr = 10 * torch.log10(4 / error)
    low, high = interval(psnr)
    fields = row_fields(model.config, runtime=runtime)
    return Row(
        Metric.NEEDLE_PSNR, psnr.mean().item(), "dB", **fields, note=needle.name, low=low, high=high
    )


def scenes(needle: Needle, clips: int) -> tuple[Tensor, Tensor, Tensor]:
    """Given latents (B, F, C, n, n), prompts, and the true latents of the asked chunk."""
    last = (GIVEN + needle.asked_after) // CHUNK_FRAMES - 1
    frames, parts = (last + 1) * CHUNK_FRAMES, list[tuple[Tensor, Tensor]]()
    for clip in range(clips):
        generator = seeded(4, clip, needle.name)
        glances = (needle.seen_in_chunk, last)
        path, prompt = glancing_path(frames, glances, GIVEN, generator)
        video = film("held_out", path, generator)
        parts.append((encode(video[None], Path2D(*(each[None] for each in path)))[0], prompt))
    latents, prompts = map(torch.stack, zip(*parts, strict=True))
    return latents[:, :GIVEN], prompts, latents[:, -CHUNK_FRAMES:]


def asking_for(asked: Tensor, chunks: int, steps: int) -> Callable[[State], Tensor]:
    """Set the places of the last chunk, at the noise of each step, to those of `asked`."""
    noise = torch.randn(asked.shape, generator=seeded(0, 0, "asked"))
    done = 0

    def after_step(state: State) -> Tensor:
        nonlocal done
        done += 1
        if done <= (chunks - 1) * steps:
            return state.latents
        sigma = state.sigma.expand(asked.shape[:2])
        return with_places(state.latents, interpolate(asked, noise, sigma).to(state.latents))

    return after_step


if __name__ == "__main__":
    typer.run(main)
