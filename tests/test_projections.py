"""How a latent layer is put together: what its parts mean, and what becomes of the key norm."""

from __future__ import annotations

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
    lost,
    predicted_square,
    raw_key,
    rope_key,
    toy,
    turned,
    turns,
)

from vmla_convert.config import LayerConfig
from vmla_convert.errors import ConfigError
from vmla_convert.maths.factor import INITS, factor
from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.positions import highest_frequency_branch, principal_branch
from vmla_convert.maths.projections import (
    LayerShape,
    gather_rope,
    key_square,
    real_bias,
    real_key,
    required,
    subtract_rope,
    weight_svd,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=20)
either_latent = pytest.mark.parametrize("latent", ["joint", "split"])
either_position = pytest.mark.parametrize("positions", ["reconstructed", "decoupled"])


@repeatable
@given(TOYS)
def test_complex_rows_make_the_pairs_of_the_dense_key(toy: Toy) -> None:
    key, bias = toy.weights.key_pairs()
    pairs = torch.einsum("hfd,nd->nhf", key, toy.inputs.to(key.dtype)) + bias
    torch.testing.assert_close(as_channels(pairs), dense_key(toy.weights, toy.inputs))
    torch.testing.assert_close(real_key(key), toy.weights.key)
    torch.testing.assert_close(real_bias(bias), toy.weights.key_bias)


@repeatable
@given(TOYS)
def test_key_square_is_that_of_the_tokens_mean_included(toy: Toy) -> None:
    z = as_pairs(dense_key(toy.weights, toy.inputs))
    square = torch.einsum("nhf,ngf->fhg", z, z.conj()) / len(z)
    found = key_square(toy.weights, toy.evidence.mean, toy.evidence.covariance)
    torch.testing.assert_close(found, square)


