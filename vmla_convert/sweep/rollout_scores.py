"""What a point makes of a long rollout, beside the dense model's from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import ModelConfig, SweepConfig
from vmla_convert.generating.film import comparison_rows
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.measuring.evaluate import drift_rows, rollout_rows
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.video import contact_sheet
from vmla_convert.progress import Progress
from vmla_convert.results import Row

COLUMNS = 9
SHOWN = 2


class Rollout(NamedTuple):
    """Clean latents (B, F, C, height, width) of a model, one prompt each."""

    config: ModelConfig
    latents: Tensor


def roll_out(model: CausalWanModel, config: SweepConfig, progress: Progress) -> Rollout:
    """One clip for each prompt, from noise that is the same for every model."""
    frames, prompts = config.rollout_frames, list(config.rollout_prompts)
    chunks = -(-frames // model.config.chunk_frames)
    made = progress.track(generate(model, prompts, frames), "rolling out", chunks)
    return Rollout(model.config, torch.cat([chunk.float().cpu() for chunk in made], dim=1))


def score(rollout: Rollout, config: SweepConfig, seed: int) -> list[Row]:
    """Rows of a rollout: its drift, and of the demo world what its judge says."""
    rows = drift_rows(rollout.latents, rollout.config, seed)
    if rollout.config.media == "demo":
        prompts = list(config.rollout_prompts)
        rows += rollout_rows(_pixels(rollout.latents), prompts, rollout.config, seed)
    return rows


def draw_strip(path: Path, dense: Rollout, converted: Rollout, config: SweepConfig) -> None:
    """Frames from start to end, dense above converted above their difference; demo world only.

    Grey is no difference.

    Raises:
        MissingExtraError: Pillow is not installed.
        OutputError: The file cannot be written.
    """
    if converted.config.media != "demo":
        return
    models = {"dense": dense, "converted": converted}
    clips = {name: _pixels(each.latents) for name, each in models.items()}
    rows = comparison_rows(clips, config.rollout_prompts[:SHOWN], difference=True)
    contact_sheet(path, rows, COLUMNS, group=3)


def _pixels(latents: Tensor) -> Tensor:
    return DemoMedia().decode(latents).clamp(-1, 1)
