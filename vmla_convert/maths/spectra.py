"""How low-rank a layer's keys and values are, and truncation of weights without data.

Singular vectors come from the eigenvectors of the Gram matrix: several times cheaper than a full
SVD, and as precise for a projection, which divides by no singular value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.maths.decomposition import descending_eigh


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank R of W (n, d): `up` (n, R) and `down` (R, d), W ≈ up · down.

    The rows of `down` are orthonormal, the strongest direction first.
    """
    rows = matrix.double()
    _, vectors = descending_eigh(rows.mT @ rows)
    down = vectors[:, :rank].mT.contiguous().to(matrix.dtype)
    return matrix @ down.mT, down


def weight_spectrum(target: Tensor) -> Tensor:
    """Squared singular values of stacked weights (n, d), descending, as the paper plots them."""
    return spectrum(target.mT @ target)


def activation_spectrum(target: Tensor, covariance: Tensor) -> Tensor:
    """Energies of W u for inputs u of covariance C, descending."""
    return spectrum(target @ covariance @ target.mT)


def effective_rank(spectrum: Tensor, energy: float = 0.99) -> int:
    """Number of directions that hold a share of the energy."""
    share = spectrum.cumsum(0) / spectrum.sum()
    return int((share < energy).sum()) + 1


def energy_at_rank(spectrum: Tensor, rank: int) -> float:
    """Share of the energy in the first R directions."""
    return (spectrum[:rank].sum() / spectrum.sum()).item()


def spectrum(square: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix, descending."""
    return torch.linalg.eigvalsh(square).clamp_min(0).flip(0)
