"""Few-step flow sampling of one chunk.

Latents have the shape (B, F, C, height, width): B clips, F frames, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.dit import CausalWanModel, Prompt
from vmla_convert.maths.flow import TRAIN_TIMESTEPS, interpolate, predict_clean, sampler_sigmas


class State(NamedTuple):
    """Noisy latents of a chunk and their noise level, a scalar sigma."""

    latents: Tensor
    sigma: Tensor


@torch.no_grad()
def sample_chunk(
    model: CausalWanModel,
    noise: Tensor,
    prompt: Prompt,
    cache: KVCache,
    draw: Callable[[], Tensor],
    before_step: Callable[[State], None] | None = None,
    after_step: Callable[[State], Tensor] | None = None,
) -> Tensor:
    """Denoise the cache's open chunk, write the clean chunk to the cache and return it.

    Arguments as in `denoise`.
    """
    clean = denoise(model, noise, prompt, cache, draw, before_step, after_step)
    model.stream(clean, clean.new_zeros(clean.shape[:2]), prompt, cache)
    return clean


@torch.no_grad()
def denoise(
    model: CausalWanModel,
    noise: Tensor,
    prompt: Prompt,
    cache: KVCache,
    draw: Callable[[], Tensor],
    before_step: Callable[[State], None] | None = None,
    after_step: Callable[[State], Tensor] | None = None,
) -> Tensor:
    """Denoise the cache's open chunk and return it; the cache stays as it was.

    Timesteps and noisy latents have at least float32 precision. In bfloat16, some of fifty steps
    at a large shift would have zero length.

    Args:
        model: Dense or converted.
        noise: Standard normal latents.
        prompt: From `model.project_prompt`.
        cache: With the chunk opened.
        draw: Returns fresh noise, for samplers that add noise after each step.
        before_step: Receives the state before each step.
        after_step: Receives the state after each step and returns the latents to continue with.
    """
    sampler = model.config.sampler
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sampler_sigmas(sampler.denoising_step_list, sampler.shift).to(x)
    ones = x.new_ones(noise.shape[:2])
    for sigma, following in pairwise(sigmas):
        if before_step is not None:
            before_step(State(x, sigma))
        times = ones * sigma * TRAIN_TIMESTEPS
        velocity = model.stream(x.to(noise), times, prompt, cache, keep=False).to(x)
        clean = predict_clean(x, velocity, ones * sigma)
        if sampler.renoise:
            x = interpolate(clean, draw().to(x), ones * following)
        else:
            x = x + (following - sigma) * velocity
        if after_step is not None:
            x = after_step(State(x, following)).to(x)
    return x.to(noise)
