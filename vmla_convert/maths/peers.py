"""What published converters of language models would make of this layer: baselines, not advice.

Each is as faithful as the layer allows; what differs is said where it does. All are given what
their authors lack: the key norm of QK-normed models exactly (they drop or break it), and rope keys
that are shared between heads and rotate in three dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.maths.positions import RopeBranch, pairs_per_axis
from vmla_convert.maths.projections import (
    Evidence,
    KVWeights,
    LayerShape,
    Part,
    RopeKeys,
    Solved,
    gather_rope,
    key_square,
    real_bias,
    real_key,
    required,
    solve_svd,
)
from vmla_convert.maths.rope3d import axis_pairs

DAMPING = 0.01


def mha2mla(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,
    generator: torch.Generator,  # noqa: ARG001
) -> Solved:
    """MHA2MLA (2502.14837): rope pairs by 2-norm, weight SVD of the rest, rotation dropped.

    Its rope keys belong to one head each; with a shared rope key of m pairs, the m strongest (head,
    pair) by |q_f|·|k_f| are taken over all heads. Norms are root mean squares on the cached inputs,
    where the authors average lengths over a text.

    Raises:
        ConfigError: There is no evidence.
    """
    known = required(evidence, "mha2mla")
    key, key_bias = weights.key_pairs()
    branch = _strongest_pairs(weights, known, shape.rope_pairs)
    rope = gather_rope(branch, key, key_bias)
    heads = branch.mix.abs().argmax(1)
    key[heads, branch.pairs], key_bias[heads, branch.pairs] = 0, 0
    return solve_svd(weights, shape, key, key_bias, rope)


def xecomla(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,  # noqa: ARG001
    generator: torch.Generator,  # noqa: ARG001
) -> Solved:
    """X-EcoMLA (AMD): the rope key is the mean over heads of each key's last rows; weight SVD.

    The authors give these rows a new frequency table; here they keep their own frequencies, which
    is kinder, and being Wan's last pairs they turn with the width.
    """
    key, key_bias = weights.key_pairs()
    heads, last = weights.num_heads, key.shape[1]
    pairs = torch.arange(last - shape.rope_pairs, last)
    ones = torch.ones(len(pairs), heads, dtype=torch.complex128)
    rope = gather_rope(RopeBranch(pairs, ones / heads, ones), key, key_bias)
    key[:, pairs], key_bias[:, pairs] = 0, 0
    return solve_svd(weights, shape, key, key_bias, rope)


def transmla(
    weights: KVWeights,
    shape: LayerShape,
    evidence: Evidence | None,
    generator: torch.Generator,  # noqa: ARG001
) -> Solved:
    """TransMLA (2502.07864): RoRoPE with FreqFold, balanced PCA of key and value outputs.

    Neighbouring pairs of an axis are folded into groups that turn as the first of them; a real
    PCA over heads and members (second moment, damped by 1 %) gives each group's one rope key. What
    is left loses its rotation; keys are scaled to the values' norm, and the uncentred outputs,
    biases among them, are projected on their principal directions. The authors search the size of
    groups by perplexity; here it follows from the number of rope pairs.

    Raises:
        ConfigError: There is no evidence.
    """
    known = required(evidence, "transmla")
    rope, key, key_bias = _folded_rope(weights, known, shape.rope_pairs)
    parts = _balanced_pca(
        _with_bias(real_key(key), real_bias(key_bias)),
        _with_bias(weights.value, weights.value_bias),
        _with_one(known),
        shape,
    )
    zero = torch.zeros(len(weights.value), dtype=torch.float64)
    return Solved(parts, (zero, zero), rope)


def _strongest_pairs(weights: KVWeights, evidence: Evidence, count: int) -> RopeBranch:
    """One rope key for each of the strongest (head, pair)."""
    heads, mean, covariance = weights.num_heads, evidence.mean, evidence.covariance
    energy = key_square(weights, mean, covariance).diagonal(dim1=1, dim2=2).real.mT
    at_mean = weights.query @ mean + weights.query_bias
    query = torch.einsum("nd,de,ne->n", weights.query, covariance, weights.query)
    query = (query + at_mean.square()).unflatten(0, (heads, -1, 2)).sum(-1)
    best = (query * energy).flatten().topk(count).indices
    owner = torch.nn.functional.one_hot(best // query.shape[1], heads).to(torch.complex128)
    return RopeBranch(best % query.shape[1], owner, owner)


def _folded_rope(
    weights: KVWeights, evidence: Evidence, count: int
) -> tuple[RopeKeys, Tensor, Tensor]:
    """One rope key for each group of pairs, and what they leave of the keys."""
    key, bias = weights.key_pairs()
    heads, half = bias.shape
    rows, offsets, turn_as = [], [], []
    query_map = torch.zeros(heads, count, 2, half, 2, dtype=torch.float64)
    for place, members in enumerate(_pair_groups(weights.head_dim, count)):
        folded, folded_bias = key[:, members].flatten(0, 1), bias[:, members].flatten()
        at_mean = folded @ evidence.mean.to(folded.dtype) + folded_bias
        square = (folded @ evidence.covariance.to(folded.dtype) @ folded.mH).real
        square += torch.outer(at_mean, at_mean.conj()).real
        damping = DAMPING * square.diagonal().mean()
        mix = torch.linalg.eigh(square + damping * torch.eye(len(square))).eigenvectors[:, -1]
        row, offset = mix.to(folded.dtype) @ folded, mix.to(folded.dtype) @ folded_bias
        rows.append(row)
        offsets.append(offset)
        turn_as.append(members[0])
        per_head = mix.unflatten(0, (heads, -1))
        key[:, members] -= per_head[..., None] * row
        bias[:, members] -= per_head * offset
        query_map[:, place, 0, members, 0] = per_head
        query_map[:, place, 1, members, 1] = per_head
    rope = RopeKeys(
        torch.stack(rows),
        torch.stack(offsets),
        torch.tensor(turn_as),
        query_map.flatten(3, 4).flatten(1, 2),
    )
    return rope, key, bias


def _pair_groups(head_dim: int, count: int) -> list[list[int]]:
    """Neighbouring pairs in groups, each within one axis."""
    groups: list[list[int]] = []
    start = 0
    for size, wanted in zip(axis_pairs(head_dim), pairs_per_axis(head_dim, count), strict=True):
        members = torch.arange(start, start + size)
        groups += [part.tolist() for part in members.tensor_split(wanted)] if wanted else []
        start += size
    return groups


def _balanced_pca(
    key: Tensor, value: Tensor, square: Tensor, shape: LayerShape
) -> tuple[Part, ...]:
    """PCA of outputs [key / ratio, value] for inputs [x, 1] with second moment `square`."""

    def energy(rows: Tensor) -> Tensor:
        return torch.einsum("nd,de,ne->", rows, square, rows)

    def principal(rows: Tensor, rank: int) -> Part:
        up = torch.linalg.eigh(rows @ square @ rows.mT).eigenvectors.flip(1)[:, :rank]
        down = up.mT @ rows
        return Part(down[:, :-1], down[:, -1], up, down.new_ones(rank))

    balance, keys = energy(key) / energy(value), len(key)
    # Rope keys of a single head may leave nothing of its keys but rounding.
    ratio = balance.sqrt() if balance > 1e-20 else torch.ones_like(balance)
    if shape.latent == "joint":
        both = principal(torch.cat([key / ratio, value]), shape.kv_lora_rank)
        return (both._replace(up=torch.cat([both.up[:keys] * ratio, both.up[keys:]])),)
    key_rank, value_rank = shape.parts()
    return principal(key, key_rank), principal(value, value_rank)


def _with_bias(rows: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([rows, bias[:, None]], 1)


def _with_one(evidence: Evidence) -> Tensor:
    """Second moment of [x, 1]."""
    mean = torch.cat([evidence.mean, evidence.mean.new_ones(1)])
    return torch.block_diag(evidence.covariance, mean.new_zeros(1, 1)) + torch.outer(mean, mean)
