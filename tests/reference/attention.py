"""The MLA layer by its formula: one head, query and key at a time, on one clip."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.config import MLAConfig
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.rope3d import Rotary


def one_softmax(
    layer: LatentSelfAttention,
    mla: MLAConfig,
    index: int,
    x: Tensor,
    rotary: Rotary,
    seen: Tensor,
) -> Tensor:
    """The layer's output (L, d): all logits of a query in one row of one matrix."""
    outputs = [
        logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        for logits, value in head_reads(layer, mla, index, x, rotary)
    ]
    return layer.o(torch.cat(outputs, -1))


def head_reads(
    layer: LatentSelfAttention, mla: MLAConfig, index: int, x: Tensor, rotary: Rotary
) -> list[tuple[Tensor, Tensor]]:
    """Logits (L, L) and values (L, D) of every head, of one clip's tokens x (L, d)."""
    heads, scale = layer.num_heads, layer.head_dim**0.5
    c = layer.kv_a_proj(x)
    key_part = value_part = c
    if mla.latent == "split":
        key_part, value_part = c[:, : mla.key_ranks[index]], c[:, mla.key_ranks[index] :]
    key, value = layer.kv_b_proj_k(key_part), layer.kv_b_proj_v(value_part)
    pairs, r = list(mla.rope_pairs[index]), layer.k_rope_proj(x)
    rho = (layer.k_norm_proj(x).square().mean(-1) + layer.eps).sqrt()

    def of_head(tensor: Tensor, head: int) -> Tensor:
        return tensor.unflatten(-1, (heads, -1))[:, head]

    def turned(channels: Tensor, token: int) -> Tensor:
        z = torch.view_as_complex(channels.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * rotary.rotations()[token, pairs]).flatten()

    reads: list[tuple[Tensor, Tensor]] = []
    query, tokens = layer.norm_q(layer.q(x)), range(len(x))
    for head in range(heads):
        q, k = of_head(query, head), of_head(key, head)
        logits = torch.zeros(len(x), len(x))
        for i in tokens:
            for j in tokens:
                rope = turned(layer.q_rope_map[head] @ q[i], i) @ turned(r[j], j)
                logits[i, j] = (q[i] @ k[j] + rope) / (rho[j] * scale)
        reads.append((logits, of_head(value, head)))
    return reads
