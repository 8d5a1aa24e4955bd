"""Bits among channels against every other way to divide them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.maths.quantise import (
    WIDTHS,
    code_bytes,
    distortions,
    gaussian_samples,
    gaussian_tables,
)
from vmla_convert.maths.rates import Purchases, Rate, allocate, purchases, truncate

GAUSSIAN = distortions(gaussian_tables(), gaussian_samples())
NARROW = GAUSSIAN[: WIDTHS.index(8) + 1]
repeatable = settings(derandomize=True, deadline=None, max_examples=12)


def energies(seed: int, channels: int, decades: float = 2.0) -> Tensor:
    """Falling energies over some decades, no two alike."""
    spread = torch.rand(channels, generator=torch.Generator().manual_seed(seed)).double()
    return (10 ** (-decades * spread)).sort(descending=True).values


def cost(layers: list[Tensor], rates: list[Rate]) -> float:
    """Cost of channels of some energies in all layers together."""
    told = dict(zip(WIDTHS, GAUSSIAN.tolist(), strict=True))
    total = 0.0
    for layer, rate in zip(layers, rates, strict=True):
        widths = [*rate.widths, *(len(layer) - len(rate.widths)) * [0]]
        total += sum(e * told[w] for e, w in zip(layer.tolist(), widths, strict=True))
    return total


def best_by_bits(layers: list[Tensor]) -> Tensor:
    """Least cost of all layers together for each number of bits, by trying all widths up to 8."""
    all_channels = torch.cat(layers)
    choices = torch.cartesian_prod(*[torch.arange(9)] * len(all_channels))
    costs = (NARROW[choices] * all_channels).sum(1)
    best = torch.full((8 * len(all_channels) + 1,), torch.inf, dtype=torch.float64)
    best = best.scatter_reduce(0, choices.sum(1), costs, "amin")
    return best.cummin(0).values


def all_sizes(layers: list[Tensor]) -> range:
    """Every size of a token in bytes, from one byte in each layer."""
    return range(len(layers), 2 * sum(map(len, layers)) + 1)


def bought(layers: list[Tensor], total: int) -> list[Rate]:
    return allocate([purchases(layer, GAUSSIAN) for layer in layers], total)


# Against brute force


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_spends_every_number_of_bits_as_well_as_can_be(seed: int) -> None:
    layer = energies(seed, 4)
    best, shop = best_by_bits([layer]), purchases(layer, GAUSSIAN)
    spent: list[int] = []
    for bits in range(2, 40):
        widths = shop.widths(bits)
        assert sum(widths) <= bits
        if sum(widths) < bits or 16 in widths:
            break
        spent.append(bits)
        assert cost([layer], [Rate(widths)]) == pytest.approx(best[bits].item(), rel=1e-9)
    assert len(spent) > 15


@pytest.mark.parametrize("channels", [(2, 2), (2, 3), (3, 3), (3, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_layers_share_bits_as_well_as_whole_bytes_allow(
    channels: tuple[int, int], seed: int
) -> None:
    """No better than bits spent at will, no worse than of these a byte less for each layer.

    Up to where a step of eight bits comes next, which may leave a byte unfilled.
    """
    layers = [energies(seed + 10 * i, count) for i, count in enumerate(channels)]
    best, compared = best_by_bits(layers), 0
    for total in all_sizes(layers):
        rates = bought(layers, total)
        if any(16 in rate.widths or sum(rate.widths) % 8 for rate in rates):
            break
        paid = cost(layers, rates)
        for layer, rate in zip(layers, rates, strict=True):
            alone = best_by_bits([layer])[: 8 * rate.token_bytes(2) + 1][-1].item()
            assert cost([layer], [rate]) == pytest.approx(alone, rel=1e-9)
        assert paid >= best[min(8 * total, len(best) - 1)].item() * (1 - 1e-9)
        assert paid <= best[8 * (total - len(layers))].item() * (1 + 1e-9)
        compared += 1
    assert compared >= sum(channels) - 2


# Sizes


@given(st.integers(0, 999), st.lists(st.integers(1, 12), min_size=1, max_size=5))
@repeatable
def test_every_byte_that_is_asked_for_is_spent_and_no_other(seed: int, counts: list[int]) -> None:
    layers = [energies(seed + i, count, decades=1 + i) for i, count in enumerate(counts)]
    for total in all_sizes(layers):
        rates = bought(layers, total)
        spent = [rate.token_bytes(2) for rate in rates]
        assert min(spent) >= 1
        assert sum(spent) == total
        for rate, layer in zip(rates, layers, strict=True):
            assert rate.quantised
            assert 0 < len(rate.widths) <= len(layer)
            assert all(width in WIDTHS[1:] for width in rate.widths)
            assert all(a >= b for a, b in pairwise(rate.widths))


@given(st.integers(0, 999), st.lists(st.integers(1, 10), min_size=1, max_size=4))
@repeatable
def test_a_larger_size_only_ever_adds_bits_and_costs_less(seed: int, counts: list[int]) -> None:
    layers = [energies(seed + i, count, decades=1 + i) for i, count in enumerate(counts)]
    before, paid = [Rate(())] * len(layers), float("inf")
    for total in all_sizes(layers):
        rates = bought(layers, total)
        for old, new in zip(before, rates, strict=True):
            assert len(new.widths) >= len(old.widths)
            assert all(a <= b for a, b in zip(old.widths, new.widths, strict=False))
        assert cost(layers, rates) < paid
        before, paid = rates, cost(layers, rates)
    assert [set(rate.widths) for rate in before] == [{16}] * len(layers)


def test_channels_that_cost_nothing_are_stored_last() -> None:
    layer = torch.cat([energies(0, 4), torch.zeros(4, dtype=torch.float64)])
    assert [rate.widths for rate in bought([layer], 8)] == [(16,) * 4]
    (rate,) = bought([layer], 7)
    assert len(rate.widths) == 4


def test_a_later_bit_is_never_worth_more_than_an_earlier_one() -> None:
    """In tables of few samples the fourth bit may help more than the third."""
    bumpy = GAUSSIAN.clone()
    bumpy[3] = bumpy[2] * 0.99
    layer = energies(0, 5)
    shop, true = purchases(layer, bumpy), -bumpy.diff() / torch.tensor(WIDTHS).diff()
    assert (shop.gains.diff() <= 0).all()
    for channel in range(5):
        mine = shop.channels == channel
        assert shop.bits[mine].tolist() == [1] * 8 + [8]
        # … and never more than it gains.
        assert (shop.gains[mine] <= layer[channel] * true * (1 + 1e-9)).all()
    for bits in range(2, 80):
        widths = shop.widths(bits)
        assert list(widths) == sorted(widths, reverse=True)


def test_a_step_that_does_not_fit_ends_the_purchase() -> None:
    shop = Purchases(
        torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 0, 1]), torch.tensor([1, 8, 1])
    )
    assert [shop.widths(budget) for budget in (1, 8, 9, 10)] == [(1,), (1,), (9,), (9, 1)]
    assert [shop.before(least) for least in (3.0, 2.0, 1.5, 0.0)] == [0, 1, 9, 10]


# Without bits


@given(st.integers(0, 999), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.floats(0, 1))
@repeatable
def test_truncation_keeps_the_most_energetic_channels_and_one_of_each_layer(
    seed: int, counts: list[int], share: float
) -> None:
    layers = [energies(seed + i, count, decades=1 + i) for i, count in enumerate(counts)]
    total = len(counts) + int(share * (sum(counts) - len(counts)))
    rates = truncate(layers, total)
    kept = [len(rate.widths) for rate in rates]
    assert sum(kept) == total
    assert min(kept) >= 1
    assert not any(rate.quantised for rate in rates)
    # The first of a layer is kept anyway.
    taken = [e for layer, count in zip(layers, kept, strict=True) for e in layer[1:count].tolist()]
    left = [e for layer, count in zip(layers, kept, strict=True) for e in layer[count:].tolist()]
    assert not taken or not left or min(taken) >= max(left)


def test_the_bytes_of_a_token() -> None:
    assert Rate((16, 8, 3)).token_bytes(4) == Rate((16, 8, 3)).token_bytes(2) == 4
    assert Rate((8, 8, 1)).token_bytes(2) == 3 == code_bytes((8, 8, 1))
    assert Rate((16, 16, 16), quantised=False).token_bytes(2) == 6
    assert Rate((16, 16, 16), quantised=False).token_bytes(4) == 12
