"""Rectified flow: interpolation, its inverse, and Self-Forcing's few steps."""

from __future__ import annotations

import pytest
import torch
from conftest import noise

from vmla_convert.maths.flow import (
    interpolate,
    predict_clean,
    sample_training_sigma,
    sampler_sigmas,
    shift_sigma,
)

SHAPE = (2, 3, 4, 2, 2)


def test_the_true_velocity_leads_back_to_the_clean_latents() -> None:
    clean, added = noise(*SHAPE, seed=0), noise(*SHAPE, seed=1)
    sigma = torch.tensor([[0.0, 0.3, 1.0], [0.7, 0.01, 0.99]])
    noisy = interpolate(clean, added, sigma)
    torch.testing.assert_close(predict_clean(noisy, added - clean, sigma), clean)
    torch.testing.assert_close(noisy[0, 0], clean[0, 0])
    torch.testing.assert_close(noisy[0, 2], added[0, 2])
    torch.testing.assert_close(noisy[1, 0], 0.3 * clean[1, 0] + 0.7 * added[1, 0])


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_keeps_the_ends_and_the_order(shift: float) -> None:
    sigma = torch.linspace(0, 1, 11)
    shifted = shift_sigma(sigma, shift)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert (shifted.diff() > 0).all()
    if shift == 1:
        torch.testing.assert_close(shifted, sigma)
    else:
        assert (shifted[1:-1] > sigma[1:-1]).all()


def test_shifting_back_is_shifting_by_the_reciprocal() -> None:
    sigma = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 5.0), 1 / 5.0), sigma)


def test_self_forcing_steps_are_1000_937_833_625() -> None:
    timesteps = 1000 * sampler_sigmas((1000, 750, 500, 250), 5.0)
    expected = torch.tensor([1000, 937.5, 2500 / 3, 625, 0])
    torch.testing.assert_close(timesteps, expected)


def test_training_noise_is_shared_within_a_chunk_only() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = sample_training_sigma(64, 3, 2, generator)
    assert sigma.shape == (64, 6)
    assert ((sigma > 0) & (sigma < 1)).all()
    chunks = sigma.unflatten(1, (3, 2))
    assert torch.equal(chunks[..., 0], chunks[..., 1])
    assert len(chunks[..., 0].unique()) == 64 * 3
    assert 0.5 < sigma.mean() < 0.65
