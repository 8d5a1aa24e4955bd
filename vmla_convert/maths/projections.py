"""Weights of a dense layer, sizes of its MLA twin, and the weights of the twin; all float64.

With x the input, the raw key of head h is (W_k x + b_k)_h. The norm rho is one number for all heads
and D_g is the norm's gain, so the key is D_g (W_k x + b_k) / rho. The cache keeps 1/rho (Method:
key norm); everything else here is linear in x.

Shapes: d input width, H heads, D head dim, R latent rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.moments import as_channels, as_pairs
from vmla_convert.maths.rope_keys import RopeKeys

LatentKind = Literal["joint", "split"]
"""Whether keys and values share one latent, or have a part of it each."""


class KVWeights(NamedTuple):
    """Weights of the queries, keys, values and output of a dense layer.

    Attributes:
        query, query_bias: D_g W_q, (H·D, d), and D_g b_q with the gain of the query norm.
        raw_key, raw_key_bias: W_k, (H·D, d), and b_k.
        key_gain: Gain of the key norm, (H·D,).
        value, value_bias: W_v, (H·D, d), and b_v.
        output: W_o, (d, H·D).
        num_heads: H.
    """

    query: Tensor
    query_bias: Tensor
    raw_key: Tensor
    raw_key_bias: Tensor
    key_gain: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor
    num_heads: int

    @property
    def head_dim(self) -> int:
        """Head dim D."""
        return len(self.raw_key) // self.num_heads

    @property
    def key(self) -> Tensor:
        """D_g W_k, (H·D, d)."""
        return self.key_gain[:, None] * self.raw_key

    @property
    def key_bias(self) -> Tensor:
        """D_g b_k, (H·D,)."""
        return self.key_gain * self.raw_key_bias

    def key_pairs(self) -> tuple[Tensor, Tensor]:
        """Key weight (H, D/2, d) and bias (H, D/2) by complex RoPE pair."""
        key = self.key.unflatten(0, (self.num_heads, -1))
        bias = self.key_bias.unflatten(0, (self.num_heads, -1))
        return as_pairs(key.mT).mT.clone(), as_pairs(bias).clone()


class LayerShape(NamedTuple):
    """Sizes of one MLA layer.

    Attributes:
        latent: Joint or split latent.
        kv_lora_rank: Numbers of the latent, R.
        rope_pairs: Number of rope keys, m.
        key_rank: Part of a split latent that keys use; None for half.
    """

    latent: LatentKind
    kv_lora_rank: int
    rope_pairs: int
    key_rank: int | None = None

    def ranks(self) -> tuple[int, ...]:
        """Rank of the joint latent, or ranks of the key and the value part."""
        if self.latent == "joint":
            return (self.kv_lora_rank,)
        key_rank = (self.kv_lora_rank + 1) // 2 if self.key_rank is None else self.key_rank
        return key_rank, self.kv_lora_rank - key_rank


class Factors(NamedTuple):
    """Weights of the MLA layer, under the layer's own names.

    Attributes:
        kv_a_proj, kv_a_bias: Input to latent, (R, d) and (R,).
        kv_b_proj_k, kv_b_bias_k: Latent to keys, (H·D, R of keys) and (H·D,).
        kv_b_proj_v, kv_b_bias_v: Latent to values, (H·D, R of values) and (H·D,).
        rope: The rope keys.
        phases: Expected phase of each pair of the content key, (H, D/2) complex; None where the
            content key has no phases folded in.
    """

    kv_a_proj: Tensor
    kv_a_bias: Tensor
    kv_b_proj_k: Tensor
    kv_b_bias_k: Tensor
    kv_b_proj_v: Tensor
    kv_b_bias_v: Tensor
    rope: RopeKeys
    phases: Tensor | None = None


def white_queries(weights: KVWeights) -> Tensor:
    """Second moment of each head's queries for white inputs, (H, D, D); channels have mean 1."""
    raw = torch.cat([weights.query, weights.query_bias[:, None]], 1)
    query = (raw / raw.square().sum().div(len(raw)).sqrt()).unflatten(0, (weights.num_heads, -1))
    return query @ query.mT


def white_raw_key_square(weights: KVWeights) -> Tensor:
    """Mean square of the raw key's channels for white inputs, ()."""
    square = weights.raw_key.square().sum() + weights.raw_key_bias.square().sum()
    return square / len(weights.raw_key)


def white_logit_cost(weights: KVWeights) -> Tensor:
    """Cost of a unit error of q · k for white inputs, (): a head's energy at the output, over D."""
    energy = (weights.output @ weights.value).square().sum() / weights.num_heads
    return energy / weights.head_dim


def key_square(weights: KVWeights, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[z zᴴ] of the key pairs over heads, (D/2, H, H); the mean counts, because it rotates too."""
    key, bias = (part.movedim(1, 0) for part in weights.key_pairs())
    at_mean = key @ mean.to(key.dtype) + bias
    spread = key @ covariance.to(key.dtype) @ key.mH
    return spread + at_mean[:, :, None] * at_mean[:, None, :].conj()


def real_key(pairs: Tensor) -> Tensor:
    """Complex rows (H, D/2, d) as interleaved rows (H·D, d)."""
    return as_channels(pairs.mT.contiguous()).mT.flatten(0, 1)
