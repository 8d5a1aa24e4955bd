"""Dense self-attention and cross-attention of Wan: the reference for everything converted.

Every self-attention here has the same two verbs. `project` turns tokens into the entries that a
cache keeps; `forward` attends to entries, whoever kept them. Masked training and streamed inference
therefore run the same code. Keys are kept unrotated and get their position when they are attended
to. Past tokens may be kept compressed; the chunk's own keys and values are always exact.

Letters: B batch, T query tokens, S past tokens, E tokens attended to exactly, H heads, D head dim
(H·D = d).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import Geometry, RuntimeConfig
from vmla_convert.layers.sdpa import Partial, attend, attend_partly, merge
from vmla_convert.maths.masks import QueryGroup
from vmla_convert.maths.rope3d import Rotary, rotate, rotate_

# Rebuilt keys and values at a time: what stays in a CPU's cache, and what keeps a GPU busy.
TILE_MIB = {"cpu": 64, "cuda": 1024}

Entries = tuple[Tensor, ...]
"""What is kept of some tokens: tensors (B, S, width), one for each of `entry_widths`."""


class Past(Protocol):
    """Past tokens that are kept compressed, and rebuilt some heads at a time."""

    @property
    def tokens(self) -> int:
        """S, how many tokens there are."""
        ...

    def heads(self, heads: slice) -> Entries:
        """Keys, unrotated, and values of some heads, both (B, S, heads, D)."""
        ...


class Reading(NamedTuple):
    """What the queries of a chunk attend to, the past first.

    Attributes:
        entries: Tokens as `project` makes them, of E tokens; the chunk's own are the last.
        past: S further tokens, older than `entries`; None where all tokens are in `entries`.
    """

    entries: Entries
    past: Past | None = None


class Sight(NamedTuple):
    """Where T queries are, where the tokens are that they attend to, and who attends to whom.

    Attributes:
        query: Positions of the queries.
        keys: Positions of the E tokens of `Reading.entries`.
        past: Positions of the S tokens of `Reading.past`; None where there are none.
        groups: The T queries grouped by which of the S + E keys they attend to; None where all
            attend to all.
        runtime: How compressed tokens are attended to.
    """

    query: Rotary
    keys: Rotary
    past: Rotary | None = None
    groups: tuple[QueryGroup, ...] | None = None
    runtime: RuntimeConfig = RuntimeConfig()


class WanRMSNorm(nn.RMSNorm):
    """RMS norm over the whole width, all heads together, computed in float32 (Wan 2.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., d)."""
        normed = F.rms_norm(in_float32(x), self.normalized_shape, eps=self.eps)
        return normed.to(x.dtype) * self.weight


class _Attention(nn.Module):
    """Queries, keys, values and output of all heads, with QK-norm."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_heads = geometry.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(geometry.dim, geometry.dim) for _ in range(4))
        self.norm_q = WanRMSNorm(geometry.dim, eps=geometry.eps)
        self.norm_k = WanRMSNorm(geometry.dim, eps=geometry.eps)


class DenseSelfAttention(_Attention):
    """Wan self-attention whose cache keeps the normed key and the value of every head."""

    def project(self, x: Tensor) -> Entries:
        """Normed key, not yet rotated, and value of tokens x (B, L, d), both (B, L, d)."""
        return self.norm_k(self.k(x)), self.v(x)

    def forward(self, x: Tensor, reading: Reading, sight: Sight) -> Tensor:
        """Attend from x (B, T, d) to what a cache holds, or to a whole clip.

        Args:
            x: Modulated and normed input of the queries.
            reading: Keys and values, cached or not.
            sight: Positions, and who attends to whom.

        Returns:
            (B, T, d).
        """
        heads = self.num_heads
        q = rotate(split_heads(self.norm_q(self.q(x)), heads), sight.query)
        key, value = (split_heads(entry, heads) for entry in reading.entries)
        key = rotate(key, sight.keys)
        if reading.past is None or not reading.past.tokens:
            return self.o(attend(q, key, value, sight.groups).flatten(2))
        return self.o(attend_with_past(q, key, value, reading.past, sight).flatten(2))


class CrossAttention(_Attention):
    """Wan cross-attention to the prompt: QK-norm, no positions, no mask."""

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


def attend_with_past(q: Tensor, key: Tensor, value: Tensor, past: Past, sight: Sight) -> Tensor:
    """Attend to a compressed past, rebuilt in tiles of heads, and to exact tokens: (B, T, H, D).

    Without gradients and masks the exact tokens are attended to once, and each tile's output is
    merged with theirs; else each tile is one softmax over both.

    Args:
        q: Rotated queries (B, T, H, D).
        key: Rotated keys of the exact tokens, (B, E, H, D).
        value: Their values.
        past: S tokens.
        sight: As of `DenseSelfAttention.forward`; `sight.runtime.tile_mib` bounds what is rebuilt
            at a time.
    """
    assert sight.past is not None
    scale, separate = q.shape[-1] ** -0.5, sight.groups is None and not torch.is_grad_enabled()
    exact = attend_partly(q, key, value, scale) if separate else None
    outputs: list[Tensor] = []
    for heads in head_tiles(q, past.tokens, 2 * q.shape[-1], sight.runtime.tile_mib):
        past_key, past_value = past.heads(heads)
        past_key, part = rotate_(past_key, sight.past), q[:, :, heads]
        if exact is not None:
            own = Partial(exact.output[:, :, heads], exact.log_sum[:, :, heads])
            outputs.append(merge(attend_partly(part, past_key, past_value, scale), own))
        else:
            k = torch.cat([past_key, key[:, :, heads]], 1)
            v = torch.cat([past_value, value[:, :, heads]], 1)
            outputs.append(attend(part, k, v, sight.groups))
    return torch.cat(outputs, 2)


def head_tiles(q: Tensor, tokens: int, width: int, tile_mib: int | None) -> list[slice]:
    """Heads that are rebuilt together: tiles of one size but the last, to keep all cores at work.

    Args:
        q: Queries (B, T, H, D), for their batch, dtype and device.
        tokens: S.
        width: Numbers that are rebuilt for each token and head.
        tile_mib: Most MiB of a tile, at least one head; None for the device's default. Under
            gradients all heads are one tile, as autograd keeps what is rebuilt anyway.
    """
    num_heads = q.shape[2]
    if torch.is_grad_enabled():
        return [slice(0, num_heads)]
    # Rotation computes in float32: narrow keys exist in both for a while.
    itemsize = q.dtype.itemsize if q.dtype.itemsize >= 4 else q.dtype.itemsize + 4
    head_bytes = max(1, q.shape[0] * tokens * width * itemsize)
    most = (tile_mib or TILE_MIB["cuda" if q.is_cuda else "cpu"]) * 2**20 // head_bytes
    heads = -(-num_heads // -(-num_heads // max(1, most)))
    starts = range(0, num_heads, heads)
    return [slice(start, min(start + heads, num_heads)) for start in starts]
