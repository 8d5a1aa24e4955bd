"""Write clips of the photograph world as a file for `--data`.

    python -m evals.worlds.clips --out runs/photographs.safetensors

`vmla` then converts, recovers, measures and sweeps the model in evals/worlds/teacher with
`--data runs/photographs.safetensors`. The last tenth of the clips, which commands hold out, shows
other photographs than the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from evals.worlds.photographs import PhotographClips, Split
from evals.worlds.train import CONFIG
from vmla_convert.console import out
from vmla_convert.errors import refuse_existing
from vmla_convert.media.clips import Batch, held_out_clips

TOGETHER = 8


def main(
    file: Annotated[Path, typer.Option("--out", help="Safetensors file to write.")],
    clips: Annotated[int, typer.Option(min=10, help="Number of clips.")] = 80,
    frames: Annotated[int, typer.Option(min=6)] = CONFIG.cache.window_frames,
    seed: Annotated[int, typer.Option(help="Seed of all clips.")] = 0,
) -> None:
    """Write training clips and then held-out clips of the photograph world."""
    refuse_existing(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    batch = photograph_batch(clips, frames, seed)
    partial = file.with_name(f"{file.name}.partial")
    save_file(batch._asdict(), partial)
    partial.replace(file)
    out.path("wrote", file)


def photograph_batch(clips: int, frames: int, seed: int) -> Batch:
    """Clips whose last tenth shows held-out photographs."""
    source, held_out = PhotographClips(frames, seed), held_out_clips(clips)
    parts = [
        *_first(source, "train", clips - held_out),
        *_first(source, "held_out", held_out),
    ]
    latents, context = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Batch(latents, context)


def _first(source: PhotographClips, split: Split, count: int) -> Iterator[Batch]:
    """The first clips of a split, some at a time."""
    for start in range(0, count, TOGETHER):
        batch = source.batch(start, TOGETHER, split)
        yield Batch(*(tensor[: count - start] for tensor in batch))


if __name__ == "__main__":
    typer.run(main)
