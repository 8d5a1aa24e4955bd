"""Bits that prediction saves: all where a channel is a copy, none where it is independent."""

from __future__ import annotations

import torch

from evals.prediction import saved_bits
from vmla_convert.maths.rates import Rate

RATE = Rate((4, 2))


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(8, 6, 40, 2, generator=torch.Generator().manual_seed(seed))


def test_a_copy_costs_nothing_and_an_independent_channel_all() -> None:
    assert saved_bits(drawn(0), drawn(0), RATE) == sum(RATE.widths)
    assert saved_bits(drawn(0), drawn(1), RATE) < 0.05


def test_half_of_the_variance_saves_half_a_bit_of_each_channel() -> None:
    target = (drawn(0) + drawn(1)) / 2**0.5
    assert abs(saved_bits(drawn(0), target, RATE) - 1.0) < 0.15
