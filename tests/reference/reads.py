"""What reads add up to, one query, key and head at a time."""

from __future__ import annotations

import cmath
from itertools import product

import torch
from torch import Tensor

from vmla_convert.maths.reads import Reads, ReadSums


def rotate(x: Tensor, turn: list[complex]) -> Tensor:
    """Interleaved pairs of x (D,), each times a complex number."""
    out = torch.empty_like(x)
    for pair, factor in enumerate(turn):
        z = complex(x[2 * pair], x[2 * pair + 1]) * factor
        out[2 * pair], out[2 * pair + 1] = z.real, z.imag
    return out


def attention_of(reads: Reads, clip: int, i: int) -> Tensor:
    """p_ij of all heads and keys, (H, S)."""
    heads, head_dim = reads.query.shape[2:]
    query_turn = reads.query_turn[i].tolist()
    probabilities = torch.zeros(heads, reads.key.shape[1], dtype=torch.float64)
    for head in range(heads):
        query = rotate(reads.query[clip, i, head], query_turn)
        exponentials = {}
        for j in reads.seen[i].nonzero().flatten().tolist():
            key = rotate(reads.key[clip, j, head], reads.key_turn[j].tolist())
            exponentials[j] = cmath.exp(float(query @ key) / head_dim**0.5).real
        for j, exponential in exponentials.items():
            probabilities[head, j] = exponential / sum(exponentials.values())
    return probabilities


def outputs(reads: Reads) -> Tensor:
    """What each query gathers, (B, n, H, D)."""
    out = torch.zeros_like(reads.query)
    for clip, i in product(*map(range, reads.query.shape[:2])):
        out[clip, i] = torch.einsum("hs,shd->hd", attention_of(reads, clip, i), reads.value[clip])
    return out


def sums_by_loops(reads: Reads, group: Tensor) -> ReadSums:
    """`ReadSums` of one group of keys."""
    batch, count, heads, head_dim = reads.query.shape
    query_square = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
    turned_square = torch.zeros_like(query_square)
    query_pairs = torch.zeros(heads, head_dim // 2, dtype=torch.float64)
    phases = torch.zeros(heads, head_dim // 2, dtype=torch.complex128)
    value_square = torch.zeros(heads * head_dim, heads * head_dim, dtype=torch.float64)
    for clip, i in product(range(batch), range(count)):
        probabilities, pulls = attention_of(reads, clip, i), []
        for head in range(heads):
            query, pull = reads.query[clip, i, head], reads.pull[clip, i, head]
            output = probabilities[head] @ reads.value[clip, :, head]
            gathered = torch.zeros(head_dim, dtype=torch.float64)
            for j in group[i].nonzero().flatten().tolist():
                p, value = probabilities[head, j], reads.value[clip, j, head]
                # What the model's output gains from a unit of the logit's product q · k.
                effect = p * (pull @ (value - output)) * reads.key_norm[clip, j] / head_dim**0.5
                weight = effect.square()
                back = [
                    complex(q) * complex(k).conjugate()
                    for q, k in zip(reads.query_turn[i], reads.key_turn[j], strict=True)
                ]
                turned = rotate(query, back)
                query_square[head] += weight * torch.outer(query, query)
                turned_square[head] += weight * torch.outer(turned, turned)
                for pair in range(head_dim // 2):
                    energy = weight * query[2 * pair : 2 * pair + 2].square().sum()
                    query_pairs[head, pair] += energy
                    phases[head, pair] += energy * back[pair].conjugate()
                gathered += p * (value - reads.value_mean[head])
            pulls.append(pull * gathered.norm())
        whole = torch.cat(pulls)
        value_square += torch.outer(whole, whole)
    return ReadSums(
        torch.tensor(float(batch * count), dtype=torch.float64),
        query_square,
        turned_square,
        query_pairs,
        phases,
        value_square,
    )
