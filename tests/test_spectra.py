"""Spectra: energies, effective rank, and the difference that data makes."""

from __future__ import annotations

import torch

from vmla_convert.maths.spectra import (
    activation_spectrum,
    effective_rank,
    energy_at_rank,
    weight_spectrum,
)


def test_weight_spectrum_is_squared_singular_values() -> None:
    target = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight_spectrum(target), torch.linalg.svdvals(target).square())


def test_activation_spectrum_of_white_inputs_is_the_weights_own() -> None:
    target = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    white = activation_spectrum(target, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(white[:5], weight_spectrum(target))
    assert white[5:].abs().max() < 1e-12


def test_full_rank_weights_are_low_rank_on_low_rank_data() -> None:
    target = torch.eye(6, dtype=torch.float64)
    covariance = torch.diag(torch.tensor([1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64))
    assert effective_rank(weight_spectrum(target)) == 6
    assert effective_rank(activation_spectrum(target, covariance)) == 2


def test_effective_rank_and_energy_agree() -> None:
    spectrum = torch.tensor([90.0, 9.0, 0.9, 0.1])
    assert effective_rank(spectrum) == 2
    assert energy_at_rank(spectrum, 2) >= 0.99 > energy_at_rank(spectrum, 1)
    assert energy_at_rank(spectrum, 4) == 1.0
