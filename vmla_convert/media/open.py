"""Open the text encoder and VAE that a model names: the demo's or Wan's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from vmla_convert.config import MediaConfig, ModelConfig
from vmla_convert.media.base import Media
from vmla_convert.media.demo import DemoMedia, prompted_digit
from vmla_convert.media.prompts import shipped_prompts
from vmla_convert.media.wan import open_wan_media


def open_media(
    config: ModelConfig,
    how: MediaConfig | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Media:
    """Open a model's media. Wan's weights are loaded, or downloaded, at their first use.

    Args:
        config: Configuration of the model.
        how: Where the weights come from, and how they run.
        checkpoint: File or folder of the model. Components beside it are used.
        device: Device that encodes and decodes.
        dtype: Precision of the weights. Default: bfloat16 on a GPU, else float32.

    Raises:
        CheckpointError: The components are not there.
        ConfigError: No components are known for this model, or they do not fit it.
        MissingExtraError: diffusers or transformers are not installed.
    """
    if config.media == "demo":
        return DemoMedia(config.frames_per_second)
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return open_wan_media(config, how or MediaConfig(), checkpoint, device, dtype)


def default_prompts(config: ModelConfig) -> tuple[str, ...]:
    """Prompts to sample clips from when the user names none; the last quarter is held out."""
    if config.media == "demo":
        return tuple("0123456789")
    return (*shipped_prompts("calibration"), *shipped_prompts("held_out"))


def check_prompts(config: ModelConfig, prompts: Iterable[str]) -> None:
    """Refuse a prompt for the demo model that does not name one digit, before any work is done."""
    if config.media == "demo":
        for prompt in prompts:
            prompted_digit(prompt)
