"""Spectra: energies, effective rank, the difference that data makes, and what a rank keeps."""

from __future__ import annotations

import pytest
import torch

from vmla_convert.maths.spectra import (
    activation_spectrum,
    effective_rank,
    energy_at_rank,
    truncate,
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


def matrices() -> dict[str, torch.Tensor]:
    """Flat, decaying slowly and fast, of exactly low rank, and of few rows."""
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    left, right = torch.linalg.qr(normal(96, 40)).Q, torch.linalg.qr(normal(40, 40)).Q
    index = torch.arange(40.0, dtype=torch.float64)
    return {
        "flat": normal(96, 40),
        "exactly flat": left @ right,
        "slow": left * (1 + index) ** -0.7 @ right,
        "fast": left * 0.5**index @ right,
        "low rank": normal(96, 5) @ normal(5, 40),
        "few rows": normal(7, 40),
        "one row": normal(1, 40),
        "one column": normal(96, 1),
        "nothing": torch.zeros(12, 8, dtype=torch.float64),
        "transposed": normal(40, 96).mT,
    }


MATRICES = matrices()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_truncation_loses_what_a_full_svd_loses(name: str, dtype: torch.dtype) -> None:
    matrix = MATRICES[name].to(dtype)
    exact, width = matrix.double(), matrix.shape[1]
    singular = torch.linalg.svdvals(exact)
    rounding = (1e-7 if dtype == torch.float64 else 1e-6) * exact.norm().item()
    for rank in sorted({0, 1, 2, 5, 8, width // 2, width - 1, width} & {*range(width + 1)}):
        up, down = truncate(matrix, rank)
        assert (up.shape, up.dtype) == ((len(matrix), rank), dtype)
        assert (down.shape, down.dtype) == ((rank, width), dtype)
        assert up.is_contiguous() and down.is_contiguous()
        left = singular[rank:].norm().item()
        lost = (exact - up.double() @ down.double()).norm().item()
        assert abs(lost - left) <= 1e-4 * left + rounding
        rows = down.double() @ down.double().mT
        torch.testing.assert_close(rows, torch.eye(rank).double(), atol=1e-5, rtol=0)
        # Strongest first.
        strength = up.double().norm(dim=0)
        assert (strength.diff() <= 1e-4 * singular[0] + rounding).all()
