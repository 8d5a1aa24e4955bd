"""The cost of an error in a cached key or value at the model's output, to first order.

Query i attends to key j with probability p_ij; the layer's output is y_i. When key and value change
by dk_j and dv_j, head h adds to the layer's output

    W_o,h [p_ij dv_j + p_ij (v_j − y_i) (q_i · RoPE(dk_j)) / (rho_j sqrt(D))]

and with g_i the gradient of one random direction of the model's output with respect to the layer's
output, h_i = W_o,hᵀ g_i, one wrong value of head h changes the model's output by (h_i · p_ij dv_j)²
and one wrong key, both squared and on average, by

    w_ij (q_i · RoPE(dk_j))²,   w_ij = (p_ij h_i · (v_j − y_i))² / (rho_j² D)

The weights go through the rest of the model: errors that later layers or gates swallow cost
nothing, and the errors of all layers are in one unit (Method: what errors cost). `AttentionStats`
holds the sums that a separable metric needs.

Shapes: B clips, n queries, S keys, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.moments import as_pairs

KEYS_AT_ONCE = 1024


class AttentionSample(NamedTuple):
    """Some queries of one layer and the keys and values that they attend to.

    Attributes:
        query: Normed queries before RoPE, (B, n, H, D).
        query_rotation: exp(i·angle) of each query's pairs, (n, D/2) complex.
        key: Normed keys before RoPE, (B, S, H, D).
        key_rotation: exp(i·angle) of each key's pairs, (S, D/2) complex.
        key_norm: 1/rho, (B, S).
        value: (B, S, H, D).
        value_mean: Mean value of the tokens that will be cached, (H, D); it costs no rank.
        gradient: h, the output gradient pulled back through W_o, (B, n, H, D).
        mask: True where a query attends to a key, (n, S).
    """

    query: Tensor
    query_rotation: Tensor
    key: Tensor
    key_rotation: Tensor
    key_norm: Tensor
    value: Tensor
    value_mean: Tensor
    gradient: Tensor
    mask: Tensor


class AttentionStats(NamedTuple):
    """Attention statistics: sums over the queries that attend to one group of keys.

    Attributes:
        queries: Number of queries, ().
        query_square: Sum of w q qᵀ per head, (H, D, D), for keys without a position.
        rotated_query_square: The same with each query rotated into the key's frame, (H, D, D), for
            keys before RoPE.
        query_pairs: Sum of w |u_f|² per RoPE pair, (H, D/2).
        phases: Sum of w |u_f|² exp(i·w_f·(key − query position)), (H, D/2) complex.
        value_square: Sum of h hᵀ over all heads, (H·D, H·D), each head times the length of the
            centred value that it gathers from the group.
    """

    queries: Tensor
    query_square: Tensor
    rotated_query_square: Tensor
    query_pairs: Tensor
    phases: Tensor
    value_square: Tensor

    def cpu(self) -> AttentionStats:
        """The same sums in host memory."""
        return AttentionStats(*(part.cpu() for part in self))


def measure_stats(sample: AttentionSample, groups: list[Tensor]) -> list[AttentionStats]:
    """Statistics of groups of keys, each a mask (n, S); the softmax is over all groups.

    The sums lie on the device of the sample.
    """
    scale = sample.query.shape[-1] ** -0.5
    rotated_query = as_pairs(sample.query) * sample.query_rotation[:, None]
    rotated_key = as_pairs(sample.key) * sample.key_rotation[:, None]
    logits = torch.einsum("bnhf,bshf->bhns", rotated_query, rotated_key.conj()).real * scale
    attention = logits.masked_fill(~sample.mask, -torch.inf).softmax(-1)
    output = torch.einsum("bhns,bshd->bnhd", attention, sample.value)
    # h · (v_j − y_i)
    effect = torch.einsum("bnhd,bshd->bhns", sample.gradient, sample.value)
    effect = effect - (sample.gradient * output).sum(-1).movedim(-1, 1)[..., None]
    weight = (attention * effect * sample.key_norm[:, None, None] * scale).square()
    return [_group_stats(sample, rotated_query, attention * g, weight * g) for g in groups]


def merge_stats(parts: Iterable[AttentionStats]) -> AttentionStats:
    """Statistics of the queries of all parts together."""
    return reduce(lambda one, other: AttentionStats(*map(torch.add, one, other)), parts)


def _group_stats(
    sample: AttentionSample, rotated_query: Tensor, attention: Tensor, weight: Tensor
) -> AttentionStats:
    """Statistics for attention and first-order weight w of one group, both (B, H, n, S)."""
    batch, count, *_ = sample.query.shape
    square = torch.einsum("bhn,bnhd,bnhe->hde", weight.sum(-1), sample.query, sample.query)
    energy = as_pairs(sample.query).abs().square().movedim(2, 1)
    phase = weight.to(sample.key_rotation.dtype) @ sample.key_rotation
    phase = phase * sample.query_rotation.conj()
    gathered = torch.einsum("bhns,bshd->bnhd", attention, sample.value - sample.value_mean)
    costs = sample.gradient * gathered.norm(dim=-1, keepdim=True)
    costs = costs.flatten(0, 1).flatten(1).double()
    return AttentionStats(
        queries=torch.tensor(batch * count, dtype=torch.float64),
        query_square=square.double(),
        rotated_query_square=_rotated_square(rotated_query, sample.key_rotation, weight),
        query_pairs=(weight.sum(-1, keepdim=True) * energy).sum((0, 2)).double(),
        phases=(phase * energy).sum((0, 2)).to(torch.complex128),
        value_square=costs.mT @ costs,
    )


def _rotated_square(rotated_query: Tensor, key_rotation: Tensor, weight: Tensor) -> Tensor:
    """Sum of w_ij t tᵀ, (H, D, D), with t the query rotated back by the key's position.

    In pairs, t_f conj(t_g) only needs the sums of w_ij exp(−i(w_f − w_g)p_j) over the keys, and
    t_f t_g the sums with w_f + w_g: two products with one table for all heads.
    """
    # Keys outside the group have no weight.
    members = weight.flatten(0, -2).any(0)
    rotation, weight = key_rotation[members].conj(), weight[..., members].to(key_rotation.dtype)
    pairs = rotation.shape[1]
    differences = weight.new_zeros(*weight.shape[:-1], pairs**2)
    sums = torch.zeros_like(differences)
    for part, table in zip(
        weight.split(KEYS_AT_ONCE, -1), rotation.split(KEYS_AT_ONCE), strict=True
    ):
        differences += part @ (table[:, :, None] * table.conj()[:, None]).flatten(1)
        sums += part @ (table[:, :, None] * table[:, None]).flatten(1)
    u, size = rotated_query.movedim(2, 1), (pairs, pairs)
    hermitian = torch.einsum("bhnfg,bhnf,bhng->hfg", differences.unflatten(-1, size), u, u.conj())
    symmetric = torch.einsum("bhnfg,bhnf,bhng->hfg", sums.unflatten(-1, size), u, u)
    return real_square(hermitian, symmetric).double()


def real_square(hermitian: Tensor, symmetric: Tensor) -> Tensor:
    """E[t tᵀ] (..., D, D) over interleaved channels from E[t_f conj(t_g)] and E[t_f t_g]."""
    real_real = (hermitian + symmetric).real / 2
    imag_imag = (hermitian - symmetric).real / 2
    real_imag = (symmetric - hermitian).imag / 2
    imag_real = (symmetric + hermitian).imag / 2
    rows = [torch.stack([real_real, real_imag], -1), torch.stack([imag_real, imag_imag], -1)]
    return torch.stack(rows, -3).flatten(-2).flatten(-3, -2)
