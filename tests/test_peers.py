"""Published converters: each has the property that it is known for."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from reference.latent import (
    TOYS,
    Toy,
    content_key,
    dense_key,
    dense_value,
    generator,
    rebuilt_key,
    rope_key,
    shared_keys,
    toy,
    turned,
    turns,
    value,
)
from torch import Tensor

from vmla_convert.maths.factor import factor
from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.projections import Factors, LayerShape
from vmla_convert.maths.rope3d import axis_pairs

repeatable = settings(derandomize=True, deadline=None, max_examples=15)
Latent = Literal["joint", "split"]
either_latent = pytest.mark.parametrize("latent", ["joint", "split"])


def shape_of(toy: Toy, rope_pairs: int, rank: int | None = None) -> LayerShape:
    return LayerShape("joint", toy.width if rank is None else rank, rope_pairs)


def chosen(factors: Factors) -> list[int]:
    return factors.rope.pairs.tolist()


def key_pairs(toy: Toy) -> Tensor:
    """z of all tokens, (n, H, D/2) complex."""
    return as_pairs(dense_key(toy.weights, toy.inputs))


def content_pairs(toy: Toy, factors: Factors) -> Tensor:
    """What of z is rebuilt from the latent, (n, H, D/2) complex."""
    return as_pairs(content_key(toy.weights, factors, toy.inputs))


@repeatable
@given(TOYS)
def test_mha2mla_takes_the_strongest_pairs_of_any_head_by_both_norms(toy: Toy) -> None:
    weights, heads, half = toy.weights, toy.weights.num_heads, toy.weights.head_dim // 2
    query = toy.inputs @ weights.query.mT + weights.query_bias
    query_norm = as_pairs(query.unflatten(1, (heads, -1))).abs().square().mean(0).sqrt()
    strength = query_norm * key_pairs(toy).abs().square().mean(0).sqrt()
    count = (toy.all_pairs + 1) // 2
    strongest = strength.flatten().topk(count).indices
    factors = factor("mha2mla", weights, shape_of(toy, count), toy.evidence, generator())
    assert chosen(factors) == (strongest % half).tolist()
    # Each rope key is that pair of that head alone, and exactly.
    owners = strongest // half
    own = key_pairs(toy)[:, owners, strongest % half]
    torch.testing.assert_close(shared_keys(factors, toy.inputs), own)
    turn = turns(len(toy.inputs), half)
    kept = torch.zeros(heads, half, dtype=torch.bool)
    kept[owners, strongest % half] = True
    carried = as_channels(key_pairs(toy) * turn[:, None] * kept)
    torch.testing.assert_close(rope_key(factors, toy.inputs, turn), carried)
    # The rest is content, whose rotation is dropped.
    torch.testing.assert_close(content_pairs(toy, factors), key_pairs(toy) * ~kept)


@repeatable
@given(TOYS)
def test_xecomla_carries_the_last_pairs_as_the_mean_over_heads(toy: Toy) -> None:
    half = toy.weights.head_dim // 2
    count = (half + 1) // 2
    factors = factor("xecomla", toy.weights, shape_of(toy, count), None, generator())
    assert chosen(factors) == list(range(half - count, half))
    z = key_pairs(toy)
    mean = z[:, :, half - count :].mean(1)
    torch.testing.assert_close(shared_keys(factors, toy.inputs), mean)
    turn = turns(len(toy.inputs), half)
    carried = torch.zeros_like(z)
    carried[:, :, half - count :] = (mean * turn[:, half - count :])[:, None]
    torch.testing.assert_close(rope_key(factors, toy.inputs, turn), as_channels(carried))
    rest = z.clone()
    rest[:, :, half - count :] = 0
    torch.testing.assert_close(content_pairs(toy, factors), rest)


@repeatable
@given(TOYS)
def test_transmla_folds_neighbours_of_one_axis_that_turn_as_the_first(toy: Toy) -> None:
    """Pairs of an axis that has rope keys are all carried, each once."""
    half = toy.weights.head_dim // 2
    axes = torch.repeat_interleave(torch.arange(3), torch.tensor(axis_pairs(2 * half)))
    for count in range(1, half + 1):
        factors = factor("transmla", toy.weights, shape_of(toy, count), toy.evidence, generator())
        query_map = factors.rope.query_map.view(-1, count, 2, half, 2)
        carried = query_map.abs().sum((0, 2, 4)) > 0
        for first, row in zip(chosen(factors), carried, strict=True):
            group = row.nonzero().flatten().tolist()
            assert group == list(range(first, first + len(group)))
            assert len(set(axes[group].tolist())) == 1
        served = torch.isin(axes, axes[factors.rope.pairs])
        assert torch.equal(carried.sum(0), served.long())


@repeatable
@given(TOYS)
def test_transmla_rope_keys_are_the_principal_real_mixes_of_their_groups(toy: Toy) -> None:
    """No other real mix of heads and members rebuilds more of a group, mean included."""
    weights, half = toy.weights, toy.weights.head_dim // 2
    factors = factor("transmla", weights, shape_of(toy, 1), toy.evidence, generator())
    time = axis_pairs(weights.head_dim)[0]
    group = key_pairs(toy)[:, :, :time].flatten(1)
    still = turns(len(toy.inputs), half) ** 0
    carried = as_pairs(rope_key(factors, toy.inputs, still))[:, :, :time].flatten(1)
    channels = torch.cat([group.real, group.imag])
    tail = torch.linalg.svdvals(channels).square()[1:].sum()
    torch.testing.assert_close((group - carried).abs().square().sum(), tail)


@repeatable
@given(TOYS)
def test_transmla_loses_nothing_but_rotation_with_all_outputs_kept(toy: Toy) -> None:
    """Folding is a choice of what rotates as what; at rest its parts add up again.

    Outputs are not centred, so the biases cost one direction more than there are inputs.
    """
    half = toy.weights.head_dim // 2
    shape = shape_of(toy, min(half, 3), toy.width + 1)
    factors = factor("transmla", toy.weights, shape, toy.evidence, generator())
    still = turns(len(toy.inputs), half) ** 0
    rebuilt = rebuilt_key(toy.weights, factors, toy.inputs, still)
    torch.testing.assert_close(rebuilt, dense_key(toy.weights, toy.inputs))
    torch.testing.assert_close(value(factors, toy.inputs), dense_value(toy.weights, toy.inputs))


@pytest.mark.parametrize("head_dim", [6, 14, 16])
def test_transmla_with_a_rope_key_for_each_pair_of_one_head_is_exact(head_dim: int) -> None:
    """Then nothing is shared or folded, and nothing of the key is left for the latent."""
    data = toy(1, head_dim)
    shape = shape_of(data, head_dim // 2)
    factors = factor("transmla", data.weights, shape, data.evidence, generator())
    turn = turns(len(data.inputs), head_dim // 2)
    rebuilt = rebuilt_key(data.weights, factors, data.inputs, turn)
    torch.testing.assert_close(rebuilt, turned(dense_key(data.weights, data.inputs), turn))
    assert content_pairs(data, factors).abs().max() < 1e-12


@either_latent
@repeatable
@given(toy=TOYS)
def test_transmla_keeps_the_most_of_the_balanced_outputs(latent: Latent, toy: Toy) -> None:
    """At every rank its error is the tail of what rope keys left of the keys, and of the values."""
    still = turns(len(toy.inputs), toy.weights.head_dim // 2) ** 0
    whole = factor("transmla", toy.weights, shape_of(toy, 1), toy.evidence, generator())
    key = dense_key(toy.weights, toy.inputs) - rope_key(whole, toy.inputs, still)
    key, values = key.flatten(1), dense_value(toy.weights, toy.inputs)
    ratio = key.norm() / values.norm()
    for rank in range(2, toy.width + 1, 7):
        shape = LayerShape(latent, rank, 1)
        factors = factor("transmla", toy.weights, shape, toy.evidence, generator())
        gaps = (
            (content_key(toy.weights, factors, toy.inputs).flatten(1) - key) / ratio,
            value(factors, toy.inputs) - values,
        )
        if latent == "joint":
            tail = torch.linalg.svdvals(torch.cat([key / ratio, values], 1))[rank:].square().sum()
        else:
            parts = zip((key / ratio, values), shape.parts(), strict=True)
            tail = sum(torch.linalg.svdvals(part)[r:].square().sum() for part, r in parts)
        error = gaps[0].square().sum() + gaps[1].square().sum()
        torch.testing.assert_close(error, torch.as_tensor(tail))


def test_transmla_weighs_keys_and_values_alike_whatever_their_size() -> None:
    data, shape = toy(), LayerShape("joint", 6, 1)
    loud = data.weights._replace(key_gain=50 * data.weights.key_gain)
    values = [
        value(factor("transmla", weights, shape, data.evidence, generator()), data.inputs)
        for weights in (data.weights, loud)
    ]
    torch.testing.assert_close(values[1], values[0])
