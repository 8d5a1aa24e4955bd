"""Second moments of one attention layer on real activations, as float64 sums that can be merged.

Inputs and keys are measured on the clean pass, because that is what the cache holds; queries on the
noisy passes, because they are what reads it (METHOD 7).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over tokens; `+` is not defined, use `merge_moments`.

    Attributes:
        tokens: Clean tokens seen, ().
        inputs: Sum of x, (d,).
        inputs_square: Sum of x xᵀ, (d, d).
        key_pairs: Sum of z zᴴ over heads for each RoPE pair of the normed key, (D/2, H, H) complex.
        key_norm: Sum of 1/rho, ().
        queries: Query tokens seen, ().
        query_square: Sum of q qᵀ for each head of the normed query, (H, D, D).
    """

    tokens: Tensor
    inputs: Tensor
    inputs_square: Tensor
    key_pairs: Tensor
    key_norm: Tensor
    queries: Tensor
    query_square: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean input mu, (d,)."""
        return self.inputs / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Covariance C of the inputs, (d, d)."""
        return self.inputs_square / self.tokens - torch.outer(self.mean, self.mean)


def measure_moments(inputs: Tensor, keys: Tensor, key_norm: Tensor, queries: Tensor) -> Moments:
    """Moments of some tokens.

    Args:
        inputs: Inputs x of the clean tokens, (N, d).
        keys: Their normed keys before RoPE, (N, H, D).
        key_norm: Their 1/rho, (N,).
        queries: Normed queries of the noisy tokens before RoPE, (M, H, D).
    """
    x, q = inputs.double(), queries.double()
    pairs = as_pairs(keys.double())
    return Moments(
        tokens=torch.tensor(len(x), dtype=torch.float64),
        inputs=x.sum(0),
        inputs_square=x.mT @ x,
        key_pairs=torch.einsum("nhf,ngf->fhg", pairs, pairs.conj()),
        key_norm=key_norm.double().sum(),
        queries=torch.tensor(len(q), dtype=torch.float64),
        query_square=torch.einsum("nhd,nhe->hde", q, q),
    )


def merge_moments(first: Moments, second: Moments) -> Moments:
    """Moments of both sets of tokens."""
    return Moments(*(a + b for a, b in zip(first, second, strict=True)))


def as_pairs(x: Tensor) -> Tensor:
    """Interleaved channels (..., D) as complex RoPE pairs (..., D/2)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
