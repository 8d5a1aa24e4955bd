"""Training losses: pure functions of a model and an example.

An example is a batch of clips as one teacher-forced pass attends to it: the clean clip, in place of
the cache, beside the noisy clip. Each noisy chunk is predicted from the clean chunks before it.

Shapes: B batch, F frames, C channels.
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
    TRAIN_TIMESTEPS,
    interpolate,
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
        velocity: Target of the noisy clip (B, F, C, height, width); noise − clean for true clips.
        context: Prompts (B, text_len, text_dim).
    """

    latents: Tensor
    timestep: Tensor
    velocity: Tensor
    context: Tensor

    @classmethod
    def build(
        cls, past: Tensor, noisy: Tensor, sigma: Tensor, velocity: Tensor, context: Tensor
    ) -> Example:
        """Put a past beside a noisy clip of levels sigma (B, F)."""
        timestep = torch.cat([torch.zeros_like(sigma), TRAIN_TIMESTEPS * sigma], dim=1)
        return cls(torch.cat([past, noisy], dim=1), timestep, velocity, context)

    @property
    def past(self) -> Tensor:
        """The clean clip (B, F, C, height, width)."""
        return self.latents[:, : self.velocity.shape[1]]

    @property
    def noisy(self) -> Tensor:
        """The noisy clip (B, F, C, height, width)."""
        return self.latents[:, self.velocity.shape[1] :]

    @property
    def sigma(self) -> Tensor:
        """Noise levels of the noisy clip (B, F)."""
        return self.timestep[:, self.velocity.shape[1] :] / TRAIN_TIMESTEPS

    def to(self, device: torch.device) -> Example:
        """The same example on a device."""
        return Example(*(tensor.to(device) for tensor in self))

    def split(self, count: int) -> list[Example]:
        """Divide the clips into equal parts, in order."""
        parts = zip(*(tensor.chunk(count) for tensor in self), strict=True)
        return [Example(*part) for part in parts]


Loss = Callable[[nn.Module, Example], Tensor]

Examples = Callable[[int], Sequence[Example]]
"""This process's examples of a step; they depend on the step and the weights only."""


class Levels(NamedTuple):
    """Noise levels of a sampler, to mix with those of pretraining.

    Attributes:
        sigmas: Levels of the sampler, without the final 0.
        share: Share of the chunks that get one of `sigmas`.
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
    """Put noise on a batch of clips; frames after the last whole chunk are dropped.

    Args:
        batch: Clean clips.
        chunk_frames: Frames that share a noise level.
        generator: Source of all noise.
        context_noise: Largest noise level on the past, in half of the clips. The noise makes a
            model robust to its own small errors in a rollout.
        levels: Noise levels to mix in; None for those of pretraining alone.
    """
    clean, context = batch
    clips, chunks = len(clean), clean.shape[1] // chunk_frames
    clean = clean[:, : chunks * chunk_frames]
    sigma = sample_training_sigma(clips, chunks, chunk_frames, generator)
    if levels is not None:
        few = sample_sigma_of(levels.sigmas, clips, chunks, chunk_frames, generator)
        mixed = torch.rand(clips, chunks, generator=generator) < levels.share
        sigma = torch.where(mixed.repeat_interleave(chunk_frames, dim=1), few, sigma)
    noise = torch.randn(clean.shape, generator=generator)
    past = clean
    if context_noise:
        level = torch.rand(clips, chunks, generator=generator) * context_noise
        level *= torch.rand(clips, 1, generator=generator) < 0.5
        level = level.repeat_interleave(chunk_frames, dim=1)
        past = interpolate(clean, torch.randn(clean.shape, generator=generator), level)
    return Example.build(past, interpolate(clean, noise, sigma), sigma, noise - clean, context)


def teacher_forcing_inputs(config: ModelConfig, example: Example) -> tuple[Tensor, AttentionMask]:
    """Frame positions (2F,) and mask of one teacher-forced pass."""
    frames, (height, width) = example.velocity.shape[1], example.latents.shape[-2:]
    frame_positions = torch.arange(frames, device=example.latents.device).repeat(2)
    # Clips may be smaller than the model's own latent size.
    tokens = config.geometry.tokens_per_frame((height, width))
    return frame_positions, teacher_forcing_mask(frames, config.chunk_frames, tokens, config.cache)


def predicted_velocity(model: nn.Module, config: ModelConfig, example: Example) -> Tensor:
    """Predicted velocity of the noisy clip (B, F, C, height, width)."""
    latents, timestep, velocity, context = example
    frames = velocity.shape[1]
    if frames == config.chunk_frames:
        # A single chunk has no past.
        positions = torch.arange(frames, device=latents.device)
        return in_float32(model(latents[:, frames:], timestep[:, frames:], context, positions))
    positions, mask = teacher_forcing_inputs(config, example)
    return in_float32(model(latents, timestep, context, positions, mask)[:, frames:])


@torch.no_grad()
def streamed_velocity(
    model: CausalWanModel, example: Example, runtime: RuntimeConfig | None = None
) -> Tensor:
    """Predict as `predicted_velocity` does, each chunk with the model's own cache of the past.

    The two differ by the rounding of the cache only.
    """
    cache = model.new_cache(len(example.latents), runtime)
    prompt, velocities = model.project_prompt(example.context), list[Tensor]()
    size = model.config.chunk_frames
    levels = example.timestep[:, example.velocity.shape[1] :]
    chunks = (tensor.split(size, dim=1) for tensor in (example.past, example.noisy, levels))
    for past, noisy, level in zip(*chunks, strict=True):
        cache.open_chunk(size)
        velocities.append(model.stream(noisy, level, prompt, cache, keep=False))
        model.stream(past, torch.zeros_like(level), prompt, cache)
    return torch.cat(velocities, dim=1).float()


def flow_matching(config: ModelConfig) -> Loss:
    """Mean squared error against the true velocity: pretraining."""

    def loss(model: nn.Module, example: Example) -> Tensor:
        return (predicted_velocity(model, config, example) - example.velocity).square().mean()

    return loss


def velocity_distillation(teacher: CausalWanModel, flow_weight: float = 0.0) -> Loss:
    """Mean squared error against the dense model's velocity (Method: recovery).

    Args:
        teacher: The dense model.
        flow_weight: Weight of the error against the true velocity, which is added.
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
