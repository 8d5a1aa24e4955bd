"""Scaled dot-product attention, to all keys or by groups of queries.

Shapes: B batch, T query tokens, S keys, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.kernels.alignment import aligned
from vmla_convert.kernels.attention import Kernel, fused_attention
from vmla_convert.maths.masks import QueryGroup


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[QueryGroup, ...] | None = None,
    scale: float | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Softmax attention of queries (B, T, H, D) to keys and values (B, S, H, D): (B, T, H, D).

    Key and value widths may differ; the narrower is padded, because fused kernels want one width.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        groups: Groups of the queries by the keys that they attend to; None where every query
            attends to every key. One call per group needs no mask and computes no masked pair.
        scale: Factor of the logits, 1/sqrt(D) by default, with the width D of queries.
        kernel: The kernel to prefer.
    """
    width, widest = v.shape[-1], max(k.shape[-1], v.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (aligned(x, widest) for x in (q, k, v))
    if groups is None:
        return fused_attention(q, k, v, scale, kernel)[..., :width]
    parts = zip(q.split([group.queries for group in groups], 1), groups, strict=True)
    outputs = [
        fused_attention(part, _joined(k, group.keys), _joined(v, group.keys), scale, kernel)
        for part, group in parts
    ]
    return torch.cat(outputs, 1)[..., :width]


def _joined(x: Tensor, runs: tuple[slice, ...]) -> Tensor:
    """Some runs of the tokens of x (B, S, …); a single run is not copied."""
    parts = [x[:, run] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
