"""Factorisation: lossless at full size, optimal in its own norm, and honest about what it loses."""

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
    rebuilt_key,
    toy,
    turned,
    turns,
    value,
)

from vmla_convert.errors import ConfigError
from vmla_convert.maths.evidence import Evidence, assume_evidence
from vmla_convert.maths.factor import DATA_INITS, INITS, predict_errors
from vmla_convert.maths.moments import as_pairs
from vmla_convert.maths.projections import Factors, LatentKind, LayerShape

repeatable = settings(derandomize=True, deadline=None, max_examples=6)
few = settings(derandomize=True, deadline=None, max_examples=3)

either_latent = pytest.mark.parametrize("latent", ["joint", "split"])


def assert_lossless(toy: Toy, factors: Factors) -> None:
    """Keys after any rotation of every pair, and values, are those of the dense layer."""
    weights, inputs = toy.weights, toy.inputs
    turn = turns(len(inputs), weights.head_dim // 2)
    dense = turned(dense_key(weights, inputs), turn)
    torch.testing.assert_close(rebuilt_key(weights, factors, inputs, turn), dense)
    torch.testing.assert_close(value(factors, inputs), dense_value(weights, inputs))


@either_latent
@repeatable
@given(toy=TOYS)
def test_calibrated_is_lossless_with_all_directions_and_all_pairs(
    latent: LatentKind, toy: Toy
) -> None:
    shape = toy.full_shape(latent)
    assert_lossless(toy, INITS["calibrated"](toy.weights, shape, toy.evidence, generator()))


@either_latent
def test_assumed_evidence_is_enough_to_be_lossless(latent: LatentKind) -> None:
    for seed in range(2):
        data = toy(3, 10, seed)
        evidence = assume_evidence(data.weights, data.evidence.phases[0])
        shape = data.full_shape(latent)
        assert_lossless(data, INITS["calibrated"](data.weights, shape, evidence, generator()))


def test_energies_of_many_decades_cost_no_precision() -> None:
    """Lossless to float32 rounding, on covariances as steep as those of real layers."""
    data = toy(4, 16)
    axes = torch.linalg.qr(data.inputs.mT @ data.inputs).Q
    scales = torch.logspace(0, -5, data.width, dtype=torch.float64)
    inputs = data.inputs @ axes * scales @ axes.mT
    evidence = data.evidence._replace(
        mean=inputs.mean(0), covariance=torch.cov(inputs.mT, correction=0)
    )
    factors = INITS["calibrated"](data.weights, data.full_shape(), evidence, generator())
    gap = value(factors, inputs) - dense_value(data.weights, inputs)
    spread = (inputs - inputs.mean(0)) @ data.weights.value.mT
    assert gap.norm() < 1e-6 * spread.norm()


def test_spectral_is_lossless_but_for_its_rope_pairs() -> None:
    data, weights = toy(), toy().weights
    factors = INITS["spectral"](weights, LayerShape("joint", data.width, 2), None, generator())
    torch.testing.assert_close(value(factors, data.inputs), dense_value(weights, data.inputs))
    roped = factors.rope.pairs.tolist()
    kept = [pair for pair in range(7) if pair not in roped]
    content = as_pairs(content_key(weights, factors, data.inputs))
    torch.testing.assert_close(
        content[..., kept], as_pairs(dense_key(weights, data.inputs))[..., kept]
    )
    assert content[..., roped].abs().max() < 1e-12


@either_latent
def test_spectral_loses_the_tail_of_the_singular_values(latent: LatentKind) -> None:
    weights = toy().weights
    factors = INITS["spectral"](weights, LayerShape(latent, 9, 1), None, generator())
    content = weights.key_pairs()[0]
    content[:, factors.rope.pairs] = 0
    key, values = torch.view_as_real(content).movedim(-1, 2).flatten(0, 2), weights.value
    down = factors.kv_a_proj
    if latent == "joint":
        parts = [(torch.cat([key, values]), 9)]
        rebuilt = [torch.cat([factors.kv_b_proj_k, factors.kv_b_proj_v]) @ down]
    else:
        parts = [(key, 5), (values, 4)]
        rebuilt = [factors.kv_b_proj_k @ down[:5], factors.kv_b_proj_v @ down[5:]]
    for (target, rank), found in zip(parts, rebuilt, strict=True):
        tail = torch.linalg.svdvals(target)[rank:].square().sum()
        torch.testing.assert_close((target - found).square().sum(), tail)


@either_latent
def test_means_and_biases_cost_no_rank(latent: LatentKind) -> None:
    """At the mean input the latent is zero, and keys and values are those of all directions."""
    data = toy()
    mean = data.evidence.mean[None]
    turn = turns(1, 7)
    small, full = (
        INITS["calibrated"](data.weights, shape, data.evidence, generator())
        for shape in (
            LayerShape(latent, 2, 1),
            data.full_shape(latent)._replace(rope_pairs=1),
        )
    )
    assert (small.kv_a_proj @ mean[0] + small.kv_a_bias).abs().max() < 1e-9
    torch.testing.assert_close(
        rebuilt_key(data.weights, small, mean, turn), rebuilt_key(data.weights, full, mean, turn)
    )
    torch.testing.assert_close(value(small, mean), dense_value(data.weights, mean))


def uncentred(evidence: Evidence) -> Evidence:
    """The same knowledge for one who takes second moments about zero."""
    mean = evidence.mean
    return evidence._replace(
        mean=torch.zeros_like(mean), covariance=evidence.covariance + torch.outer(mean, mean)
    )


@either_latent
@few
@given(toy=TOYS)
def test_centring_is_never_worse(latent: LatentKind, toy: Toy) -> None:
    """At all ranks, on the tokens themselves, whose mean is large."""
    pairs = min(3, toy.all_pairs)
    for rank in range(2, toy.width + 1, 7):
        shape = LayerShape(latent, rank, pairs)
        centred, about_zero = (
            lost(toy, INITS["calibrated"](toy.weights, shape, evidence, generator()))
            for evidence in (toy.evidence, uncentred(toy.evidence))
        )
        assert centred <= about_zero * (1 + 1e-9) + 1e-9


@either_latent
@pytest.mark.parametrize("name", [name for name in INITS if name != "calibrated"])
@few
@given(toy=TOYS)
def test_calibrated_is_the_best_init_in_its_metric(name: str, latent: LatentKind, toy: Toy) -> None:
    for rank in range(2, toy.width + 1, 7):
        shape = LayerShape(latent, rank, 1)
        ours, theirs = (
            lost(toy, INITS[init](toy.weights, shape, toy.evidence, generator()))
            for init in ("calibrated", name)
        )
        assert ours <= theirs * (1 + 1e-9) + 1e-9


def assert_predicted(toy: Toy, latent: LatentKind, sizes: range) -> None:
    """`calibrated` loses what the curve says, under the plan that the curve gives."""
    curve = predict_errors(toy.weights, latent, toy.evidence, sizes.stop, (1, 2, 4))
    for size in sizes:
        pairs = curve.rope_pairs[size]
        key_rank = curve.key_ranks[size] if curve.key_ranks else None
        shape = LayerShape(latent, size - 2 * pairs, pairs, key_rank)
        factors = INITS["calibrated"](toy.weights, shape, toy.evidence, generator())
        expected = pytest.approx(curve.errors[size].item(), rel=1e-6, abs=1e-9)
        assert lost(toy, factors) == expected


@either_latent
@pytest.mark.parametrize(("keys", "values"), [(20, 1), (1, 1e-6)])
def test_predicted_errors_are_what_is_lost(latent: LatentKind, keys: float, values: float) -> None:
    """Predicted errors: of truncation, and of leaving pairs without a rope key unrotated.

    Cheap values still get a number of a split latent, which dearer keys then go without.
    """
    data = toy(2, 8)
    evidence = data.evidence._replace(
        key_metric=keys * data.evidence.key_metric,
        value_metric=values * data.evidence.value_metric,
    )
    assert_predicted(data._replace(evidence=evidence), latent, range(6, 24, 3))


@either_latent
def test_predicted_errors_fall_with_the_size_and_take_the_best_number_of_pairs(
    latent: LatentKind,
) -> None:
    data, most = toy(), 40
    curves = {
        pairs: predict_errors(data.weights, latent, data.evidence, most, (pairs,))
        for pairs in (1, 2, 5, 12)
    }
    for pairs, curve in curves.items():
        assert len(curve.errors) == len(curve.rope_pairs) == most + 1
        smallest = 2 * pairs + (1 if latent == "joint" else 2)
        assert (curve.errors[:smallest] == torch.inf).all()
        assert (curve.errors[smallest:].diff() <= 0).all()
    best = predict_errors(data.weights, latent, data.evidence, most, (1, 2, 5, 12))
    torch.testing.assert_close(
        best.errors, torch.stack([curve.errors for curve in curves.values()]).amin(0)
    )
    for size in range(4, most + 1):
        assert curves[best.rope_pairs[size]].errors[size] == best.errors[size]
    assert len(set(best.rope_pairs[4:])) > 1


def test_prediction_needs_evidence() -> None:
    with pytest.raises(ConfigError, match="needs calibration"):
        predict_errors(toy().weights, "joint", None, 10)


@pytest.mark.parametrize("name", INITS)
def test_only_data_inits_ask_for_evidence(name: str) -> None:
    def make() -> Factors:
        return INITS[name](toy().weights, LayerShape("joint", 4, 2), None, generator())

    if name in DATA_INITS:
        with pytest.raises(ConfigError, match=f"'{name}' needs calibration"):
            make()
    else:
        assert make().phases is None


@either_latent
@pytest.mark.parametrize("name", INITS)
def test_every_init_gives_finite_numbers_of_the_shape(name: str, latent: LatentKind) -> None:
    data = toy()
    shape = LayerShape(latent, 5, 3, 2 if latent == "split" else None)
    factors = INITS[name](data.weights, shape, data.evidence, generator())
    assert factors.kv_a_proj.shape == (5, data.width)
    assert factors.kv_a_bias.shape == (5,)
    assert factors.kv_b_proj_k.shape == (data.width, 2 if latent == "split" else 5)
    assert factors.kv_b_proj_v.shape == (data.width, 3 if latent == "split" else 5)
    assert factors.kv_b_bias_k.shape == factors.kv_b_bias_v.shape == (data.width,)
    assert (factors.phases is not None) == (name == "calibrated")
    assert factors.rope.rows.shape == (3, data.width)
    assert factors.rope.offsets.shape == factors.rope.pairs.shape == (3,)
    assert factors.rope.query_map.shape == (3, 6, 14)
    assert int(factors.rope.pairs.max()) < 7
    parts = [*factors[:6], *factors.rope]
    assert all(part.isfinite().all() for part in parts)


def test_a_layer_without_any_cost_becomes_finite() -> None:
    """Zero gates give zero gradients, which must not become NaN."""
    data = toy()
    nothing = Evidence(*data.evidence[:2], *(0 * part for part in data.evidence[2:]))
    shape = LayerShape("joint", 5, 3)
    factors = INITS["calibrated"](data.weights, shape, nothing, generator())
    parts = [*factors[:6], *factors.rope]
    assert all(part.isfinite().all() for part in parts)


@either_latent
def test_the_unit_of_costs_changes_no_key_and_no_value(latent: LatentKind) -> None:
    data = toy()
    evidence, unit = data.evidence, 1e-8
    scaled = evidence._replace(
        key_metric=unit * evidence.key_metric,
        value_metric=unit * evidence.value_metric,
        query_pairs=unit * evidence.query_pairs,
    )
    shape = LayerShape(latent, 12, 4)
    first, second = (
        INITS["calibrated"](data.weights, shape, e, generator()) for e in (evidence, scaled)
    )
    turn = turns(len(data.inputs), 7)
    torch.testing.assert_close(
        rebuilt_key(data.weights, first, data.inputs, turn),
        rebuilt_key(data.weights, second, data.inputs, turn),
    )
    torch.testing.assert_close(value(first, data.inputs), value(second, data.inputs))
    first, second = (predict_errors(data.weights, latent, e, 30) for e in (evidence, scaled))
    torch.testing.assert_close(second.errors, unit * first.errors, atol=0, rtol=1e-6)
    assert second.rope_pairs == first.rope_pairs
