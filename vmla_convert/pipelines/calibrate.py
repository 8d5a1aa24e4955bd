"""Measure what every attention layer sees: clean inputs and keys, noisy queries."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.layers.attention import DenseSelfAttention, split_heads
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import Evidence
from vmla_convert.maths.moments import Moments, measure_moments, merge_moments
from vmla_convert.maths.positions import expected_phases
from vmla_convert.pipelines.data import ClipSource, seeded
from vmla_convert.pipelines.losses import Example, make_example, teacher_forcing_inputs
from vmla_convert.progress import Progress, Silent

CLIPS_AT_ONCE = 8


def calibrate(
    teacher: CausalWanModel,
    clips: ClipSource,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Evidence]:
    """Walk clips through the dense model and keep each layer's second moments.

    Args:
        teacher: The dense model.
        clips: Where clips come from.
        count: How many; a few dozen are enough, each brings thousands of tokens.
        seed: Of the noise on the current chunks.
        progress: Where to draw.

    Returns:
        One piece of evidence for each layer.
    """
    progress = progress or Silent()
    config, device = teacher.config, teacher.patch_embedding.weight.device
    moments: list[Moments] = []
    batches = range(-(-count // CLIPS_AT_ONCE))
    for index in progress.track(batches, "calibrating"):
        batch = clips.batch(index, min(CLIPS_AT_ONCE, count - index * CLIPS_AT_ONCE))
        noise = seeded(seed, index, "calibration")
        example = make_example(batch, config.chunk_frames, noise).to(device)
        fresh = _layer_moments(teacher, example)
        if moments:
            fresh = [merge_moments(*both) for both in zip(moments, fresh, strict=True)]
        moments = fresh
    phases = deployed_phases(teacher)
    return [Evidence(layer, phases) for layer in moments]


def deployed_phases(teacher: CausalWanModel) -> Tensor:
    """Expected phase of each RoPE pair (D/2,) in the window the model runs with."""
    config = teacher.config
    _, rows, columns = config.geometry.patch_size
    grid = (config.latent_size[0] // rows, config.latent_size[1] // columns)
    return expected_phases(config.cache, config.chunk_frames, grid, config.geometry.head_dim)


@torch.no_grad()
def _layer_moments(teacher: CausalWanModel, example: Example) -> list[Moments]:
    """Moments of every layer on one teacher-forced batch."""
    positions, mask = teacher_forcing_inputs(teacher.config, example)
    steps = teacher.walk(example.latents, example.timestep, example.context, positions, mask)
    return [_attention_moments(block.self_attn, x) for block, x, _ in steps]


def _attention_moments(attention: torch.nn.Module, x: Tensor) -> Moments:
    """Moments of inputs x (B, 2L, d): the first half clean, the second noisy."""
    assert isinstance(attention, DenseSelfAttention)
    clean, noisy = (half.flatten(0, 1) for half in x.chunk(2, dim=1))
    raw_key = attention.k(clean)
    norm = torch.rsqrt(raw_key.float().square().mean(-1) + (attention.norm_k.eps or 0.0))
    heads = attention.num_heads
    moments = measure_moments(
        inputs=clean,
        keys=split_heads(attention.norm_k(raw_key), heads),
        key_norm=norm,
        queries=split_heads(attention.norm_q(attention.q(noisy)), heads),
    )
    return Moments(*(part.cpu() for part in moments))
