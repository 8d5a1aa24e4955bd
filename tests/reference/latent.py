"""A toy dense layer with evidence, and what the factors of its latent twin compute from a token."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.maths.evidence import Evidence
from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.projections import Factors, KVWeights, LayerShape


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Toy(NamedTuple):
    """A dense layer, tokens that it meets, and evidence with exactly their mean and covariance."""

    weights: KVWeights
    evidence: Evidence
    inputs: Tensor

    def __repr__(self) -> str:
        """Without numbers, thousands of which hypothesis would print."""
        return f"<{self.weights.num_heads} heads of {self.weights.head_dim}>"

    @property
    def width(self) -> int:
        return self.inputs.shape[1]

    @property
    def all_pairs(self) -> int:
        return self.width // 2

    def full_shape(self, latent: Literal["joint", "split"] = "joint") -> LayerShape:
        """The sizes at which nothing needs to be lost."""
        if latent == "split":
            return LayerShape(latent, 2 * self.width, self.all_pairs, self.width)
        return LayerShape(latent, self.width, self.all_pairs)


def toy(heads: int = 3, head_dim: int = 14, seed: int = 0) -> Toy:
    """All drawn from a seed: nearly flat weights, inputs with a large mean and a steep spectrum."""
    draw, width = generator(seed), heads * head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def spread(decades: float) -> Tensor:
        """Random directions with singular values that decay by some decades."""
        left, right = (torch.linalg.qr(normal(width, width)).Q for _ in range(2))
        return left * torch.logspace(0, -decades, width, dtype=torch.float64) @ right

    def metric(*batch: int, size: int) -> Tensor:
        root = normal(*batch, size, 2 * size)
        return root @ root.mT / size

    weights = KVWeights(
        query=spread(0.5),
        query_bias=normal(width),
        raw_key=spread(0.5),
        raw_key_bias=normal(width),
        key_gain=1 + 0.5 * torch.rand(width, generator=draw, dtype=torch.float64),
        value=spread(0.5),
        value_bias=normal(width),
        output=spread(0.5),
        num_heads=heads,
    )
    inputs = normal(4 * width, width) @ spread(1.5) + 3 * normal(width)
    # Some heads are read more than others.
    reads = torch.logspace(0, -1, heads, dtype=torch.float64)[:, None]
    length, angle = (torch.rand(heads, head_dim // 2, generator=draw).double() for _ in range(2))
    evidence = Evidence(
        mean=inputs.mean(0),
        covariance=torch.cov(inputs.mT, correction=0),
        key_metric=reads[..., None] * metric(heads, size=head_dim),
        value_metric=metric(size=width),
        query_pairs=reads * normal(heads, head_dim // 2).square(),
        phases=torch.polar(length, 6 * angle),
    )
    return Toy(weights, evidence, inputs)


TOYS = st.builds(toy, st.integers(1, 3), st.sampled_from((6, 8, 10)), st.integers(0, 999))
"""Toys of every geometry; head dims whose pairs divide evenly and unevenly over the axes."""


def turns(tokens: int, pairs: int, seed: int = 0) -> Tensor:
    """A rotation of every pair of every token by any angle, (tokens, pairs) complex."""
    angles = 6.3 * torch.rand(tokens, pairs, generator=generator(seed), dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def dense_key(weights: KVWeights, inputs: Tensor) -> Tensor:
    """Gained, without its norm, before RoPE: (n, H, D)."""
    return (inputs @ weights.key.mT + weights.key_bias).unflatten(1, (weights.num_heads, -1))


def dense_value(weights: KVWeights, inputs: Tensor) -> Tensor:
    """(n, H·D)."""
    return inputs @ weights.value.mT + weights.value_bias


def turned(key: Tensor, turn: Tensor) -> Tensor:
    """A key (n, H, D) after a rotation (n, D/2)."""
    return as_channels(as_pairs(key) * turn[:, None])


def latent(factors: Factors, inputs: Tensor) -> Tensor:
    """(n, R)."""
    return inputs @ factors.kv_a_proj.mT + factors.kv_a_bias


def content_key(weights: KVWeights, factors: Factors, inputs: Tensor) -> Tensor:
    """The key that is rebuilt from the latent, (n, H, D)."""
    part = latent(factors, inputs)[:, : factors.kv_b_proj_k.shape[1]]
    key = part @ factors.kv_b_proj_k.mT + factors.kv_b_bias_k
    return key.unflatten(1, (weights.num_heads, -1))


def value(factors: Factors, inputs: Tensor) -> Tensor:
    """(n, H·D)."""
    rank = factors.kv_b_proj_v.shape[1]
    part = latent(factors, inputs)[:, len(factors.kv_a_proj) - rank :]
    return part @ factors.kv_b_proj_v.mT + factors.kv_b_bias_v


def shared_keys(factors: Factors, inputs: Tensor) -> Tensor:
    """The shared rope keys r, (n, m) complex."""
    return inputs.to(factors.rope.rows.dtype) @ factors.rope.rows.mT + factors.rope.offsets


def rope_key(factors: Factors, inputs: Tensor, turn: Tensor) -> Tensor:
    """The rope branch as the query of each head sees it after a rotation (n, D/2), (n, H, D)."""
    shared = as_channels(shared_keys(factors, inputs) * turn[:, factors.rope.pairs])
    return torch.einsum("nr,hrd->nhd", shared, factors.rope.query_map)


def rebuilt_key(weights: KVWeights, factors: Factors, inputs: Tensor, turn: Tensor) -> Tensor:
    """The key after a rotation (n, D/2), (n, H, D); its norm is left out."""
    return content_key(weights, factors, inputs) + rope_key(factors, inputs, turn)


def lost(toy: Toy, factors: Factors) -> float:
    """Mean cost over the tokens of what the latent layer makes wrong, in the evidence's metrics."""
    weights, evidence, inputs = toy.weights, toy.evidence, toy.inputs
    key = dense_key(weights, inputs)
    missed = as_pairs(key - rope_key(factors, inputs, turns(1, key.shape[-1] // 2) ** 0))
    # A pair that no rope key carries departs from its phase; its logit is half of |u|²|z|².
    departure = evidence.query_pairs * (1 - evidence.phases.abs().square())
    rotation = (departure * missed.abs().square()).sum().item() / 2
    key, metric = as_channels(missed * evidence.phases), evidence.key_metric
    key_gap = content_key(weights, factors, inputs) - key
    value_gap = value(factors, inputs) - dense_value(weights, inputs)
    content = torch.einsum("nhd,hde,nhe->", key_gap, metric, key_gap).item()
    content += torch.einsum("nd,de,ne->", value_gap, evidence.value_metric, value_gap).item()
    return (content + rotation) / len(inputs)
