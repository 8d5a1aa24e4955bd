"""Best low-rank approximations under a metric and a covariance, by symmetric eigen-decomposition.

Shapes: d input width, n target width, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Decomposition(NamedTuple):
    """Approximations W ≈ up · down of all ranks: the first R rows and columns are those of rank R.

    Attributes:
        down: (d, d); the latent of centred inputs has the energies as its covariance.
        up: (n, d).
        energies: Cost of leaving out each direction, falling, (d,).
    """

    down: Tensor
    up: Tensor
    energies: Tensor

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The first R directions, `down` and `up`, with latents of mean square 1.

        The metric has the unit of a gradient. In that unit an optimiser's steps would be far too
        large for one side and too small for the other.
        """
        size = self.energies[:rank].mean().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        return self.down[:rank] / size, self.up[:, :rank] * size

    def tail(self) -> Tensor:
        """Cost that the first 0, 1, … directions leave, (d + 1,)."""
        return torch.cat([self.energies.flip(0).cumsum(0).flip(0), self.energies.new_zeros(1)])


def two_sided(target: Tensor, square: Tensor, covariance: Tensor) -> Decomposition:
    """Best approximations of a target W in E[((W − Ŵ) u)ᵀ M (W − Ŵ) u].

    With V, Λ the eigenvectors and eigenvalues of C^½ B C^½: down = Λ^-½ Vᵀ C^½ B, and
    up = W C downᵀ Λ⁻¹ solves the least-squares problem that is left. Neither M nor C is inverted
    (Method: calibrated factors).

    Args:
        target: W, (n, d).
        square: B = Wᵀ M W, (d, d), with M positive semi-definite; M itself may be large.
        covariance: C = E[u uᵀ], (d, d).
    """
    root = psd_sqrt(covariance)
    weighted = root @ square
    values, vectors = descending_eigh(weighted @ root)
    inverse = reciprocal(values)
    down = inverse[:, None] * (vectors.mT @ weighted)
    # Small energies magnify rounding, so the rows are orthonormalised in C once more.
    mixed = torch.linalg.qr(root @ down.mT).R.mT + torch.diag((inverse == 0).to(down.dtype))
    down = torch.linalg.solve_triangular(mixed, down, upper=False)
    up = (target @ covariance @ down.mT) * inverse.sqrt()
    return Decomposition(values.sqrt()[:, None] * down, up, values)


def descending_eigh(product: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a positive semi-definite product, the largest first.

    Eigenvalues that are rounding are 0.
    """
    # Products are symmetric but for rounding.
    values, vectors = torch.linalg.eigh((product + product.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    return torch.where(values > values[0] * _rounding(values), values, 0), vectors


def reciprocal(values: Tensor) -> Tensor:
    """1/values, and 0 where a value is 0: directions without data get no projection."""
    return torch.where(values > 0, 1 / values.where(values > 0, torch.ones_like(values)), 0)


def psd_sqrt(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix (..., n, n).

    Layer norm makes its inputs exactly singular; eigenvalues that are rounding count as 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    least = values.amax(-1, keepdim=True) * _rounding(values)
    values = torch.where(values > least, values, 0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def _rounding(values: Tensor) -> float:
    """Share of the largest eigenvalue below which others are rounding."""
    return values.shape[-1] * torch.finfo(values.dtype).eps
