"""Attention statistics, one query, key and head at a time."""

from __future__ import annotations

import cmath
from itertools import product

import torch
from torch import Tensor

from vmla_convert.maths.attention_stats import AttentionSample, AttentionStats


def make_sample(
    heads: int = 2, head_dim: int = 6, clips: int = 2, seed: int = 0, count: int = 3, keys: int = 5
) -> AttentionSample:
    """Random queries, keys and all that belongs to them; each query sees some keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def turn(tokens: int) -> Tensor:
        angles = 3 * normal(tokens, head_dim // 2)
        return torch.polar(torch.ones_like(angles), angles)

    mask = torch.rand(count, keys, generator=generator) < 0.7
    mask[:, 0] = True
    return AttentionSample(
        query=normal(clips, count, heads, head_dim),
        query_rotation=turn(count),
        key=normal(clips, keys, heads, head_dim),
        key_rotation=turn(keys),
        key_norm=normal(clips, keys).abs() + 0.1,
        value=normal(clips, keys, heads, head_dim),
        value_mean=normal(heads, head_dim),
        gradient=normal(clips, count, heads, head_dim),
        mask=mask,
    )


def rotate(x: Tensor, turn: list[complex]) -> Tensor:
    """Interleaved pairs of x (D,), each times a complex number."""
    out = torch.empty_like(x)
    for pair, factor in enumerate(turn):
        z = complex(x[2 * pair], x[2 * pair + 1]) * factor
        out[2 * pair], out[2 * pair + 1] = z.real, z.imag
    return out


def attention_of(sample: AttentionSample, clip: int, i: int) -> Tensor:
    """p_ij of all heads and keys, (H, S)."""
    heads, head_dim = sample.query.shape[2:]
    query_rotation = sample.query_rotation[i].tolist()
    probabilities = torch.zeros(heads, sample.key.shape[1], dtype=torch.float64)
    for head in range(heads):
        query = rotate(sample.query[clip, i, head], query_rotation)
        exponentials = {}
        for j in sample.mask[i].nonzero().flatten().tolist():
            key = rotate(sample.key[clip, j, head], sample.key_rotation[j].tolist())
            exponentials[j] = cmath.exp(float(query @ key) / head_dim**0.5).real
        for j, exponential in exponentials.items():
            probabilities[head, j] = exponential / sum(exponentials.values())
    return probabilities


def outputs(sample: AttentionSample) -> Tensor:
    """Return the attention output of each query, (B, n, H, D)."""
    out = torch.zeros_like(sample.query)
    for clip, i in product(*map(range, sample.query.shape[:2])):
        out[clip, i] = torch.einsum("hs,shd->hd", attention_of(sample, clip, i), sample.value[clip])
    return out


def sums_by_loops(sample: AttentionSample, group: Tensor) -> AttentionStats:
    """`AttentionStats` of one group of keys."""
    batch, count, heads, head_dim = sample.query.shape
    query_square = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
    turned_square = torch.zeros_like(query_square)
    query_pairs = torch.zeros(heads, head_dim // 2, dtype=torch.float64)
    phases = torch.zeros(heads, head_dim // 2, dtype=torch.complex128)
    value_square = torch.zeros(heads * head_dim, heads * head_dim, dtype=torch.float64)
    for clip, i in product(range(batch), range(count)):
        probabilities, pulls = attention_of(sample, clip, i), []
        for head in range(heads):
            query, pull = sample.query[clip, i, head], sample.gradient[clip, i, head]
            output = probabilities[head] @ sample.value[clip, :, head]
            gathered = torch.zeros(head_dim, dtype=torch.float64)
            for j in group[i].nonzero().flatten().tolist():
                p, value = probabilities[head, j], sample.value[clip, j, head]
                # The change of the model's output when the product q · k grows by one.
                effect = p * (pull @ (value - output)) * sample.key_norm[clip, j] / head_dim**0.5
                weight = effect.square()
                back = [
                    complex(q) * complex(k).conjugate()
                    for q, k in zip(sample.query_rotation[i], sample.key_rotation[j], strict=True)
                ]
                turned = rotate(query, back)
                query_square[head] += weight * torch.outer(query, query)
                turned_square[head] += weight * torch.outer(turned, turned)
                for pair in range(head_dim // 2):
                    energy = weight * query[2 * pair : 2 * pair + 2].square().sum()
                    query_pairs[head, pair] += energy
                    phases[head, pair] += energy * back[pair].conjugate()
                gathered += p * (value - sample.value_mean[head])
            pulls.append(pull * gathered.norm())
        whole = torch.cat(pulls)
        value_square += torch.outer(whole, whole)
    return AttentionStats(
        torch.tensor(float(batch * count), dtype=torch.float64),
        query_square,
        turned_square,
        query_pairs,
        phases,
        value_square,
    )
