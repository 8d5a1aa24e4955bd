"""Narrower heads: the best map of their rank, lossless at full width, with a true error."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.latent import TOYS, Toy, content_key, generator, toy
from torch import Tensor

from vmla_convert.maths.factor import INITS, assume_evidence, factor
from vmla_convert.maths.heads import narrow_heads, principal_maps
from vmla_convert.maths.projections import Evidence, Factors, LayerShape, NarrowHeads

few = settings(derandomize=True, deadline=None, max_examples=15)

Latent = Literal["joint", "split"]
either_latent = pytest.mark.parametrize("latent", ["joint", "split"])


def whole_heads(data: Toy, latent: Latent = "joint") -> Factors:
    """A layer whose content keys take every direction of a head and have a mean."""
    shape = LayerShape(latent, data.width, 1, data.width - 2 if latent == "split" else None)
    return factor("calibrated", data.weights, shape, data.evidence, generator())


def narrow_of(factors: Factors) -> NarrowHeads:
    assert factors.narrow is not None
    return factors.narrow


def met_key(data: Toy, factors: Factors) -> Tensor:
    """The content key as the source's query meets it, A_hᵀ (U'_h c + beta'_h), (n, H, D)."""
    key = content_key(data.weights, factors, data.inputs)
    return torch.einsum("thn,hnd->thd", key, narrow_of(factors).query_map)


def best_key(key: Tensor, metric: Tensor, width: int) -> Tensor:
    """Of one head: keys (tokens, D) in the best subspace, by Cholesky and an SVD of the tokens."""
    side = torch.linalg.cholesky(metric)
    directions = torch.linalg.svd(side.mT @ key.mT, full_matrices=False).U[:, :width]
    kept = directions @ directions.mT @ side.mT @ key.mT
    return torch.linalg.solve_triangular(side.mT, kept, upper=True).mT


def cost(key: Tensor, metric: Tensor) -> float:
    """Mean square of what queries of a metric (H, D, D) see of keys (tokens, H, D), summed."""
    return (torch.einsum("thd,hde,the->", key, metric, key) / len(key)).item()


@either_latent
@few
@given(data=TOYS, share=st.floats(0, 1))
def test_heads_are_those_of_a_plain_twin_and_lose_what_they_say(
    latent: Latent, data: Toy, share: float
) -> None:
    """On tokens of exactly the evidence's mean and covariance."""
    width = max(1, round(share * (data.weights.head_dim - 1)))
    before = whole_heads(data, latent)
    after = narrow_heads(before, data.weights, data.evidence, width)
    metric, key = data.evidence.key_metric, content_key(data.weights, before, data.inputs)
    twin = torch.stack([best_key(key[:, h], m, width) for h, m in enumerate(metric)], 1)
    met = met_key(data, after)
    torch.testing.assert_close(met, twin, rtol=1e-6, atol=1e-6 * key.abs().max().item())
    lost = cost(key - met, metric) / cost(key, metric)
    assert narrow_of(after).lost.item() == pytest.approx(lost, rel=1e-6, abs=1e-12)


@few
@given(TOYS)
def test_the_error_falls_with_the_width_to_nothing_at_the_full_one(data: Toy) -> None:
    before, widths = whole_heads(data), range(1, data.weights.head_dim + 1)
    after = [narrow_heads(before, data.weights, data.evidence, width) for width in widths]
    lost = torch.stack([narrow_of(factors).lost for factors in after])
    assert (lost.diff() <= 0).all() and 0 < lost[0] < 1 and lost[-1] == 0
    key = content_key(data.weights, before, data.inputs)
    torch.testing.assert_close(met_key(data, after[-1]), key)


def test_the_maps_beat_a_thousand_perturbations_of_themselves() -> None:
    draw = generator(3)
    side, spread = torch.randn(2, 2, 12, 12, generator=draw, dtype=torch.float64)
    metric, square = side @ side.mT, spread @ spread.mT

    def error_of(query_map: Tensor, key_map: Tensor) -> float:
        gap = torch.eye(12, dtype=torch.float64) - query_map.mT @ key_map
        return (metric @ gap @ square @ gap.mT).diagonal(dim1=1, dim2=2).sum().item()

    query_map, key_map, energies = principal_maps(metric, square, 5)
    best = error_of(query_map, key_map)
    assert best == pytest.approx(energies[:, 5:].sum().item(), rel=1e-9)
    for trial in range(1000):
        noise = 10.0 ** -(1 + trial % 4)
        moved = [
            part * (1 + noise * torch.randn(part.shape, generator=draw, dtype=part.dtype))
            for part in (query_map, key_map)
        ]
        assert error_of(moved[0], moved[1]) > best


