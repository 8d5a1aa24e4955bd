"""Dense self-attention and cross-attention of Wan: the reference for everything converted.

Every self-attention here speaks the same two verbs. `project` turns the tokens of a chunk into the
entries that a cache keeps, and into what only the chunk itself reads; `forward` lets queries read
entries, whoever kept them. Masked training and streamed inference therefore run the same code. Keys
are kept unrotated and take their position when they are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import Geometry
from vmla_convert.maths.rope3d import Rotary, rotate

Entries = tuple[Tensor, ...]
"""What a cache keeps of some tokens: tensors (B, S, width), one for each of `entry_widths`."""


class Projection(NamedTuple):
    """What attention makes of the tokens of a chunk.

    Attributes:
        cached: For the cache.
        own: Dense key and value, both (B, L, d), which only the chunk itself reads; None where it
            reads its own entries like any other.
    """

    cached: Entries
    own: Entries | None = None


class Sight(NamedTuple):
    """Where T queries and S keys are, and which keys each query sees.

    Layers whose current chunk stays dense read the past and their own chunk apart; the others read
    all entries alike.

    Attributes:
        query_rotary: Positions of the queries.
        key_rotary: Positions of the keys.
        mask: (T, S), True where a query sees a key; None for all.
        past: Indices (P,) of the keys that were cached before the chunk; None for all S.
        split_mask: (T, P + T), the same for the past keys and then the chunk's own; None for all.
    """

    query_rotary: Rotary
    key_rotary: Rotary
    mask: Tensor | None = None
    past: Tensor | None = None
    split_mask: Tensor | None = None


class WanRMSNorm(nn.RMSNorm):
    """RMS norm over the whole width, all heads together, computed in float32 (Wan 2.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., d)."""
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return normed.to(x.dtype) * self.weight


class DenseSelfAttention(nn.Module):
    """Wan self-attention whose cache keeps the normed key and the value of every head."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_heads = geometry.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(geometry.dim, geometry.dim) for _ in range(4))
        self.norm_q = WanRMSNorm(geometry.dim, eps=geometry.eps)
        self.norm_k = WanRMSNorm(geometry.dim, eps=geometry.eps)

    @property
    def entry_widths(self) -> tuple[int, ...]:
        """Numbers kept per token: key and value."""
        return self.k.out_features, self.v.out_features

    def project(self, x: Tensor) -> Projection:
        """Key and value of the tokens x (B, L, d), both (B, L, d); the key not yet rotated."""
        return Projection((self.norm_k(self.k(x)), self.v(x)))

    def forward(
        self,
        x: Tensor,
        entries: Entries,
        own: Entries | None,  # noqa: ARG002
        sight: Sight,
    ) -> Tensor:
        """Attend from x (B, T, d) to the entries of S tokens.

        Args:
            x: Input of the queries, modulated and normed.
            entries: Of the S tokens, from `project`, cached or not.
            own: Of the T tokens of x, from `project`; a dense cache holds them already.
            sight: Positions and masks.

        Returns:
            (B, T, d).
        """
        key, value = entries
        q = rotate(split_heads(self.norm_q(self.q(x)), self.num_heads), sight.query_rotary)
        k = rotate(split_heads(key, self.num_heads), sight.key_rotary)
        v = split_heads(value, self.num_heads)
        return self.o(attend(q, k, v, sight.mask))


class CrossAttention(nn.Module):
    """Wan cross-attention to the prompt: QK-norm, no positions, no mask."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_heads = geometry.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(geometry.dim, geometry.dim) for _ in range(4))
        self.norm_q = WanRMSNorm(geometry.dim, eps=geometry.eps)
        self.norm_k = WanRMSNorm(geometry.dim, eps=geometry.eps)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend from x (B, T, d) to the embedded prompt (B, S, d)."""
        q = split_heads(self.norm_q(self.q(x)), self.num_heads)
        k = split_heads(self.norm_k(self.k(context)), self.num_heads)
        v = split_heads(self.v(context), self.num_heads)
        return self.o(attend(q, k, v))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·D) to (B, L, H, D)."""
    return x.unflatten(-1, (num_heads, -1))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention of queries (B, T, H, D) to keys and values (B, S, H, D): (B, T, H·D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).flatten(2)
