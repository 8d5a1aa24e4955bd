"""Moments: what is summed, and that parts add up to the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.maths.moments import Moments, as_pairs, measure_moments, merge_moments


def sample(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(tokens, 12), normal(tokens, 2, 6), normal(tokens).abs(), normal(tokens + 3, 2, 6)


def test_covariance_is_that_of_the_inputs() -> None:
    inputs, *rest = sample(50, 0)
    moments = measure_moments(inputs, *rest)
    torch.testing.assert_close(moments.covariance, torch.cov(inputs.mT, correction=0))
    torch.testing.assert_close(moments.mean, inputs.mean(0))


def test_streamed_moments_equal_moments_of_all_tokens() -> None:
    first, second = sample(7, 1), sample(5, 2)
    merged = merge_moments(measure_moments(*first), measure_moments(*second))
    together = measure_moments(*(torch.cat(both) for both in zip(first, second, strict=True)))
    for name, a, b in zip(Moments._fields, merged, together, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_key_pairs_are_hermitian_with_the_energy_of_each_head() -> None:
    _, keys, *_ = data = sample(20, 3)
    pairs = measure_moments(*data).key_pairs
    torch.testing.assert_close(pairs, pairs.mH)
    energy = keys.unflatten(-1, (-1, 2)).square().sum((0, -1))
    torch.testing.assert_close(pairs.diagonal(dim1=-2, dim2=-1).real.mT, energy)


def test_pairs_are_interleaved_channels() -> None:
    pairs = as_pairs(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert pairs.tolist() == [[1 + 2j, 3 + 4j]]
