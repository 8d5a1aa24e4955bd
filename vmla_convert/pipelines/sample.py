"""Few-step flow sampling of one chunk that reads a cache."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import TRAIN_TIMESTEPS, interpolate, predict_clean, sampler_sigmas


@torch.no_grad()
def sample_chunk(
    model: CausalWanModel,
    noise: Tensor,
    context: Tensor,
    cache: KVCache,
    generator: torch.Generator,
) -> Tensor:
    """Denoise the cache's open chunk, then write it to the cache clean.

    Args:
        model: Dense or converted.
        noise: (B, F, C, height, width), standard normal.
        context: Prompts (B, text_len, text_dim).
        cache: With the chunk opened; its slots are overwritten at every step and hold the clean
            chunk at the end (Self-Forcing, causal inference).
        generator: Of fresh noise, for samplers that add it.

    Returns:
        The clean latents, shaped as `noise`.
    """
    sampler = model.config.sampler
    sigmas = sampler_sigmas(sampler.denoising_step_list, sampler.shift).to(noise)
    batch, frames = noise.shape[:2]
    ones = noise.new_ones(batch, frames)
    x = noise
    for sigma, following in pairwise(sigmas):
        velocity = model.stream(x, ones * sigma * TRAIN_TIMESTEPS, context, cache)
        clean = predict_clean(x, velocity, ones * sigma)
        if sampler.renoise:
            fresh = torch.randn(noise.shape, generator=generator).to(noise)
            x = interpolate(clean, fresh, ones * following)
        else:
            x = x + (following - sigma) * velocity
    model.stream(x, torch.zeros_like(ones), context, cache)
    return x
