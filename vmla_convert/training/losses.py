"""What training minimises: pure functions of a model and an example, nothing else.

An example is a batch of clips as one teacher-forced pass sees it: the clean clip, which stands for
the cache, beside the noisy clip, of which every chunk is predicted from its own clean past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmla_convert.config import ModelConfig, RuntimeConfig
from vmla_convert.layers.attention import in_float32
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.flow import (
    interpolate,
    per_frame,
    sample_sigma_of,
    sample_training_sigma,
)
from vmla_convert.maths.masks import AttentionMask, teacher_forcing_mask
from vmla_convert.media.clips import Batch


class Example(NamedTuple):
    """One teacher-forced batch; every tensor starts with B.

    Attributes:
        latents: [past | noisy] clips (B, 2F, C, height, width).
        timestep: (B, 2F); 0 for the past.
        velocity: noise − clean (B, F, C, height, width).
        context: Prompts (B, text_len, text_dim).
    """

    latents: Tensor
    timestep: Tensor
    velocity: Tensor
    context: Tensor

    def to(self, device: torch.device) -> Example:
        """The same example on a device."""
        return Example(*(tensor.to(device) for tensor in self))


Loss = Callable[[nn.Module, Example], Tensor]

Examples = Callable[[int], Sequence[Example]]
"""What a step trains on: a function of its number, and of nothing but the weights besides."""


class Levels(NamedTuple):
    """Noise levels of a sampler, to be mixed with those of pretraining.

    Attributes:
        sigmas: The sampler's, (n,), its final 0 left out.
        share: Of the chunks that get one of them.
    """

    sigmas: Tensor
    share: float


def make_example(
    batch: Batch,
    chunk_frames: int,
    generator: torch.Generator,
    context_noise: float = 0.0,
    levels: Levels | None = None,
) -> Example:
    """Put noise on a batch of clips.

    Args:
        batch: Clean clips.
        chunk_frames: Frames that share a noise level.
        generator: Decides all noise.
        context_noise: Largest level of light noise on the past, in half of the clips; it makes a
            model robust to its own small errors in a rollout.
        levels: Noise levels to mix in; those of pretraining alone by default.
    """
    clean, context = batch
    # A clip that ends within a chunk loses its last frames.
    frames = clean.shape[1] // chunk_frames * chunk_frames
    size, clean = len(clean), clean[:, :frames]
    sigma = sample_training_sigma(size, frames // chunk_frames, chunk_frames, generator)
    if levels is not None:
        few = sample_sigma_of(levels.sigmas, size, frames // chunk_frames, chunk_frames, generator)
        mixed = torch.rand(size, frames // chunk_frames, generator=generator) < levels.share
        sigma = torch.where(mixed.repeat_interleave(chunk_frames, dim=1), few, sigma)
    noise = torch.randn(clean.shape, generator=generator)
    past = clean
    if context_noise:
        level = torch.rand(size, frames // chunk_frames, generator=generator) * context_noise
        level *= torch.rand(size, 1, generator=generator) < 0.5
        level = level.repeat_interleave(chunk_frames, dim=1)
        past = (1 - per_frame(level)) * clean
        past = past + per_frame(level) * torch.randn(clean.shape, generator=generator)
    return Example(
        latents=torch.cat([past, interpolate(clean, noise, sigma)], dim=1),
        timestep=torch.cat([torch.zeros_like(sigma), 1000 * sigma], dim=1),
        velocity=noise - clean,
        context=context,
    )


def teacher_forcing_inputs(config: ModelConfig, example: Example) -> tuple[Tensor, AttentionMask]:
    """Frame positions (2F,) and masks (2F, 2F) of one teacher-forced pass."""
    frames, (height, width) = example.latents.shape[1] // 2, example.latents.shape[-2:]
    positions = torch.arange(frames, device=example.latents.device).repeat(2)
    # Clips may be smaller than what the model is deployed at.
    tokens = config.geometry.tokens_per_frame((height, width))
    return positions, teacher_forcing_mask(frames, config.chunk_frames, tokens, config.cache)


def predicted_velocity(model: nn.Module, config: ModelConfig, example: Example) -> Tensor:
    """Velocity of the noisy clip (B, F, C, height, width), its past read clean."""
    latents, timestep, _, context = example
    frames = latents.shape[1] // 2
    if frames == config.chunk_frames:
        # A single chunk has no past to read.
        positions = torch.arange(frames, device=latents.device)
        return in_float32(model(latents[:, frames:], timestep[:, frames:], context, positions))
    positions, mask = teacher_forcing_inputs(config, example)
    return in_float32(model(latents, timestep, context, positions, mask)[:, frames:])


@torch.no_grad()
def streamed_velocity(
    model: CausalWanModel, example: Example, runtime: RuntimeConfig | None = None
) -> Tensor:
    """Velocity of the noisy clip, each chunk from the model's own cache of its clean past.

    Returns:
        (B, F, C, height, width); as `predicted_velocity`, but for what the cache rounds.
    """
    latents, timestep, _, context = example
    cache, prompt = model.new_cache(len(latents), runtime), model.project_prompt(context)
    clean, noisy = latents.chunk(2, dim=1)
    levels, velocities = timestep.chunk(2, dim=1)[1], list[Tensor]()
    size = model.config.chunk_frames
    parts = (tensor.split(size, dim=1) for tensor in (clean, noisy, levels))
    for past, chunk, level in zip(*parts, strict=True):
        cache.open_chunk(size)
        velocities.append(model.stream(chunk, level, prompt, cache, keep=False))
        model.stream(past, torch.zeros_like(level), prompt, cache)
    return torch.cat(velocities, dim=1).float()


def flow_matching(config: ModelConfig) -> Loss:
    """Mean squared error against the true velocity: pretraining."""

    def loss(model: nn.Module, example: Example) -> Tensor:
        return (predicted_velocity(model, config, example) - example.velocity).square().mean()

    return loss


def velocity_distillation(teacher: CausalWanModel, flow_weight: float = 0.0) -> Loss:
    """Mean squared error against the dense model's velocity (METHOD 9, stage 2).

    Args:
        teacher: The dense model.
        flow_weight: Of the error against the true velocity, which is added.
    """

    def loss(model: nn.Module, example: Example) -> Tensor:
        with torch.no_grad():
            target = predicted_velocity(teacher.to(example.latents.device), teacher.config, example)
        velocity = predicted_velocity(model, teacher.config, example)
        distance = (velocity - target).square().mean()
        if not flow_weight:
            return distance
        return distance + flow_weight * (velocity - example.velocity).square().mean()

    return loss
