"""Narrower heads: the best rank-n map of each head's content key, for the queries that read it.

A head is D wide for content and a rope key wider for positions. Content needs fewer:
score_h = (A_h q_h) · (U'_h c + beta'_h) / rho with A_h of n rows. What a kernel gains by it costs
no cache, and the error has a closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.maths.projections import (
    Evidence,
    Factors,
    KVWeights,
    NarrowHeads,
    white_inputs,
    white_queries,
)

# What a direction counts at least, of the average one: queries that calibration never met may come.
LEAST_QUERIED = 1e-6


def narrow_heads(
    factors: Factors, weights: KVWeights, evidence: Evidence | None, width: int
) -> Factors:
    """Truncate the content part of every head.

    The mean key is part of what is approximated, with all that it weighs: softmax forgives a
    constant that all keys share, but rho differs between tokens.

    Args:
        factors: Of a layer.
        weights: The dense layer.
        evidence: Its inputs and queries; without any, white inputs and what W_q makes of them.
        width: n, below D.
    """
    metric, (mean, covariance) = white_queries(weights), white_inputs(weights.query.shape[1])
    if evidence is not None:
        metric, mean, covariance = evidence.key_metric, evidence.mean, evidence.covariance
    up = factors.kv_b_proj_k.unflatten(0, (weights.num_heads, -1))
    bias = factors.kv_b_bias_k.unflatten(0, (weights.num_heads, -1))
    down = factors.kv_a_proj[: up.shape[-1]]
    at_mean = up @ (down @ mean + factors.kv_a_bias[: up.shape[-1]]) + bias
    square = up @ (down @ covariance @ down.mT) @ up.mT + at_mean[..., None] * at_mean[:, None]
    query_map, key_map, energies = principal_maps(metric, square, width)
    total = energies.sum()
    # Of a layer without keys nothing is lost.
    lost = energies[:, width:].sum() / torch.where(total > 0, total, 1)
    return factors._replace(
        kv_b_proj_k=(key_map @ up).flatten(0, 1),
        kv_b_bias_k=(key_map @ bias[..., None]).flatten(),
        narrow=NarrowHeads(query_map, lost),
    )


def principal_maps(metric: Tensor, square: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps A and B of rank n that minimise E[(qᵀ (I − Aᵀ B) k)²], head by head.

    With V the first n eigenvectors of M^½ S M^½ the best is Aᵀ B = M^-½ V Vᵀ M^½; S is never
    inverted, and what M has hardly any of is raised to `LEAST_QUERIED` of its average.

    Args:
        metric: M = E[q qᵀ], (H, D, D).
        square: S = E[k kᵀ] about zero, (H, D, D).
        width: n, at most D.

    Returns:
        A (H, n, D) for queries, whose rows are orthonormal, so that a truncated head is in the
        source's unit; B (H, n, D) for keys; and all eigenvalues (H, D), descending: those after the
        first n are the error.
    """
    average = metric.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    values, axes = torch.linalg.eigh(metric)
    # Nothing reads a layer behind a closed gate: there, every direction counts the same.
    values = values.clamp_min(LEAST_QUERIED * torch.where(average > 0, average, 1)).sqrt()
    root = (axes * values[:, None]) @ axes.mT
    product = root @ square @ root
    # Products are symmetric but for rounding.
    energies, vectors = torch.linalg.eigh((product + product.mT) / 2)
    kept = vectors.flip(-1)[..., :width]
    basis, mix = torch.linalg.qr((axes / values[:, None]) @ axes.mT @ kept)
    return basis.mT, mix @ kept.mT @ root, energies.flip(-1).clamp_min(0)
