"""How low-rank a layer's keys and values are, and truncation of weights without data.

Singular vectors come from the leading eigenvectors of the Gram matrix: several times cheaper than a
full SVD, and as precise for a projection, which divides by no singular value.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank R of W (n, d): `up` (n, R) and `down` (R, d), W ≈ up · down.

    The rows of `down` are orthonormal, the strongest direction first.
    """
    if not rank:
        return matrix[:, :0], matrix[:0]
    rows = matrix.double()
    gram = (rows.mT @ rows).numpy()
    leading = (len(gram) - rank, len(gram) - 1)
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=leading, check_finite=False)
    # A copy, because torch takes no negative strides.
    down = torch.from_numpy(vectors.T[::-1].copy()).to(matrix.dtype)
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
    values = scipy.linalg.eigvalsh(square.numpy(), check_finite=False)
    return torch.from_numpy(values).clamp_min(0).flip(0)
