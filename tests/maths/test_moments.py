"""Moments: what is summed, and that parts add up to the whole."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.maths.moments import (
    Moments,
    as_channels,
    as_pairs,
    measure_moments,
    merge_moments,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=20)


def tokens(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator, dtype=torch.float64) + 2


def assert_equal(moments: Moments, expected: Moments) -> None:
    for name, a, b in zip(Moments._fields, moments, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_mean_and_covariance_are_those_of_the_inputs() -> None:
    inputs = tokens(50)
    moments = measure_moments(inputs)
    assert moments.tokens == 50
    torch.testing.assert_close(moments.mean, inputs.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(inputs.mT, correction=0))


@repeatable
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_streamed_moments_equal_moments_of_all_tokens(counts: list[int]) -> None:
    parts = [tokens(count, seed) for seed, count in enumerate(counts)]
    streamed = measure_moments(parts[0])
    for part in parts[1:]:
        streamed = merge_moments([streamed, measure_moments(part)])
    together = measure_moments(torch.cat(parts))
    assert_equal(streamed, together)
    assert_equal(merge_moments(map(measure_moments, parts)), together)


def test_moments_of_single_precision_inputs_are_summed_in_double() -> None:
    inputs = tokens(30).float()
    assert_equal(measure_moments(inputs), measure_moments(inputs.double()))


@repeatable
@given(st.floats(1e-6, 1e6))
def test_a_weight_keeps_mean_and_covariance_and_changes_the_count(weight: float) -> None:
    moments = measure_moments(tokens(20))
    weighted = moments.weighted(weight)
    torch.testing.assert_close(weighted.tokens.item(), weight)
    torch.testing.assert_close(weighted.mean, moments.mean)
    torch.testing.assert_close(weighted.covariance, moments.covariance)


def test_pairs_are_interleaved_channels() -> None:
    channels = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pairs = as_pairs(channels)
    assert pairs.tolist() == [[1 + 2j, 3 + 4j]]
    assert torch.equal(as_channels(pairs), channels)
