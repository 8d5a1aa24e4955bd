"""How low-rank a layer's keys and values are: as weights, and on the activations it really sees."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_spectrum(target: Tensor) -> Tensor:
    """Squared singular values of stacked weights (n, d), descending: what the paper looks at."""
    return torch.linalg.eigvalsh(target.mT @ target).clamp_min(0).flip(0)


def activation_spectrum(target: Tensor, covariance: Tensor) -> Tensor:
    """Energies of W u for inputs of covariance C, descending: what the layer computes on data."""
    return torch.linalg.eigvalsh(target @ covariance @ target.mT).clamp_min(0).flip(0)


def effective_rank(spectrum: Tensor, energy: float = 0.99) -> int:
    """How many directions hold a share of the energy."""
    share = spectrum.cumsum(0) / spectrum.sum()
    return int((share < energy).sum()) + 1


def energy_at_rank(spectrum: Tensor, rank: int) -> float:
    """Share of the energy in the first R directions."""
    return (spectrum[:rank].sum() / spectrum.sum()).item()
