"""Evidence of one layer for the calibrated factors: its inputs, and what errors cost.

Shapes: d input width, H heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.attention_stats import AttentionStats, merge_stats
from vmla_convert.maths.moments import Moments, merge_moments
from vmla_convert.maths.projections import (
    KVWeights,
    white_logit_cost,
    white_queries,
    white_raw_key_square,
)

WINDOW_SHARE = 0.5


class Evidence(NamedTuple):
    """Mean and covariance of a layer's inputs, and the cost of errors at the model's output.

    Attributes:
        mean: Mean of the inputs that are cached, (d,).
        covariance: Covariance of these inputs, (d, d).
        key_metric: Cost of an error of a key without a position, (H, D, D).
        value_metric: Cost of an error of the values of all heads, (H·D, H·D).
        query_pairs: Cost of an error of each RoPE pair, (H, D/2).
        phases: Expected phase of each RoPE pair, (H, D/2) complex.
    """

    mean: Tensor
    covariance: Tensor
    key_metric: Tensor
    value_metric: Tensor
    query_pairs: Tensor
    phases: Tensor


def join_evidence(
    parts: list[tuple[AttentionStats, Moments]], weights: KVWeights, window_phases: Tensor
) -> Evidence:
    """Evidence from calibration.

    Args:
        parts: Statistics of each group of keys, with the moments of the inputs that become these
            keys. Inputs count by the cost of errors in their group.
        weights: The dense layer.
        window_phases: Expected phases under uniform attention, (D/2,) complex.
    """
    stats = merge_stats([stats for stats, _ in parts])
    queries = parts[0][0].queries  # every group counts the same queries
    costs = [stats.value_square.diagonal().sum().clamp_min(1e-30) for stats, _ in parts]
    inputs = merge_moments([m.weighted(cost) for (_, m), cost in zip(parts, costs, strict=True)])
    value = weights.value.unflatten(0, (weights.num_heads, -1))
    lengths = torch.einsum("hnd,de,hne->h", value, inputs.covariance, value)
    measured = stats.phases / stats.query_pairs.clamp_min(1e-30)
    return Evidence(
        mean=inputs.mean,
        covariance=inputs.covariance,
        key_metric=stats.query_square / queries,
        value_metric=value_metric(stats, lengths, weights.head_dim) / queries,
        query_pairs=stats.query_pairs / queries,
        # First-order weights see only keys that have attention already. Phases that fit near keys
        # alone would let far keys in, which their rotation kept out.
        phases=WINDOW_SHARE * window_phases + (1 - WINDOW_SHARE) * measured,
    )


def assume_evidence(weights: KVWeights, phases: Tensor) -> Evidence:
    """Evidence without data (Method: without data).

    Inputs are white, queries are as W_q makes them, and values matter as W_o passes them on.

    Args:
        weights: The dense layer.
        phases: Expected phases under uniform attention, (D/2,) complex.
    """
    width = weights.query.shape[1]
    queries = white_queries(weights)
    pairs = queries.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, 2)).sum(-1)
    scale = white_logit_cost(weights) / white_raw_key_square(weights)
    return Evidence(
        mean=torch.zeros(width, dtype=torch.float64),
        covariance=torch.eye(width, dtype=torch.float64),
        key_metric=queries * scale,
        value_metric=weights.output.mT @ weights.output,
        query_pairs=pairs * scale,
        phases=phases.expand(weights.num_heads, -1),
    )


def value_metric(stats: AttentionStats, lengths: Tensor, head_dim: int) -> Tensor:
    """Summed cost of an error of the values of all heads, (H·D, H·D).

    The statistics weight each head by the length of the value that it gathers. The squared length
    of a token's own value, (H,), takes its place, so that each token's length counts once.
    """
    scale = lengths.clamp_min(1e-30).rsqrt().repeat_interleave(head_dim)
    return scale[:, None] * stats.value_square * scale
