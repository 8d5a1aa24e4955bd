"""From the weights of a dense layer to the projections of its latent twin.

One function per init, all with one signature, collected in `INITS`: it solves a layer for one size
and, but for `random`, all smaller ones. `calibrated` minimises the error that it predicts at the
model's output; `predict_errors` tells that error for every size, so
that one budget can be divided before anything is truncated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.maths.attention_stats import AttentionStats, merge_stats
from vmla_convert.maths.moments import Moments, merge_moments
from vmla_convert.maths.positions import (
    RopeBranch,
    branch_tail,
    highest_frequency_branch,
    position_cost,
    principal_branch,
)
from vmla_convert.maths.projections import (
    Evidence,
    Factors,
    KVWeights,
    LayerShape,
    Part,
    Solved,
    cut,
    gather_rope,
    key_square,
    real_bias,
    real_key,
    subtract_rope,
    white_queries,
)
from vmla_convert.maths.spectra import truncate

WINDOW_SHARE = 0.5
# Rope branches that a budget may be split with; more pairs than these buy little.
PAIR_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


class Decomposition(NamedTuple):
    """A factorisation of every rank at once: keep the first rows and columns.

    Attributes:
        down: (n, d).
        up: (rows, n).
        energies: What each direction is worth in the metric, descending, (n,).
    """

    down: Tensor
    up: Tensor
    energies: Tensor


Init = Callable[[KVWeights, LayerShape, Evidence | None, torch.Generator], Solved]


def random(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,
) -> Solved:
    """Nothing taken over but the norms: the baseline that shows what an init is worth."""
    rank, width, heads = shape.kv_lora_rank, weights.key.shape[1], weights.num_heads

    def normal(*size: int, fan_in: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) / fan_in**0.5

    key_rank, value_rank = shape.parts() if shape.latent == "split" else (rank, rank)
    keys = heads * weights.head_dim
    down = normal(rank, width, fan_in=width)
    up_key = normal(keys, key_rank, fan_in=max(key_rank, 1))
    up_value = normal(keys, value_rank, fan_in=max(value_rank, 1))
    offset, unit = down.new_zeros(rank), down.new_ones(rank)
    if shape.latent == "joint":
        parts = (Part(down, offset, torch.cat([up_key, up_value]), unit),)
    else:
        keys_part = Part(down[:key_rank], offset[:key_rank], up_key, unit[:key_rank])
        parts = (keys_part, Part(down[key_rank:], offset[key_rank:], up_value, unit[key_rank:]))
    branch = highest_frequency_branch(weights.head_dim, heads, shape.rope_pairs)
    rows = torch.complex(*(normal(shape.rope_pairs, width, fan_in=width) for _ in range(2)))
    rope = gather_rope(branch, *weights.key_pairs())._replace(
        rows=rows,
        offsets=torch.zeros(shape.rope_pairs, dtype=torch.complex128),
        query_map=normal(heads, 2 * shape.rope_pairs, weights.head_dim, fan_in=keys // heads),
    )
    zero = torch.zeros(keys, dtype=torch.float64)
    return Solved(parts, (zero, zero), rope)


def spectral(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,  # noqa: ARG001
) -> Solved:
    """The paper's: SVD of the stacked weights, no data; fastest pairs roped, their content dropped.

    VideoMLA, appendix D.6, gives no formula; rows, gains and biases are handled as METHOD 3 and 4
    demand, which the paper leaves open.
    """
    key, key_bias = weights.key_pairs()
    branch = highest_frequency_branch(weights.head_dim, weights.num_heads, shape.rope_pairs)
    rope = gather_rope(branch, key, key_bias)
    key[:, branch.pairs], key_bias[:, branch.pairs] = 0, 0
    content, value = real_key(key), weights.value
    if shape.latent == "joint":
        parts = (_svd_part(torch.cat([content, value]), shape.kv_lora_rank),)
    else:
        key_rank, value_rank = shape.parts()
        parts = (_svd_part(content, key_rank), _svd_part(value, value_rank))
    return Solved(parts, (real_bias(key_bias), weights.value_bias), rope)


def calibrated(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,
    generator: torch.Generator,  # noqa: ARG001
) -> Solved:
    """Two-sided factorisation on centred inputs, with the best shared rope keys.

    Complex PCA picks the rope keys (METHOD 5); what they leave is folded to its expected phase
    (METHOD 6); keys and values are then approximated together, weighted by what their errors do to
    the model's output, on the inputs that calibration saw (METHOD 7), means and biases exactly
    (METHOD 4).

    Raises:
        ConfigError: There is no evidence.
    """
    known = _required(evidence)
    key, key_bias = weights.key_pairs()
    branch = _best_branch(weights, known, shape.rope_pairs)
    rope = gather_rope(branch, key, key_bias)
    key, key_bias = subtract_rope(branch, rope, key, key_bias)
    phases = known.phases
    key, key_bias = key * phases[..., None], key_bias * phases
    target = real_key(key)
    # Inputs are centred: the latent of their mean is 0, and rebuilds the mean key and value.
    parts = tuple(
        Part(part.down, -part.down @ known.mean, part.up, part.energies)
        for part in _decompose(target, weights, shape.latent, known)
    )
    biases = (
        real_bias(key_bias) + target @ known.mean,
        weights.value_bias + weights.value @ known.mean,
    )
    return Solved(parts, biases, rope, phases)


INITS: dict[str, Init] = {
    "calibrated": calibrated,
    "spectral": spectral,
    "random": random,
}
DATA_INITS = ("calibrated",)
"""Those that look at activations."""


def factor(
    init: str,
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,
    generator: torch.Generator,
) -> Factors:
    """One layer at one size.

    Args:
        init: Name of an init.
        weights: The dense layer.
        shape: What is made of it.
        evidence: Of this layer; None where the init looks at none.
        generator: For what is drawn.

    Raises:
        ConfigError: The init cannot do without evidence, and there is none.
    """
    return cut(INITS[init](weights, shape, evidence, generator), shape)


class ErrorCurve(NamedTuple):
    """Predicted error of a layer that may cache s numbers, norm aside, and how to spend them.

    Attributes:
        errors: For s = 0, 1, …; `inf` where no layer is of that size. At most (most + 1,), fewer
            where the layer is whole before.
        rope_pairs: Rope pairs of the best layer of each size.
        key_ranks: Of split latents the part that keys read at each size; empty for joint ones.
    """

    errors: Tensor
    rope_pairs: list[int]
    key_ranks: list[int]


def predict_errors(
    weights: KVWeights,
    latent: Literal["joint", "split"],
    evidence: Evidence | None,
    most: int,
    pair_counts: tuple[int, ...] = PAIR_COUNTS,
) -> ErrorCurve:
    """What `calibrated` would lose at every size up to `most` numbers.

    The error of a size is what truncation drops and what the rotation of the pairs without a rope
    key departs from its expected phase, at the best number of pairs.

    Raises:
        ConfigError: There is no evidence.
    """
    known = _required(evidence)
    square = key_square(weights, known.mean, known.covariance)
    lost = branch_tail(square, position_cost(known.query_pairs, known.phases))
    errors = torch.full((most + 1,), torch.inf, dtype=torch.float64)
    chosen, parts = [0] * (most + 1), [0] * (most + 1)
    for pairs in pair_counts:
        if 2 * pairs >= most or pairs >= len(lost):
            break
        branch = _best_branch(weights, known, pairs)
        key, key_bias = weights.key_pairs()
        key, _ = subtract_rope(branch, gather_rope(branch, key, key_bias), key, key_bias)
        target = real_key(key * known.phases[..., None])
        tail, key_ranks = _tail(target, weights, latent, known, most - 2 * pairs)
        for rank in range(1, len(tail)):
            error, size = tail[rank] + lost[pairs], rank + 2 * pairs
            if error < errors[size]:
                errors[size], chosen[size] = error, pairs
                parts[size] = key_ranks[rank] if key_ranks else 0
    return ErrorCurve(errors, chosen, parts if latent == "split" else [])


def join_evidence(
    parts: list[tuple[AttentionStats, Moments]], weights: KVWeights, window_phases: Tensor
) -> Evidence:
    """Evidence of a layer.

    Args:
        parts: Groups of reads, each with the moments of the inputs it reads; inputs count by what
            errors in their group cost.
        weights: The dense layer.
        window_phases: Expected phases under uniform attention, (D/2,) complex.
    """
    reads = merge_stats([sums for sums, _ in parts])
    queries = parts[0][0].queries  # the same ones read every group
    costs = [sums.value_square.diagonal().sum().clamp_min(1e-30) for sums, _ in parts]
    inputs = merge_moments([m.weighted(cost) for (_, m), cost in zip(parts, costs, strict=True)])
    covariance = inputs.covariance
    # Values were weighted by the length that each head gathered; a token's own length counts once.
    value = weights.value.unflatten(0, (weights.num_heads, -1))
    length = torch.einsum("hnd,de,hne->h", value, covariance, value).clamp_min(1e-30)
    scale = length.rsqrt().repeat_interleave(weights.head_dim)
    energy = reads.query_pairs.clamp_min(1e-30)
    return Evidence(
        mean=inputs.mean,
        covariance=covariance,
        key_metric=reads.query_square / queries,
        value_metric=scale[:, None] * reads.value_square * scale / queries,
        query_pairs=reads.query_pairs / queries,
        phases=_shrunk_phases(reads.phases / energy, window_phases),
    )


def assume_evidence(weights: KVWeights, phases: Tensor) -> Evidence:
    """Evidence without data: white inputs, queries as W_q makes them, values as W_o reads them.

    Args:
        weights: The dense layer.
        phases: Expected phases under uniform attention, (D/2,) complex.
    """
    width, heads = weights.query.shape[1], weights.num_heads
    square = white_queries(weights)
    pairs = square.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, 2)).sum(-1)
    value_metric = weights.output.mT @ weights.output
    # Keys count by the energy of a value at the output, which a change of attention moves.
    value_energy = ((weights.value @ weights.value.mT) * value_metric).sum() / heads
    raw_key_square = weights.raw_key.square().sum() + weights.raw_key_bias.square().sum()
    scale = value_energy / weights.head_dim / (raw_key_square / len(weights.raw_key))
    return Evidence(
        mean=torch.zeros(width, dtype=torch.float64),
        covariance=torch.eye(width, dtype=torch.float64),
        key_metric=square * scale,
        value_metric=value_metric,
        query_pairs=pairs * scale,
        phases=phases.expand(heads, -1),
    )


def two_sided(target: Tensor, square: Tensor, covariance: Tensor) -> Decomposition:
    """Best approximations up · down of a target W in E[((W − Ŵ) u)ᵀ M (W − Ŵ) u], at every rank.

    Args:
        target: W, (n, d).
        square: B = Wᵀ M W, (d, d), with the metric M positive semi-definite; M itself may be large.
        covariance: C = E[u uᵀ], (d, d).

    Returns:
        With V, Λ the eigenvectors of C^½ B C^½: down = Λ^-½ Vᵀ C^½ B, so that the
        latent has covariance Λ, and up = W C downᵀ Λ⁻¹ solves the least-squares problem that is
        left. Neither M nor C is inverted.
    """
    root = psd_sqrt(covariance)
    weighted = root @ square
    # Products are symmetric but for rounding, which a direction without data would be made of.
    product = weighted @ root
    values, vectors = torch.linalg.eigh((product + product.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    # Directions the data never takes have no energy; they get no projection.
    seen = values > values[0] * _rounding(values)
    inverse = torch.where(seen, 1 / values.where(seen, torch.ones_like(values)), 0)
    down = inverse[:, None] * (vectors.mT @ weighted)
    # Small energies magnify rounding: rows that should be orthonormal in C are made so.
    mixed = torch.linalg.qr(root @ down.mT).R.mT + torch.diag((~seen).to(down.dtype))
    down = torch.linalg.solve_triangular(mixed, down, upper=False)
    up = (target @ covariance @ down.mT) * inverse.sqrt()
    values = values.clamp_min(0)
    return Decomposition(values.sqrt()[:, None] * down, up, values)


def psd_sqrt(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix (..., n, n).

    Layer norm makes its inputs exactly singular; what rounding leaves of a direction is taken as 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    least = values.amax(-1, keepdim=True) * _rounding(values)
    values = torch.where(values > least, values, 0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def _required(evidence: Evidence | None) -> Evidence:
    if evidence is None:
        raise ConfigError("the init 'calibrated' needs calibration clips", "or use --init spectral")
    return evidence


def _svd_part(rows: Tensor, rank: int) -> Part:
    up, down = truncate(rows, rank)
    return Part(down, down.new_zeros(rank), up, down.new_ones(rank))


def _rounding(values: Tensor) -> float:
    """Share of the largest eigenvalue below which others are rounding."""
    return values.shape[-1] * torch.finfo(values.dtype).eps


def _shrunk_phases(measured: Tensor, window: Tensor) -> Tensor:
    """Measured phases (H, D/2), drawn towards those of uniform attention (D/2,).

    First-order weights see only keys that have attention already; a far key whose rotation kept it
    out of sight would be let in by phases that fit the near ones.
    """
    return WINDOW_SHARE * window + (1 - WINDOW_SHARE) * measured


def _best_branch(weights: KVWeights, evidence: Evidence, count: int) -> RopeBranch:
    cost = position_cost(evidence.query_pairs, evidence.phases)
    return principal_branch(key_square(weights, evidence.mean, evidence.covariance), cost, count)


def _decompose(
    target: Tensor, weights: KVWeights, latent: Literal["joint", "split"], evidence: Evidence
) -> list[Decomposition]:
    """Of keys and values together, or of each."""
    by_head = target.unflatten(0, (weights.num_heads, -1))
    of_keys = target.mT @ (evidence.key_metric @ by_head).flatten(0, 1)
    of_values = weights.value.mT @ (evidence.value_metric @ weights.value)
    if latent == "split":
        return [
            two_sided(target, of_keys, evidence.covariance),
            two_sided(weights.value, of_values, evidence.covariance),
        ]
    stacked = torch.cat([target, weights.value])
    return [two_sided(stacked, of_keys + of_values, evidence.covariance)]


def _tail(
    target: Tensor,
    weights: KVWeights,
    latent: Literal["joint", "split"],
    evidence: Evidence,
    most: int,
) -> tuple[Tensor, list[int]]:
    """Energy that ranks 0 … most discard, (most + 1,), and of split latents the keys' part.

    A latent has at least one number, each part of a split one too; smaller ranks are `inf`.
    """
    parts = _decompose(target, weights, latent, evidence)
    energies = [part.energies for part in parts]
    if len(parts) == 1:
        tail = _discarded(energies[0])[: most + 1]
        tail[0] = torch.inf
        return tail, []
    # Keys get as many directions as they have among the largest of both.
    order = torch.cat(energies).argsort(descending=True, stable=True)
    of_keys = [0, *(order < len(energies[0])).long().cumsum(0).tolist()][: most + 1]
    key_ranks = [min(max(1, keys), rank - 1) for rank, keys in enumerate(of_keys)]
    left_of_keys, left_of_values = (_discarded(part) for part in energies)
    tail = torch.full((len(key_ranks),), torch.inf, dtype=torch.float64)
    for rank in range(2, len(key_ranks)):
        keys = key_ranks[rank]
        tail[rank] = left_of_keys[keys] + left_of_values[rank - keys]
    return tail, key_ranks


def _discarded(energies: Tensor) -> Tensor:
    """What the first 0, 1, … directions leave, (n + 1,)."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
