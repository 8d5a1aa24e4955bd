"""Dense self-attention and cross-attention of Wan: the reference for everything converted.

Every self-attention here speaks the same two verbs. `project` turns the tokens of a chunk into the
entries that a cache keeps, and into what only the chunk itself reads; `forward` lets queries read
entries, whoever kept them. Masked training and streamed inference therefore run the same code. Keys
are kept unrotated and take their position when they are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import Geometry, RuntimeConfig
from vmla_convert.maths.masks import QueryGroup
from vmla_convert.maths.rope3d import Rotary, rotate

Entries = tuple[Tensor, ...]
"""What is kept of some tokens: tensors (B, S, width), one for each of `entry_widths`."""


class Projection(NamedTuple):
    """What attention makes of the tokens of a chunk.

    Attributes:
        cached: For the cache; empty where the pass is not kept and nothing else reads it.
        own: Dense key and value, both (B, L, d), which only the chunk itself reads; None where it
            reads its own entries like any other.
        keep: Later chunks will read this pass; others are overwritten by the next.
    """

    cached: Entries
    own: Entries | None = None
    keep: bool = True


class Reading(NamedTuple):
    """What the queries of a chunk read, the tokens of `entries` first.

    Attributes:
        entries: Of S tokens, as a cache keeps them.
        exact: Dense keys and values (B, E, d) of the newest tokens, the chunk's own last; None
            where all are read alike.
    """

    entries: Entries
    exact: Entries | None = None


class Sight(NamedTuple):
    """Where T queries are and what they read, and which of it each query sees.

    Attributes:
        query: Positions of the queries.
        keys: Positions of the S entries.
        exact: Positions of the E exact keys; None where there are none.
        groups: Of the T queries by which of the S + E keys they see; None where all see all.
        runtime: How to read.
    """

    query: Rotary
    keys: Rotary
    exact: Rotary | None = None
    groups: tuple[QueryGroup, ...] | None = None
    runtime: RuntimeConfig = RuntimeConfig()


class WanRMSNorm(nn.RMSNorm):
    """RMS norm over the whole width, all heads together, computed in float32 (Wan 2.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., d)."""
        normed = F.rms_norm(in_float32(x), self.normalized_shape, eps=self.eps)
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
    def entry_widths(self) -> dict[str, int]:
        """Numbers kept per token."""
        return {"key": self.k.out_features, "value": self.v.out_features}

    def project(self, x: Tensor, keep: bool = True) -> Projection:
        """Key and value of the tokens x (B, L, d), both (B, L, d); the key not yet rotated."""
        return Projection((self.norm_k(self.k(x)), self.v(x)), keep=keep)

    def forward(self, x: Tensor, reading: Reading, sight: Sight) -> Tensor:
        """Attend from x (B, T, d) to what a cache holds, or a pass over a whole clip.

        Args:
            x: Input of the queries, modulated and normed.
            reading: Of S tokens, from `project`, cached or not.
            sight: Positions, and who sees what.

        Returns:
            (B, T, d).
        """
        key, value = reading.entries
        q = rotate(split_heads(self.norm_q(self.q(x)), self.num_heads), sight.query)
        k = rotate(split_heads(key, self.num_heads), sight.keys)
        v = split_heads(value, self.num_heads)
        return self.o(attend(q, k, v, sight.groups).flatten(2))


class CrossAttention(nn.Module):
    """Wan cross-attention to the prompt: QK-norm, no positions, no mask."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_heads = geometry.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(geometry.dim, geometry.dim) for _ in range(4))
        self.norm_q = WanRMSNorm(geometry.dim, eps=geometry.eps)
        self.norm_k = WanRMSNorm(geometry.dim, eps=geometry.eps)

    def read_prompt(self, text: Tensor) -> Entries:
        """Key and value (B, S, d) of an embedded prompt (B, S, d); they last as long as it does."""
        return self.norm_k(self.k(text)), self.v(text)

    def forward(self, x: Tensor, prompt: Tensor | Entries) -> Tensor:
        """Attend from x (B, T, d) to an embedded prompt (B, S, d), or to what was read of it."""
        if isinstance(prompt, Tensor):
            prompt = self.read_prompt(prompt)
        q, k, v = (split_heads(part, self.num_heads) for part in (self.norm_q(self.q(x)), *prompt))
        return self.o(attend(q, k, v).flatten(2))


def in_float32(x: Tensor) -> Tensor:
    """The same in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·D) to (B, L, H, D)."""
    return x.unflatten(-1, (num_heads, -1))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[QueryGroup, ...] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of queries (B, T, H, D) to keys and values (B, S, H, D): (B, T, H, D).

    Widths of keys and values may differ; the narrower is padded, as fused kernels want them alike.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        groups: Of the queries, by the keys that they see; None where all see all. Each is attended
            for itself, so that kernels meet no mask and no pair that nobody sees.
        scale: Of the scores; that of the queries' width by default.
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
    """Some runs of the tokens of x (B, S, …); a single one is not copied."""
    parts = [x[:, run] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def widened(q: Tensor, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """All as wide as the widest, rounded up; zeros change neither scores nor what is gathered."""
    widest = max(k.shape[-1], v.shape[-1])
    wide = -(-widest // multiple) * multiple
    q, k, v = (x if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    return q, k, v
