"""Scaled dot-product attention to all keys at once, or to two sets of keys merged afterwards.

The softmax over two sets of keys is the mean of the softmaxes over each set, weighted by the sums
of their exponentials. Fused kernels compute the logarithm of this sum, but
`scaled_dot_product_attention` drops it, so `attend_partly` calls the operators below it. These
operators have no gradient for the sum: merging is for inference.

Shapes: B batch, T query tokens, S keys, H heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmla_convert.maths.masks import QueryGroup

ALIGNED = 8  # fused CUDA kernels take head dims that are multiples of this
FLASH_WIDTH = 256  # largest head dim of the flash kernel
QUERIES_AT_ONCE = 1024


class PartialAttention(NamedTuple):
    """Attention of T queries to one set of keys.

    Attributes:
        output: (B, T, H, D).
        log_sum: Logarithm of the sum of exponentials, (B, T, H), float32.
    """

    output: Tensor
    log_sum: Tensor

    def of_heads(self, heads: slice) -> PartialAttention:
        """The attention of some heads."""
        return PartialAttention(self.output[:, :, heads], self.log_sum[:, :, heads])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[QueryGroup, ...] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of queries (B, T, H, D) to keys and values (B, S, H, D): (B, T, H, D).

    Key and value widths may differ; the narrower is padded, because fused kernels want one width.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        groups: Groups of the queries by the keys that they attend to; None where every query
            attends to every key. One call per group needs no mask and computes no masked pair.
        scale: Factor of the logits, 1/sqrt(D) by default.
    """
    width = v.shape[-1]
    q, k, v = widened(q, k, v)
    if groups is None:
        return _attend_all(q, k, v, scale)[..., :width]
    parts = zip(q.split([group.queries for group in groups], 1), groups, strict=True)
    outputs = [
        _attend_all(part, _joined(k, group.keys), _joined(v, group.keys), scale)
        for part, group in parts
    ]
    return torch.cat(outputs, 1)[..., :width]


def _attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _joined(x: Tensor, runs: tuple[slice, ...]) -> Tensor:
    """Some runs of the tokens of x (B, S, …); a single run is not copied."""
    parts = [x[:, run] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def widened(q: Tensor, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pad queries, keys and values with zeros to one width, a multiple of `multiple`."""
    widest = max(k.shape[-1], v.shape[-1])
    wide = -(-widest // multiple) * multiple
    q, k, v = (x if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def attend_partly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> PartialAttention:
    """Attention of queries (B, T, H, W) to keys (B, S, H, W) and values (B, S, H, D)."""
    width, device = v.shape[-1], q.device.type
    # Autocast does not reach the operators below `scaled_dot_product_attention`.
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q, k, v = widened(q, k, v, ALIGNED if q.is_cuda else 1)
    output, log_sum = _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
    return PartialAttention(output.transpose(1, 2)[..., :width], log_sum.transpose(1, 2))


def merge(one: PartialAttention, other: PartialAttention) -> Tensor:
    """Attention (B, T, H, D) to both sets of keys: one softmax over both."""
    share = torch.sigmoid(one.log_sum - other.log_sum)[..., None].to(one.output.dtype)
    return torch.lerp(other.output, one.output, share)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum of (B, H, T, W), by the operator of the device."""
    operators = torch.ops.aten
    if q.device.type == "cpu":
        return operators._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if q.is_cuda and _has_flash(q):
        # The kernel loads rows in steps of 16 bytes, and a slice may start between two steps.
        q, k, v = (x.contiguous() for x in (q, k, v))
        return operators._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    if q.is_cuda and q.dtype.itemsize <= 4:
        output, log_sum, *_ = operators._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=scale
        )
        return output, log_sum[..., : q.shape[-2]]  # padded to a multiple of 32 queries
    return plainly(q, k, v, scale)


def _has_flash(q: Tensor) -> bool:
    """Whether the flash operator takes such queries: two-byte dtypes on Ampere or newer."""
    modern = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return modern and q.dtype.itemsize == 2 and q.shape[-1] <= FLASH_WIDTH


def plainly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum by matrix products, some queries at a time."""
    outputs: list[Tensor] = []
    log_sums: list[Tensor] = []
    for part in q.split(QUERIES_AT_ONCE, dim=-2):
        logits = (part @ k.mT).float() * scale
        outputs.append(logits.softmax(-1).to(v.dtype) @ v)
        log_sums.append(logits.logsumexp(-1))
    return torch.cat(outputs, -2), torch.cat(log_sums, -1)
