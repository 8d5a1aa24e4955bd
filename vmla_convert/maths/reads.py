"""What an error in a cached key or value costs at the model's output, to first order.

A query i reads a key j with attention p_ij and gives the layer's output y_i. When key and value
change by dk_j and dv_j, head h adds to the output of the layer

    W_o,h [p_ij dv_j + p_ij (v_j − y_i) (q_i · RoPE(dk_j)) / (rho_j sqrt(D))]

and with g_i the gradient of one random direction of the model's output with respect to the layer's
output, h_i = W_o,hᵀ g_i, one wrong value of head h changes the model's output by (h_i · p_ij dv_j)²
and one wrong key, both squared and on average, by

    w_ij (q_i · RoPE(dk_j))²,   w_ij = (p_ij h_i · (v_j − y_i))² / (rho_j² D)

METHOD 7's first-order weights, carried through the rest of the model: errors that later layers or
gates would swallow cost nothing, and the errors of all layers are in one unit. `ReadSums` gathers
what a separable metric needs of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.moments import as_pairs

KEYS_AT_ONCE = 1024


class Reads(NamedTuple):
    """Queries of one layer and what they read; B clips, n queries, S keys.

    Attributes:
        query: Normed, before RoPE, (B, n, H, D).
        query_turn: exp(i·angle) of each query's pairs, (n, D/2) complex.
        key: Normed, before RoPE, (B, S, H, D).
        key_turn: (S, D/2) complex.
        key_norm: 1/rho, (B, S).
        value: (B, S, H, D).
        value_mean: Mean value of the tokens that will be cached, (H, D); it costs no rank.
        pull: h, the output gradient pulled back through W_o, (B, n, H, D).
        seen: (n, S), True where a query sees a key.
    """

    query: Tensor
    query_turn: Tensor
    key: Tensor
    key_turn: Tensor
    key_norm: Tensor
    value: Tensor
    value_mean: Tensor
    pull: Tensor
    seen: Tensor


class ReadSums(NamedTuple):
    """Sums over queries of one group of keys; merge with `merge_reads`.

    Attributes:
        queries: Queries seen, ().
        query_square: w q qᵀ of each head, (H, D, D): what a position-free key meets.
        turned_query_square: The same with the query turned into the key's frame, (H, D, D): what a
            key before RoPE meets.
        query_pairs: w |u_f|² of each pair, (H, D/2).
        phases: w |u_f|² exp(i·w_f·(key − query position)), (H, D/2) complex.
        value_square: h hᵀ over all heads, (H·D, H·D), each head times the length of the centred
            value that it gathers from the group.
    """

    queries: Tensor
    query_square: Tensor
    turned_query_square: Tensor
    query_pairs: Tensor
    phases: Tensor
    value_square: Tensor


def measure_reads(reads: Reads, groups: list[Tensor]) -> list[ReadSums]:
    """Sums for groups of keys, each a mask (n, S) of who belongs to it; attention is over all."""
    turned_query = as_pairs(reads.query) * reads.query_turn[:, None]
    turned_key = as_pairs(reads.key) * reads.key_turn[:, None]
    logits = torch.einsum("bnhf,bshf->bhns", turned_query, turned_key.conj()).real
    logits = logits / reads.query.shape[-1] ** 0.5
    attention = logits.masked_fill(~reads.seen, -torch.inf).softmax(-1)
    output = torch.einsum("bhns,bshd->bnhd", attention, reads.value)
    # h · (v_j − y_i)
    effect = torch.einsum("bnhd,bshd->bhns", reads.pull, reads.value)
    effect = effect - (reads.pull * output).sum(-1).movedim(-1, 1)[..., None]
    effect = (attention * effect * reads.key_norm[:, None, None]).square() / reads.query.shape[-1]
    return [_sum_group(reads, turned_query, attention * g, effect * g) for g in groups]


def merge_reads(parts: Iterable[ReadSums]) -> ReadSums:
    """Sums of all queries of several parts."""
    return ReadSums(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)))


def _sum_group(reads: Reads, turned_query: Tensor, attention: Tensor, weight: Tensor) -> ReadSums:
    """Sums for keys with attention and first-order weight w, both (B, H, n, S), 0 elsewhere."""
    batch, count, *_ = reads.query.shape
    query_weight = weight.sum(-1)
    square = torch.einsum("bhn,bnhd,bnhe->hde", query_weight, reads.query, reads.query)
    pairs = as_pairs(reads.query)
    energy = torch.einsum("bhn,bnhf->hf", query_weight, pairs.abs().square())
    phase = weight.to(reads.key_turn.dtype) @ reads.key_turn * reads.query_turn.conj()
    phases = (phase * pairs.abs().square().movedim(2, 1)).sum((0, 2))
    gathered = torch.einsum("bhns,bshd->bnhd", attention, reads.value - reads.value_mean)
    pull = (reads.pull * gathered.norm(dim=-1, keepdim=True)).flatten(0, 1).flatten(1).double()
    return ReadSums(
        queries=torch.tensor(batch * count, dtype=torch.float64),
        query_square=square.double().cpu(),
        turned_query_square=_turned_square(turned_query, reads.key_turn, weight).double().cpu(),
        query_pairs=energy.double().cpu(),
        phases=phases.to(torch.complex128).cpu(),
        value_square=(pull.mT @ pull).cpu(),
    )


def _turned_square(turned_query: Tensor, key_turn: Tensor, weight: Tensor) -> Tensor:
    """Sum of w_ij t tᵀ, (H, D, D), with t the query turned back by the key's own position.

    In pairs, t_f conj(t_g) only needs sums of w_ij exp(−i(w_f − w_g)p_j) over the keys, and t_f t_g
    those with the frequencies' sum: two products with one table for all heads.
    """
    # Only keys of the group count.
    members = weight.flatten(0, -2).any(0)
    turn, weight = key_turn[members].conj(), weight[..., members]
    against = weight.new_zeros(*weight.shape[:-1], turn.shape[1] ** 2, dtype=turn.dtype)
    along = torch.zeros_like(against)
    for part, turns in zip(weight.split(KEYS_AT_ONCE, -1), turn.split(KEYS_AT_ONCE), strict=True):
        both = turns[:, :, None] * turns.conj()[:, None], turns[:, :, None] * turns[:, None]
        against += part.to(turn.dtype) @ both[0].flatten(1)
        along += part.to(turn.dtype) @ both[1].flatten(1)
    size = (turn.shape[1], turn.shape[1])
    u = turned_query.movedim(2, 1)
    hermitian = torch.einsum("bhnfg,bhnf,bhng->hfg", against.unflatten(-1, size), u, u.conj())
    symmetric = torch.einsum("bhnfg,bhnf,bhng->hfg", along.unflatten(-1, size), u, u)
    return real_square(hermitian, symmetric)


def real_square(hermitian: Tensor, symmetric: Tensor) -> Tensor:
    """E[t tᵀ] (..., D, D) over interleaved channels from E[t_f conj(t_g)] and E[t_f t_g]."""
    real_real = (hermitian + symmetric).real / 2
    imag_imag = (hermitian - symmetric).real / 2
    real_imag = (symmetric - hermitian).imag / 2
    imag_real = (symmetric + hermitian).imag / 2
    rows = [torch.stack([real_real, real_imag], -1), torch.stack([imag_real, imag_imag], -1)]
    return torch.stack(rows, -3).flatten(-2).flatten(-3, -2)