@repeatable
@given(TOYS)
def test_rope_branch_and_what_it_leaves_add_up_to_the_turned_key(toy: Toy) -> None:
    """And mixing over heads commutes with RoPE, for what is left may be turned as a whole."""
    weights, evidence = toy.weights, toy.evidence
    square = key_square(weights, evidence.mean, evidence.covariance)
    branch = principal_branch(square, evidence.query_pairs + 0.1, min(7, toy.all_pairs))
    key, bias = weights.key_pairs()
    rope = gather_rope(branch, key, bias)
    left, left_bias = subtract_rope(branch, rope, key, bias)
    factors = factor(
        "calibrated",
        weights,
        toy.full_shape(LayerConfig(positions="decoupled")),
        evidence,
        generator(),
    )._replace(rope=rope)
    turn = turns(len(toy.inputs), weights.head_dim // 2)
    rest = (toy.inputs @ real_key(left).mT + real_bias(left_bias)).unflatten(
        1, (weights.num_heads, -1)
    )
    whole = rope_key(factors, toy.inputs, turn) + turned(rest, turn)
    torch.testing.assert_close(whole, turned(dense_key(weights, toy.inputs), turn))
    torch.testing.assert_close(key, weights.key_pairs()[0])


def test_the_query_map_scores_the_shared_key_as_each_heads_own_would_be() -> None:
    """RoPE of the mapped query, as the layer turns it, against RoPE of the shared key."""
    weights = toy(2, 10).weights
    branch = highest_frequency_branch(10, 2, 4)
    branch = branch._replace(mix=branch.mix * torch.tensor([[0.5 + 2j, -1j]]))
    rope = gather_rope(branch, *weights.key_pairs())
    query, turn = toy(2, 10, seed=1).inputs[0].unflatten(0, (2, 10)), turns(2, 5)
    shared = rope.rows @ toy(2, 10).inputs[0].to(rope.rows.dtype) + rope.offsets
    mapped = as_pairs(torch.einsum("hrd,hd->hr", rope.query_map, query))
    score = (mapped * turn[0, rope.pairs]).conj() * (shared * turn[1, rope.pairs])
    own = branch.mix.mT * shared
    relative = turn[1, rope.pairs] * turn[0, rope.pairs].conj()
    expected = as_pairs(query)[:, rope.pairs].conj() * own * relative
    torch.testing.assert_close(score.real.sum(1), expected.real.sum(1))


@either_latent
def test_weight_svd_loses_the_tail_of_the_singular_values(latent: str) -> None:
    weights = toy().weights
    shape = LayerShape(LayerConfig(latent="joint" if latent == "joint" else "split"), 9)
    key, value = weights.key, weights.value
    parts = weight_svd(key, value, shape)
    targets = [torch.cat([key, value])] if latent == "joint" else [key, value]
    gaps = [t - part.up @ part.down for t, part in zip(targets, parts, strict=True)]
    error = sum((gap.square().sum() for gap in gaps), start=torch.tensor(0.0))
    if latent == "joint":
        tail = torch.linalg.svdvals(torch.cat([key, value]))[9:].square().sum()
    else:
        assert [len(part.down) for part in parts] == [5, 4]
        tail = torch.linalg.svdvals(key)[5:].square().sum()
        tail += torch.linalg.svdvals(value)[4:].square().sum()
    torch.testing.assert_close(error, tail)


@pytest.mark.parametrize(("rank", "asked", "parts"), [(8, None, (4, 4)), (7, None, (4, 3))])
def test_a_split_left_open_is_in_halves(
    rank: int, asked: int | None, parts: tuple[int, int]
) -> None:
    assert LayerShape(LayerConfig(latent="split"), rank, 0, asked).parts() == parts
    assert LayerShape(LayerConfig(latent="split"), rank, 0, 2).parts() == (2, rank - 2)


@either_position
@either_latent
@repeatable
@given(toy=TOYS)
def test_a_norm_from_full_latents_is_exact(positions: str, latent: str, toy: Toy) -> None:
    layer = choice(positions, latent, "latent")
    factors = factor("calibrated", toy.weights, toy.full_shape(layer), toy.evidence, generator())
    square = raw_key(toy.weights, toy.inputs).square().mean(1)
    torch.testing.assert_close(predicted_square(factors, toy.inputs), square, rtol=1e-6, atol=0)
    assert factors.norm is not None
    assert factors.norm.floor < 1e-9 * square.mean()


@either_position
@either_latent
@pytest.mark.parametrize("init", ["calibrated", "transmla"])
@pytest.mark.parametrize("rank", [2, 6, 20])
def test_a_norm_from_any_latents_is_right_on_average(
    positions: str, latent: str, init: str, rank: int
) -> None:
    """Dropped energy is in the floor; without it the norm would be too small, logits too hot."""
    data, layer = toy(), choice(positions, latent, "latent")
    shape = LayerShape(layer, rank, 3 if positions == "decoupled" else 0)
    factors = factor(init, data.weights, shape, data.evidence, generator())
    square = raw_key(data.weights, data.inputs).square().mean()
    torch.testing.assert_close(predicted_square(factors, data.inputs).mean(), square)
    assert factors.norm is not None
    assert factors.norm.floor > 0


@either_latent
@repeatable
@given(toy=TOYS)
def test_full_latents_rebuild_the_raw_key_for_its_own_norm(latent: str, toy: Toy) -> None:
    layer = choice("reconstructed", latent, "rebuilt")
    factors = factor("calibrated", toy.weights, toy.full_shape(layer), toy.evidence, generator())
    raw = raw_key(toy.weights, toy.inputs)
    rebuilt = content_key(toy.weights, factors, toy.inputs).flatten(1)
    torch.testing.assert_close(rebuilt, raw, rtol=1e-6, atol=1e-6 * raw.abs().max().item())
    assert factors.norm is not None
    assert factors.norm.floor < 1e-9 * raw.square().mean()


@either_latent
@pytest.mark.parametrize("rank", [2, 6, 20])
def test_a_norm_of_the_rebuilt_key_is_right_on_average(latent: str, rank: int) -> None:
    data, layer = toy(), choice("reconstructed", latent, "rebuilt")
    factors = factor(
        "calibrated", data.weights, LayerShape(layer, rank), data.evidence, generator()
    )
    assert factors.norm is not None
    rebuilt = content_key(data.weights, factors, data.inputs).square().flatten(1).mean()
    square = raw_key(data.weights, data.inputs).square().mean()
    torch.testing.assert_close(rebuilt + factors.norm.floor[0], square)


@pytest.mark.parametrize("init", INITS)
def test_the_floor_of_a_rebuilt_norm_is_the_mean_square_of_what_is_missed(init: str) -> None:
    """Of inputs as the init knows them: measured, or white."""
    data, layer = toy(), choice("reconstructed", "joint", "rebuilt")
    factors = factor(init, data.weights, LayerShape(layer, 8), data.evidence, generator())
    assert factors.norm is not None
    inputs = data.inputs
    if init not in ("calibrated", "transmla"):
        root = data.width**0.5 * torch.eye(data.width, dtype=torch.float64)
        inputs = torch.cat([root, -root])
    missed = raw_key(data.weights, inputs) - content_key(data.weights, factors, inputs).flatten(1)
    torch.testing.assert_close(factors.norm.floor[0], missed.square().mean())


@pytest.mark.parametrize("k_norm", ["latent", "rebuilt"])
def test_channels_without_gain_leave_all_finite_and_their_energy_in_the_norm(k_norm: str) -> None:
    data, layer = toy(), choice("reconstructed", "joint", k_norm)
    gain = data.weights.key_gain.clone()
    gain[3:9] = 0
    weights = data.weights._replace(key_gain=gain)
    factors = factor("calibrated", weights, data.full_shape(layer), data.evidence, generator())
    square = raw_key(weights, data.inputs).square().mean()
    if k_norm == "latent":
        mean = predicted_square(factors, data.inputs).mean()
    else:
        assert factors.norm is not None
        mean = content_key(weights, factors, data.inputs).square().mean() + factors.norm.floor[0]
    torch.testing.assert_close(mean, square)


def test_a_stored_norm_needs_no_predictor() -> None:
    data = toy()
    for positions in ("reconstructed", "decoupled"):
        shape = data.full_shape(choice(positions, "joint", "stored"))
        assert factor("calibrated", data.weights, shape, data.evidence, generator()).norm is None


def test_how_the_norm_is_had_changes_no_gained_key() -> None:
    data, keys = toy(), []
    for k_norm in ("stored", "latent", "rebuilt"):
        shape = LayerShape(choice("reconstructed", "joint", k_norm), 6)
        factors = factor("calibrated", data.weights, shape, data.evidence, generator())
        gain = data.weights.key_gain if k_norm == "rebuilt" else torch.ones(data.width)
        keys.append(content_key(data.weights, factors, data.inputs).flatten(1) * gain)
    torch.testing.assert_close(keys[1], keys[0])
    torch.testing.assert_close(keys[2], keys[0])


def test_required_evidence_is_given_back_or_asked_for() -> None:
    evidence = toy().evidence
    assert required(evidence, "x") is evidence
    with pytest.raises(ConfigError, match="'x' needs calibration clips"):
        required(None, "x")


def choice(positions: str, latent: str, k_norm: str = "stored") -> LayerConfig:
    """A layer from plain strings, as parametrisation hands them."""
    return LayerConfig(
        positions="decoupled" if positions == "decoupled" else "reconstructed",
        latent="split" if latent == "split" else "joint",
        k_norm="latent" if k_norm == "latent" else "rebuilt" if k_norm == "rebuilt" else "stored",
    )


def test_the_reference_finds_no_loss_in_a_lossless_layer_and_some_in_a_small_one() -> None:
    """What other tests measure by is checked here on the dense layer itself."""
    data, layer = toy(), LayerConfig()
    (dense,) = weight_svd(data.weights.key, data.weights.value, LayerShape(layer, data.width))
    factors = factor("spectral", data.weights, LayerShape(layer, data.width), None, generator())
    torch.testing.assert_close(dense.down, factors.kv_a_proj)
    scale = dense_value(data.weights, data.inputs).square().sum(1).mean().item()
    assert lost(data, layer, factors) < 1e-20 * scale
    small = factor("spectral", data.weights, LayerShape(layer, 3), None, generator())
    assert lost(data, layer, small) > 1e-3 * scale
