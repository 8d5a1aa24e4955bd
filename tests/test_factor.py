"""Factorisation: lossless at full size, optimal in its own norm, exact in means and biases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.factor import (
    INITS,
    Budget,
    Evidence,
    Factors,
    KVWeights,
    calibrated,
    psd_sqrt,
    spectral,
    two_sided,
)
from vmla_convert.maths.moments import as_pairs, measure_moments

HEADS, HEAD_DIM, TOKENS = 3, 14, 600
WIDTH = HEADS * HEAD_DIM
PAIRS = HEAD_DIM // 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def weights() -> KVWeights:
    return KVWeights(
        key=normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5,
        key_bias=normal(WIDTH, seed=2),
        value=normal(WIDTH, WIDTH, seed=3) / WIDTH**0.5,
        value_bias=normal(WIDTH, seed=4),
        output=normal(WIDTH, WIDTH, seed=5) / WIDTH**0.5,
        num_heads=HEADS,
    )


@pytest.fixture
def inputs() -> Tensor:
    """Tokens with a large mean and a decaying spectrum, as activations have."""
    decay = torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    mixing = normal(WIDTH, WIDTH, seed=6)
    return normal(TOKENS, WIDTH, seed=7) * decay @ mixing + 3 * normal(WIDTH, seed=8)


@pytest.fixture
def evidence(weights: KVWeights, inputs: Tensor) -> Evidence:
    raw = inputs @ weights.key.mT + weights.key_bias
    norm = raw.square().mean(-1).rsqrt()
    keys = (raw * norm[:, None]).unflatten(-1, (HEADS, -1))
    queries = normal(TOKENS, HEADS, HEAD_DIM, seed=9) * torch.tensor([[[2.0], [1.0], [0.5]]])
    moments = measure_moments(inputs, keys, norm, queries)
    phases = torch.polar(torch.linspace(0.1, 0.9, PAIRS), torch.linspace(-1, 1, PAIRS))
    return Evidence(moments, phases.to(torch.complex128))


def values_of(factors: Factors, x: Tensor) -> Tensor:
    latent = x @ factors.kv_a_proj.mT + factors.kv_a_bias
    return latent @ factors.kv_b_proj_v.mT + factors.kv_b_bias_v


def logits_of(factors: Factors, x: Tensor, query: Tensor, turn: Tensor) -> Tensor:
    """q · RoPE(k) per token and head with every pair turned by `turn` (D/2,), unnormalised."""
    latent = x @ factors.kv_a_proj.mT + factors.kv_a_bias
    nope = (latent @ factors.kv_b_proj_k.mT + factors.kv_b_bias_k).unflatten(-1, (HEADS, -1))
    rope = as_pairs(x @ factors.k_rope_proj.mT + factors.k_rope_bias)
    rope = torch.view_as_real(rope * turn[list(factors.rope_pairs)]).flatten(-2)
    q_rope = torch.einsum("hd,hrd->hr", query, factors.q_rope_map)
    return torch.einsum("nhd,hd->nh", nope, query) + torch.einsum("nr,hr->nh", rope, q_rope)


def dense_logits(weights: KVWeights, x: Tensor, query: Tensor, turn: Tensor) -> Tensor:
    keys = as_pairs((x @ weights.key.mT + weights.key_bias).unflatten(-1, (HEADS, -1)))
    return torch.einsum("nhf,hf->nh", keys * turn, as_pairs(query).conj()).real


def turns() -> Tensor:
    return torch.polar(torch.ones(PAIRS, dtype=torch.float64), torch.arange(PAIRS).double())


def test_calibrated_is_lossless_with_all_directions_and_all_pairs(
    weights: KVWeights, inputs: Tensor, evidence: Evidence
) -> None:
    factors = calibrated(weights, Budget(WIDTH, HEADS * PAIRS), evidence, generator(0))
    query = normal(HEADS, HEAD_DIM, seed=10)
    torch.testing.assert_close(
        logits_of(factors, inputs, query, turns()), dense_logits(weights, inputs, query, turns())
    )
    dense_values = inputs @ weights.value.mT + weights.value_bias
    torch.testing.assert_close(values_of(factors, inputs), dense_values)


def test_without_positions_spectral_is_lossless_but_for_its_rope_pairs(
    weights: KVWeights, inputs: Tensor
) -> None:
    factors = spectral(weights, Budget(WIDTH, 2), None, generator(0))
    dense_values = inputs @ weights.value.mT + weights.value_bias
    torch.testing.assert_close(values_of(factors, inputs), dense_values)
    kept = [pair for pair in range(PAIRS) if pair not in factors.rope_pairs]
    latent = inputs @ factors.kv_a_proj.mT + factors.kv_a_bias
    nope = latent @ factors.kv_b_proj_k.mT + factors.kv_b_bias_k
    dense = inputs @ weights.key.mT + weights.key_bias
    rebuilt, target = (as_pairs(k.unflatten(-1, (HEADS, -1))) for k in (nope, dense))
    torch.testing.assert_close(rebuilt[..., kept], target[..., kept])
    assert rebuilt[..., list(factors.rope_pairs)].abs().max() < 1e-9


def test_spectral_truncation_error_is_the_discarded_tail(weights: KVWeights) -> None:
    rank = 9
    factors = spectral(weights, Budget(rank, 1), None, generator(0))
    full = spectral(weights, Budget(WIDTH, 1), None, generator(0))
    stacked = torch.cat([full.kv_b_proj_k, full.kv_b_proj_v]) @ full.kv_a_proj
    rebuilt = torch.cat([factors.kv_b_proj_k, factors.kv_b_proj_v]) @ factors.kv_a_proj
    tail = torch.linalg.svdvals(stacked)[rank:].square().sum()
    torch.testing.assert_close((stacked - rebuilt).square().sum(), tail)


def test_means_and_biases_cost_no_rank(
    weights: KVWeights, inputs: Tensor, evidence: Evidence
) -> None:
    factors = calibrated(weights, Budget(1, 1), evidence, generator(0))
    mean = inputs.mean(0, keepdim=True)
    dense = mean @ weights.value.mT + weights.value_bias
    torch.testing.assert_close(values_of(factors, mean), dense)


def two_sided_problem() -> tuple[Tensor, Tensor, Tensor]:
    target, side = normal(20, 12, seed=11), normal(20, 20, seed=12)
    spread = normal(12, 12, seed=13) * torch.logspace(0, -2, 12, dtype=torch.float64)
    return target, psd_sqrt(side @ side.mT), spread @ spread.mT


def weighted_error(target: Tensor, side: Tensor, covariance: Tensor, rebuilt: Tensor) -> float:
    gap = side @ (target - rebuilt)
    return torch.einsum("nd,de,ne->", gap, covariance, gap).item()


def test_two_sided_optimum_beats_a_thousand_perturbations_of_itself() -> None:
    target, side, covariance = two_sided_problem()
    down, up = two_sided(target, side, covariance, 4)
    best = weighted_error(target, side, covariance, up @ down)
    for seed in range(1000):
        noise = 10.0 ** -(1 + seed % 4)
        moved_down = down + noise * normal(*down.shape, seed=2 * seed)
        moved_up = up + noise * normal(*up.shape, seed=2 * seed + 1)
        assert weighted_error(target, side, covariance, moved_up @ moved_down) >= best


def test_two_sided_error_is_the_discarded_tail_and_falls_with_rank() -> None:
    target, side, covariance = two_sided_problem()
    energies = torch.linalg.svdvals(side @ target @ psd_sqrt(covariance)).square()
    for rank in range(1, 13):
        down, up = two_sided(target, side, covariance, rank)
        error = weighted_error(target, side, covariance, up @ down)
        assert error == pytest.approx(energies[rank:].sum().item(), rel=1e-6, abs=1e-9)


def test_one_decomposition_serves_every_rank() -> None:
    target, side, covariance = two_sided_problem()
    down, up = two_sided(target, side, covariance, 10)
    small_down, small_up = two_sided(target, side, covariance, 3)
    torch.testing.assert_close(small_up @ small_down, up[:, :3] @ down[:3])


def test_centring_is_never_worse(weights: KVWeights, inputs: Tensor) -> None:
    """The best affine approximation beats the best linear one on data with a mean."""
    target = weights.value
    centred = torch.cov(inputs.mT, correction=0)
    raw = inputs.mT @ inputs / len(inputs)
    side = torch.eye(WIDTH, dtype=torch.float64)
    for rank in (1, 4, 8, 20):
        down, up = two_sided(target, side, centred, rank)
        affine = weighted_error(target, side, centred, up @ down)
        down, up = two_sided(target, side, raw, rank)
        linear = weighted_error(target, side, raw, up @ down)
        assert affine <= linear * (1 + 1e-9)


def test_calibrated_beats_spectral_on_the_data_it_saw(
    weights: KVWeights, inputs: Tensor, evidence: Evidence
) -> None:
    dense = inputs @ weights.value.mT + weights.value_bias
    errors = {}
    for name in ("spectral", "calibrated"):
        factors = INITS[name](weights, Budget(8, 2), evidence, generator(0))
        gap = (values_of(factors, inputs) - dense) @ weights.output.mT
        errors[name] = gap.square().sum().item()
    assert errors["calibrated"] < 0.5 * errors["spectral"]


def test_calibrated_without_evidence_is_refused(weights: KVWeights) -> None:
    with pytest.raises(ConfigError, match="needs calibration"):
        calibrated(weights, Budget(4, 2), None, generator(0))


@pytest.mark.parametrize("name", INITS)
def test_every_init_gives_the_shapes_of_its_budget(
    name: str, weights: KVWeights, evidence: Evidence
) -> None:
    factors = INITS[name](weights, Budget(5, 3), evidence, generator(0))
    assert factors.kv_a_proj.shape == (5, WIDTH)
    assert factors.kv_b_proj_k.shape == factors.kv_b_proj_v.shape == (WIDTH, 5)
    assert factors.k_rope_proj.shape == (6, WIDTH)
    assert factors.q_rope_map.shape == (HEADS, 6, HEAD_DIM)
    assert len(factors.rope_pairs) == 3
    assert all(torch.isfinite(part).all() for part in factors[:-1])


def test_random_depends_on_its_generator_alone(weights: KVWeights) -> None:
    first, again, other = (
        INITS["random"](weights, Budget(5, 3), None, generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first.kv_a_proj, again.kv_a_proj)
    assert not torch.equal(first.kv_a_proj, other.kv_a_proj)
