"""How low-rank a layer's keys and values are, and the part of a matrix that a rank keeps.

Singular vectors come from the Gram matrix, of which only the wanted end of the spectrum is
decomposed: several times cheaper than a full SVD, and no less exact for a projection, in which no
singular value is divided by.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

# Share of the energy that truncation must discard for float32 to find the cut: its rounding moves
# 1e-7 of the energy, and the discarded part is to be right to 1e-4.
SINGLE_PRECISION_TAIL = 1e-2


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank R: W ≈ up · down, strongest direction first.

    In float32 where truncation discards enough for its rounding not to matter, else in float64.

    Args:
        matrix: W, (n, d).
        rank: R, at most d.

    Returns:
        up (n, R), and down (R, d) with orthonormal rows.
    """
    if not rank:
        return matrix[:, :0], matrix[:0]
    rows = matrix.numpy().astype(np.float32)
    directions, left = _leading_eigenvectors(rows, rank)
    if left < SINGLE_PRECISION_TAIL:
        rows = matrix.double().numpy()
        directions, _ = _leading_eigenvectors(rows, rank)
    # Copied: torch takes no negative strides, and of one direction numpy calls them contiguous.
    down = directions.T[::-1].copy()
    # scipy's BLAS, not numpy's: theirs are two libraries, whose idle threads hold on to the cores.
    (multiply,) = scipy.linalg.get_blas_funcs(("gemm",), (rows,))
    up = multiply(1.0, down.T, rows.T, trans_a=True).T
    return torch.from_numpy(up).to(matrix.dtype), torch.from_numpy(down).to(matrix.dtype)


def _leading_eigenvectors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Of the Gram matrix, columns (d, R), weakest first; and the share of its trace they leave."""
    (multiply,) = scipy.linalg.get_blas_funcs(("syrk",), (matrix,))
    # A transposed view is what BLAS calls a matrix in order: nothing is copied. The upper half is
    # the one that LAPACK reduces faster.
    gram = multiply(1.0, matrix.T)
    energy, wanted = np.trace(gram, dtype=np.float64), (len(gram) - rank, len(gram) - 1)
    values, vectors = scipy.linalg.eigh(
        gram, lower=False, subset_by_index=wanted, overwrite_a=True, check_finite=False
    )
    # Without a share to tell: of nothing, or of squares that float32 cannot hold.
    return vectors, 1 - values.sum(dtype=np.float64) / energy if 0 < energy < np.inf else 0.0


def weight_spectrum(target: Tensor) -> Tensor:
    """Squared singular values of stacked weights (n, d), descending: what the paper looks at."""
    return spectrum(target.mT @ target)


def activation_spectrum(target: Tensor, covariance: Tensor) -> Tensor:
    """Energies of W u for inputs of covariance C, descending: what the layer computes on data."""
    return spectrum(target @ covariance @ target.mT)


def effective_rank(spectrum: Tensor, energy: float = 0.99) -> int:
    """How many directions hold a share of the energy."""
    share = spectrum.cumsum(0) / spectrum.sum()
    return int((share < energy).sum()) + 1


def energy_at_rank(spectrum: Tensor, rank: int) -> float:
    """Share of the energy in the first R directions."""
    return (spectrum[:rank].sum() / spectrum.sum()).item()


def spectrum(square: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix, descending."""
    values = scipy.linalg.eigvalsh(square.numpy(), check_finite=False)
    return torch.from_numpy(values).clamp_min(0).flip(0)