def test_truncated_queries_are_in_the_sources_unit() -> None:
    data = toy()
    query_map = narrow_of(narrow_heads(whole_heads(data), data.weights, data.evidence, 5)).query_map
    eye = torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    torch.testing.assert_close(query_map @ query_map.mT, eye)


def test_only_content_keys_change() -> None:
    data = toy()
    before = whole_heads(data)
    after = narrow_heads(before, data.weights, data.evidence, 5)
    assert after.kv_b_proj_k.shape == (3 * 5, data.width)
    assert after.kv_b_bias_k.shape == (3 * 5,)
    kept = ("kv_b_proj_k", "kv_b_bias_k", "narrow")
    for name in set(Factors._fields) - set(kept):
        assert getattr(after, name) is getattr(before, name)


def test_a_mean_that_outweighs_all_else_is_kept_first() -> None:
    data = toy()
    before = whole_heads(data)
    before = before._replace(kv_b_bias_k=1e4 * before.kv_b_bias_k)
    after = narrow_heads(before, data.weights, data.evidence, 1)
    bias = met_key(data._replace(inputs=data.evidence.mean[None]), after).flatten()
    torch.testing.assert_close(bias, before.kv_b_bias_k, rtol=1e-3, atol=1)


@pytest.mark.parametrize("name", INITS)
def test_without_evidence_queries_are_what_their_weights_make(name: str) -> None:
    data = toy()
    assumed = assume_evidence(data.weights, data.evidence.phases[0])
    before = factor(name, data.weights, LayerShape("joint", 8, 3), assumed, generator())
    one, other = (narrow_heads(before, data.weights, e, 5) for e in (None, assumed))
    torch.testing.assert_close(met_key(data, one), met_key(data, other))
    torch.testing.assert_close(narrow_of(one).lost, narrow_of(other).lost)


def queried(data: Toy, metric: Tensor) -> Evidence:
    return data.evidence._replace(key_metric=metric)


def test_a_layer_that_nothing_reads_keeps_what_is_largest() -> None:
    """A closed gate gives no query metric: every direction counts the same."""
    data, before = toy(), whole_heads(toy())
    flat = torch.eye(14, dtype=torch.float64).expand(3, 14, 14)
    for width in (5, 14):
        zero, same = (
            narrow_heads(before, data.weights, queried(data, metric), width)
            for metric in (0 * flat, flat)
        )
        torch.testing.assert_close(met_key(data, zero), met_key(data, same))


def test_queries_of_few_directions_lose_nothing_and_others_little_more() -> None:
    """A singular metric: what it never asks for comes last, but comes."""
    data, before = toy(), whole_heads(toy())
    asked = torch.randn(3, 14, 4, generator=generator(5), dtype=torch.float64)
    evidence = queried(data, asked @ asked.mT)
    key = content_key(data.weights, before, data.inputs)
    after = narrow_heads(before, data.weights, evidence, 5)
    seen, meant = (torch.einsum("thd,hdq->thq", k, asked) for k in (met_key(data, after), key))
    assert (seen - meant).norm() < 1e-3 * meant.norm()
    assert narrow_of(after).lost < 1e-6
    full = narrow_heads(before, data.weights, evidence, 14)
    torch.testing.assert_close(met_key(data, full), key)


def test_keys_of_nothing_stay_nothing() -> None:
    data, before = toy(), whole_heads(toy())
    nothing = before._replace(
        kv_b_proj_k=0 * before.kv_b_proj_k, kv_b_bias_k=0 * before.kv_b_bias_k
    )
    after = narrow_heads(nothing, data.weights, data.evidence, 5)
    assert narrow_of(after).lost == 0
    assert narrow_of(after).query_map.isfinite().all()
    assert not met_key(data, after).any()
