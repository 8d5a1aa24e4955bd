"""Few-step flow sampling of one chunk that reads a cache."""

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
    """A chunk on its way, (B, F, C, height, width), and its sigma ()."""

    latents: Tensor
    sigma: Tensor


@torch.no_grad()
def sample_chunk(
    model: CausalWanModel,
    noise: Tensor,
    prompt: Prompt,
    cache: KVCache,
    draw: Callable[[], Tensor],
    visit: Callable[[State], None] | None = None,
    stepped: Callable[[State], Tensor] | None = None,
) -> Tensor:
    """Denoise the cache's open chunk, then write it to the cache clean.

    Timesteps and the chunk on its way are float32 at least, whatever the model's dtype: bfloat16
    would round both, and fifty steps at a large shift would have steps of no length among them.

    Args:
        model: Dense or converted.
        noise: (B, F, C, height, width), standard normal.
        prompt: From `model.project_prompt`.
        cache: With the chunk opened; it holds the clean chunk at the end (Self-Forcing, causal
            inference).
        draw: Fresh noise as `noise`, for samplers that add it.
        visit: Called with every state before it is denoised.
        stepped: Called with every state after a step; what it returns is gone on with.

    Returns:
        The clean latents, shaped as `noise`.
    """
    sampler = model.config.sampler
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sampler_sigmas(sampler.denoising_step_list, sampler.shift).to(x)
    ones = x.new_ones(noise.shape[:2])
    for sigma, following in pairwise(sigmas):
        if visit is not None:
            visit(State(x, sigma))
        times = ones * sigma * TRAIN_TIMESTEPS
        velocity = model.stream(x.to(noise), times, prompt, cache, keep=False).to(x)
        clean = predict_clean(x, velocity, ones * sigma)
        if sampler.renoise:
            x = interpolate(clean, draw().to(x), ones * following)
        else:
            x = x + (following - sigma) * velocity
        if stepped is not None:
            x = stepped(State(x, following)).to(x)
    clean = x.to(noise)
    model.stream(clean, torch.zeros_like(ones), prompt, cache)
    return clean


@torch.no_grad()
def write_clean(model: CausalWanModel, chunk: Tensor, prompt: Prompt, cache: KVCache) -> None:
    """Write a clean chunk (B, F, C, height, width) to the cache as its next frames."""
    cache.open_chunk(chunk.shape[1])
    model.stream(chunk, chunk.new_zeros(chunk.shape[:2]), prompt, cache)


@torch.no_grad()
def recache(
    model: CausalWanModel,
    chunks: list[Tensor],
    prompt: Prompt,
    cache: KVCache,
    keep_sink: bool = True,
) -> None:
    """Write the window again under another prompt, from clean chunks (LongLive's re-cache).

    Args:
        model: Dense or converted.
        chunks: The newest that were generated, (B, F, C, height, width) each, oldest first; frames
            that the window does not keep, or that the kept sink holds, are left out.
        prompt: From `model.project_prompt`.
        cache: That was written by them.
        keep_sink: Keep the sink's entries; else the first frames written again become the sink.
    """
    window, sizes = cache.window, [chunk.shape[1] for chunk in chunks]
    oldest = window.next_frame - window.policy.window_frames
    if keep_sink:
        oldest = max(oldest + window.policy.sink_frames, window.sink_end)
    skipped = max(0, oldest - (window.next_frame - sum(sizes)))
    cache.rewind(max(0, sum(sizes) - skipped), keep_sink)
    for chunk, size in zip(chunks, sizes, strict=True):
        part, skipped = chunk[:, skipped:], max(0, skipped - size)
        if part.shape[1]:
            write_clean(model, part, prompt, cache)
