"""Second moments of a layer's inputs, as float64 sums that can be merged and streamed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS_AT_ONCE = 8192


class Moments(NamedTuple):
    """Sums over tokens; `merge_moments` adds them.

    Attributes:
        tokens: Number of tokens, ().
        inputs: Sum of x, (d,).
        inputs_square: Sum of x xᵀ, (d, d).
    """

    tokens: Tensor
    inputs: Tensor
    inputs_square: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean input mu, (d,)."""
        return self.inputs / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Covariance C of the inputs, (d, d)."""
        return self.inputs_square / self.tokens - torch.outer(self.mean, self.mean)

    def weighted(self, weight: float | Tensor) -> Moments:
        """The same mean and covariance with the weight of `weight` tokens."""
        return Moments(*(part * (weight / self.tokens) for part in self))

    def cpu(self) -> Moments:
        """The same sums in host memory."""
        return Moments(*(part.cpu() for part in self))


def measure_moments(inputs: Tensor) -> Moments:
    """Moments of inputs (..., d), on the device of the inputs.

    The tokens become float64 some at a time. A whole clip of Wan 14B would take 2.7 GB.
    """
    x = inputs.flatten(0, -2)
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    square = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(TOKENS_AT_ONCE):
        precise = part.double()
        total += precise.sum(0)
        square.addmm_(precise.mT, precise)
    return Moments(torch.tensor(len(x), dtype=torch.float64), total, square)


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Moments of all tokens of several parts."""
    return reduce(lambda one, other: Moments(*map(torch.add, one, other)), parts)


def as_pairs(x: Tensor) -> Tensor:
    """Interleaved channels (..., D) as complex RoPE pairs (..., D/2)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def as_channels(pairs: Tensor) -> Tensor:
    """Complex RoPE pairs (..., D/2) as interleaved channels (..., D)."""
    return torch.view_as_real(pairs).flatten(-2)
