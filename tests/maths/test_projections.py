"""How a latent layer is put together: what its parts mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from reference.latent import (
    TOYS,
    Toy,
    dense_key,
    generator,
    rope_key,
    toy,
    turned,
    turns,
)

from vmla_convert.maths.factor import INITS
from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.projections import LayerShape, key_square, real_key
from vmla_convert.maths.rope_keys import (
    fastest_rope_mix,
    gather_rope,
    principal_rope_mix,
    subtract_rope,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=6)


@repeatable
@given(TOYS)
def test_complex_rows_make_the_pairs_of_the_dense_key(toy: Toy) -> None:
    key, bias = toy.weights.key_pairs()
    pairs = torch.einsum("hfd,nd->nhf", key, toy.inputs.to(key.dtype)) + bias
    torch.testing.assert_close(as_channels(pairs), dense_key(toy.weights, toy.inputs))
    torch.testing.assert_close(real_key(key), toy.weights.key)
    torch.testing.assert_close(as_channels(bias).flatten(), toy.weights.key_bias)


@repeatable
@given(TOYS)
def test_key_square_is_that_of_the_tokens_mean_included(toy: Toy) -> None:
    z = as_pairs(dense_key(toy.weights, toy.inputs))
    square = torch.einsum("nhf,ngf->fhg", z, z.conj()) / len(z)
    found = key_square(toy.weights, toy.evidence.mean, toy.evidence.covariance)
    torch.testing.assert_close(found, square)


@repeatable
@given(TOYS)
def test_rope_keys_and_the_rest_add_up_to_the_rotated_key(toy: Toy) -> None:
    """And mixing over heads commutes with RoPE, for what is left may be turned as a whole."""
    weights, evidence = toy.weights, toy.evidence
    square = key_square(weights, evidence.mean, evidence.covariance)
    mix = principal_rope_mix(square, evidence.query_pairs + 0.1, min(7, toy.all_pairs))
    key, bias = weights.key_pairs()
    rope = gather_rope(mix, key, bias)
    left, left_bias = subtract_rope(mix, rope, key, bias)
    factors = INITS["calibrated"](
        weights,
        toy.full_shape(),
        evidence,
        generator(),
    )._replace(rope=rope)
    turn = turns(len(toy.inputs), weights.head_dim // 2)
    rest = (toy.inputs @ real_key(left).mT + as_channels(left_bias).flatten()).unflatten(
        1, (weights.num_heads, -1)
    )
    whole = rope_key(factors, toy.inputs, turn) + turned(rest, turn)
    torch.testing.assert_close(whole, turned(dense_key(weights, toy.inputs), turn))
    torch.testing.assert_close(key, weights.key_pairs()[0])


def test_the_query_map_scores_the_shared_key_as_each_heads_own_would_be() -> None:
    """RoPE of the mapped query, as the layer turns it, against RoPE of the shared key."""
    weights = toy(2, 10).weights
    mix = fastest_rope_mix(10, 2, 4)
    mix = mix._replace(mix=mix.mix * torch.tensor([[0.5 + 2j, -1j]]))
    rope = gather_rope(mix, *weights.key_pairs())
    query, turn = toy(2, 10, seed=1).inputs[0].unflatten(0, (2, 10)), turns(2, 5)
    shared = rope.rows @ toy(2, 10).inputs[0].to(rope.rows.dtype) + rope.offsets
    mapped = as_pairs(torch.einsum("hrd,hd->hr", rope.query_map, query))
    score = (mapped * turn[0, rope.pairs]).conj() * (shared * turn[1, rope.pairs])
    own = mix.mix.mT * shared
    relative = turn[1, rope.pairs] * turn[0, rope.pairs].conj()
    expected = as_pairs(query)[:, rope.pairs].conj() * own * relative
    torch.testing.assert_close(score.real.sum(1), expected.real.sum(1))


@pytest.mark.parametrize(("rank", "asked", "parts"), [(8, None, (4, 4)), (7, None, (4, 3))])
def test_a_split_left_open_is_in_halves(
    rank: int, asked: int | None, parts: tuple[int, int]
) -> None:
    assert LayerShape("split", rank, 1, asked).ranks() == parts
    assert LayerShape("split", rank, 1, 2).ranks() == (2, rank - 2)
