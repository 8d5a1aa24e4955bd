"""Rectified flow as in Wan and Self-Forcing: x_sigma = (1 − sigma)·x0 + sigma·noise.

The model predicts the velocity noise − x0; a timestep is 1000·sigma.

Shapes: B batch, F frames, C channels; latents are (B, F, C, height, width), sigmas (B, F).
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000.0


def per_frame(sigma: Tensor) -> Tensor:
    """Numbers per frame (B, F) in a shape that broadcasts over latents."""
    return sigma[:, :, None, None, None]


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy latents at sigma."""
    return clean + per_frame(sigma) * (noise - clean)


def predict_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that follow from a velocity at sigma."""
    return noisy - per_frame(sigma) * velocity


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Timestep shift: s·sigma / (1 + (s − 1)·sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampler_sigmas(denoising_step_list: tuple[int, ...], shift: float) -> Tensor:
    """Shifted sigmas of the few steps, with the final 0 appended (steps + 1,)."""
    steps = torch.tensor([*denoising_step_list, 0], dtype=torch.float64) / TRAIN_TIMESTEPS
    return shift_sigma(steps, shift).float()


def sample_training_sigma(
    batch: int, chunks: int, chunk_frames: int, generator: torch.Generator
) -> Tensor:
    """One logit-normal sigma per chunk, (B, chunks · chunk_frames), leaning to the noisy side."""
    normal = torch.randn(batch, chunks, generator=generator)
    return torch.sigmoid(1.2 * normal + 0.3).repeat_interleave(chunk_frames, dim=1)


def sample_sigma_of(
    sigmas: Tensor, batch: int, chunks: int, chunk_frames: int, generator: torch.Generator
) -> Tensor:
    """One of the given sigmas (n,) per chunk, (B, chunks · chunk_frames)."""
    picks = torch.randint(len(sigmas), (batch, chunks), generator=generator)
    return sigmas[picks].repeat_interleave(chunk_frames, dim=1)
