"""Peak memory of a conversion, by formula."""

from __future__ import annotations

from dataclasses import replace

import torch

from vmla_convert.config import ConvertConfig, ModelConfig
from vmla_convert.fitting.calibrate import clips_of_a_group, statistics_bytes, store_bytes
from vmla_convert.fitting.calibration_clips import measures
from vmla_convert.layers.memory import (
    FLOAT32,
    ClipShape,
    Memory,
    block_bytes,
    parameter_count,
)
from vmla_convert.media.clip_checks import clip_tokens, clips_at_once

FLOAT64 = 8


def conversion_memory(config: ModelConfig, convert: ConvertConfig, clip: ClipShape) -> Memory:
    """Peak of a conversion block by block, all in float32, with one worker that fits layers.

    Args:
        config: The dense model.
        convert: The conversion; without calibration only the fit of a layer counts.
        clip: Shape of a calibration clip.
    """
    dim, calibrates = config.geometry.dim, measures(convert)
    # A fit holds six float64 matrices and the metric of [k; v]; an MLA layer takes twelve.
    width = 2 * dim if calibrates else dim
    fitted = 6 * width**2 + (2 * dim) ** 2 if convert.product == "codec" else 12 * dim**2
    fit = Memory(0, FLOAT64 * fitted)
    if not calibrates:
        return fit
    return fit.peak(calibration_memory(config, convert, clip))


def calibration_memory(config: ModelConfig, convert: ConvertConfig, clip: ClipShape) -> Memory:
    """Peak of the backward pass of calibration, which holds one batch of clips.

    Counted are one block and the tensors outside the blocks; prompts and latents of the clips of a
    group; of a batch the input of the block and the gradients above and below it, and what autograd
    keeps; and the float64 sums of a layer.
    """
    geometry, latents = config.geometry, _latents(config, clip)
    tokens, count = clip_tokens(geometry, latents), convert.calibration_clips
    batch = min(clips_at_once(geometry, latents), count)
    group = min(clips_of_a_group(geometry, latents), count)
    one = replace(config, geometry=replace(geometry, num_layers=1))
    item = FLOAT32 if convert.mixed_precision == "no" else 2
    stream = FLOAT32 * batch * tokens * geometry.dim
    kept = block_bytes(one, clip.frames, batch * tokens, item)
    # The backward pass of the feed-forward has two more hidden tensors and one gradient.
    kept += item * batch * tokens * (2 * geometry.ffn_dim + geometry.dim)
    given = group * (geometry.text_len * (geometry.text_dim + geometry.dim) + 3 * latents.numel())
    sums = statistics_bytes(geometry, convert.product)
    device = FLOAT32 * (parameter_count(one) + given) + 3 * stream + kept + sums
    return Memory(device, sums, staging=2 * stream)


def calibration_disk(config: ModelConfig, convert: ConvertConfig, clip: ClipShape) -> int:
    """Bytes on disk, beside the output, while a calibration runs."""
    if not measures(convert):
        return 0
    latents = _latents(config, clip)
    return store_bytes(config.geometry, latents, convert.calibration_clips, convert.product)


def _latents(config: ModelConfig, clip: ClipShape) -> torch.Tensor:
    """The shape of a clip's latents, without numbers."""
    shape = (1, clip.frames, config.geometry.in_dim, clip.height, clip.width)
    return torch.empty(shape, device="meta")
