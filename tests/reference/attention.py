"""The latent layer as METHOD 1 and 3 say it: one head, query and key at a time, on one clip."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import MLAConfig
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.rope3d import Rotary


class HeadReads(NamedTuple):
    """Logits (L, L) of one head, and the values (L, D) that go with them.

    Attributes:
        latent_logits: Of every query to every key as its latent tells it.
        latent_value: From the latent.
        dense_logits: Of every query to every key of the dense layer; None if it has none.
        dense_value: Of the dense layer.
    """

    latent_logits: Tensor
    latent_value: Tensor
    dense_logits: Tensor | None = None
    dense_value: Tensor | None = None


def one_softmax(
    layer: LatentSelfAttention,
    mla: MLAConfig,
    index: int,
    x: Tensor,
    rotary: Rotary,
    seen: Tensor,
    own: Tensor,
) -> Tensor:
    """The layer's output (L, d): all logits of a query in one row of one matrix."""
    outputs: list[Tensor] = []
    for head in head_reads(layer, mla, index, x, rotary):
        logits, dense = head.latent_logits, torch.zeros_like(seen)
        if head.dense_logits is not None:
            logits, dense = torch.where(own, head.dense_logits, logits), own
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        output = (weights * ~dense) @ head.latent_value
        if head.dense_value is not None:
            output = output + (weights * dense) @ head.dense_value
        outputs.append(output)
    return layer.o(torch.cat(outputs, -1))


def merged_softmaxes(
    layer: LatentSelfAttention,
    mla: MLAConfig,
    index: int,
    x: Tensor,
    rotary: Rotary,
    seen: Tensor,
    own: Tensor,
) -> Tensor:
    """The output (L, d) of a layer with a dense chunk: two attentions, merged by log-sum-exp."""
    outputs: list[Tensor] = []
    for head in head_reads(layer, mla, index, x, rotary):
        assert head.dense_logits is not None
        assert head.dense_value is not None
        past, past_size = attend(head.latent_logits, head.latent_value, seen & ~own)
        chunk, chunk_size = attend(head.dense_logits, head.dense_value, seen & own)
        share = torch.sigmoid(past_size - chunk_size)
        outputs.append(share * past + (1 - share) * chunk)
    return layer.o(torch.cat(outputs, -1))


def attend(logits: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Output (L, D) and log-sum-exp (L, 1) of one attention; a blind query gets 0 and −∞."""
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ value, logits.logsumexp(-1, keepdim=True)


def head_reads(
    layer: LatentSelfAttention, mla: MLAConfig, index: int, x: Tensor, rotary: Rotary
) -> list[HeadReads]:
    """What every head makes of one clip's tokens x (L, d)."""
    choices, heads, eps = mla.layer, layer.num_heads, layer.eps
    scale = layer.head_dim**0.5
    c = layer.kv_a_proj(x)
    key_part = value_part = c
    if choices.latent == "split":
        key_part, value_part = c[:, : mla.key_ranks[index]], c[:, mla.key_ranks[index] :]
    key, value = layer.kv_b_proj_k(key_part), layer.kv_b_proj_v(value_part)
    pairs = list(mla.rope_pairs[index])
    r = layer.k_rope_proj(x) if pairs else c[:, :0]

    if choices.k_norm == "latent":
        root = layer.k_norm_latent(torch.cat([c, r], -1))
        rho = (root.square().sum(-1) + layer.k_norm_floor + eps).sqrt()
    elif choices.k_norm == "rebuilt":
        rho = (key.square().mean(-1) + layer.k_norm_floor + eps).sqrt()
        key = key * layer.norm_k.weight
    else:
        dense_key = layer.k(x) if choices.current_chunk == "dense" else layer.k_norm_proj(x)
        rho = (dense_key.square().mean(-1) + eps).sqrt()

    def of_head(tensor: Tensor, head: int) -> Tensor:
        return tensor.unflatten(-1, (heads, -1))[:, head]

    def turned(channels: Tensor, token: int, pairs: list[int] | slice = slice(None)) -> Tensor:
        z = torch.view_as_complex(channels.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * rotary.turns()[token, pairs]).flatten()

    reads: list[HeadReads] = []
    query, tokens = layer.norm_q(layer.q(x)), range(len(x))
    for head in range(heads):
        q, k = of_head(query, head), of_head(key, head)
        content = q
        if mla.qk_nope_head_dim is not None:
            assert layer.q_nope_map is not None
            content = q @ layer.q_nope_map[head].mT
        logits = torch.zeros(len(x), len(x))
        for i in tokens:
            for j in tokens:
                if pairs:
                    rope = turned(layer.q_rope_map[head] @ q[i], i, pairs) @ turned(r[j], j, pairs)
                    score = content[i] @ k[j] + rope
                else:
                    score = turned(q[i], i) @ turned(k[j], j)
                logits[i, j] = score / (rho[j] * scale)
        read = HeadReads(logits, of_head(value, head))
        if choices.current_chunk == "dense":
            own_key = of_head(layer.norm_k(layer.k(x)), head)
            turned_query = torch.stack([turned(q[i], i) for i in tokens])
            turned_key = torch.stack([turned(own_key[j], j) for j in tokens])
            read = HeadReads(
                *read[:2], turned_query @ turned_key.mT / scale, of_head(layer.v(x), head)
            )
        reads.append(read)
    return reads
