"""Dense self-attention and cross-attention of Wan, and attention to a compressed past.

Every self-attention has two methods. `project` turns tokens into the entries that a cache keeps;
`forward` attends to entries, cached or not. Masked training and streamed inference therefore run
the same code. Keys are kept unrotated and are rotated when they are attended to.

Shapes: B batch, L tokens, T query tokens, E tokens attended to without compression, S past tokens,
H heads, D head dim (H·D = d).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.config import Geometry, RuntimeConfig
from vmla_convert.kernels.rotary import rotate_, rotated
from vmla_convert.layers.parallel import ALONE, OneProcess
from vmla_convert.layers.sdpa import attend
from vmla_convert.maths.masks import QueryGroup
from vmla_convert.maths.rope3d import Rotary

# MiB of keys and values that are rebuilt at a time: few enough for the L3 cache of a CPU, enough
# to keep a GPU busy.
TILE_MIB = {"cpu": 64, "cuda": 1024}

Entries = tuple[Tensor, ...]
"""Tensors (B, S, width) that a cache keeps: key and value, or latent, rope key and norm."""


class Past(Protocol):
    """Compressed past tokens whose keys and values are rebuilt some heads at a time."""

    @property
    def tokens(self) -> int:
        """Number of tokens, S."""
        ...

    def heads(self, heads: slice) -> Entries:
        """Unrotated keys and values of some heads, both (B, S, heads, D)."""
        ...

    def write(self, heads: slice, rotary: Rotary, key: Tensor, value: Tensor) -> None:
        """Write rotated keys and values of some heads into tensors of that shape."""
        ...


class AttendedTokens(NamedTuple):
    """The tokens that a chunk's queries attend to, oldest first.

    Attributes:
        entries: Entries of E tokens from `project`; the chunk's own come last.
        past: S compressed tokens older than `entries`; None where all tokens are in `entries`.
    """

    entries: Entries
    past: Past | None = None


class AttentionMetadata(NamedTuple):
    """Positions and mask of one attention call, the same for all layers.

    Attributes:
        query_positions: Rotations of the T queries.
        key_positions: Rotations of the E tokens of `AttendedTokens.entries`.
        past_positions: Rotations of the S tokens of `AttendedTokens.past`, if there is a past.
        groups: Groups of the T queries by which of the S + E keys they attend to; None where every
            query attends to every key.
        runtime: Backend and tile size.
        parallel: Processes that compute the stream together.
    """

    query_positions: Rotary
    key_positions: Rotary
    past_positions: Rotary | None = None
    groups: tuple[QueryGroup, ...] | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    parallel: OneProcess = ALONE


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
    """Wan self-attention; its entries are the normed, unrotated key and the value of all heads."""

    @property
    def entry_widths(self) -> dict[str, int]:
        """Numbers kept per token, by name."""
        return {"key": self.k.out_features, "value": self.v.out_features}

    def project(self, x: Tensor) -> Entries:
        """Key and value of tokens x (B, L, d), both (B, L, d)."""
        return self.norm_k(self.k(x)), self.v(x)

    def exchange(self, entries: Entries, parallel: OneProcess) -> Entries:
        """Entries of all tokens for own heads, from entries of own tokens."""
        return tuple(parallel.to_heads(entry) for entry in entries)

    def forward(self, x: Tensor, attended: AttendedTokens, metadata: AttentionMetadata) -> Tensor:
        """Output (B, T, d) of the modulated, layer-normed tokens x (B, T, d)."""
        parallel, width = metadata.parallel, x.shape[-1] // self.num_heads
        q = parallel.to_heads(self.norm_q(self.q(x))).unflatten(-1, (-1, width))
        key, value = (entry.unflatten(-1, (-1, width)) for entry in attended.entries)
        q, past = rotated(q, metadata.query_positions), attended.past
        kernel = metadata.runtime.attention_backend
        if past is None or not past.tokens:
            key = rotated(key, metadata.key_positions)
            output = attend(q, key, value, metadata.groups, kernel=kernel)
        elif metadata.groups is None and not torch.is_grad_enabled():
            key, value = joined(key, value, past, metadata)
            output = attend(q, key, value, kernel=kernel)
        else:
            output = attend_in_tiles(q, key, value, past, metadata)
        return self.o(parallel.to_tokens(output.flatten(2)))


class CrossAttention(_Attention):
    """Wan cross-attention to the prompt, with QK-norm and without positions."""

    def project_prompt(self, text: Tensor) -> Entries:
        """Key and value, both (B, S, d), of an embedded prompt (B, S, d)."""
        return self.norm_k(self.k(text)), self.v(text)

    def forward(self, x: Tensor, prompt: Tensor | Entries) -> Tensor:
        """Attend from x (B, T, d) to an embedded prompt (B, S, d), or to its key and value."""
        if isinstance(prompt, Tensor):
            prompt = self.project_prompt(prompt)
        q, k, v = (split_heads(part, self.num_heads) for part in (self.norm_q(self.q(x)), *prompt))
        return self.o(attend(q, k, v).flatten(2))


def in_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·D) to (B, L, H, D)."""
    return x.unflatten(-1, (num_heads, -1))


def joined(
    key: Tensor, value: Tensor, past: Past, metadata: AttentionMetadata
) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of past and own tokens, both (B, S + E, H, D), without gradients.

    The past is decoded into its place, some heads at a time, so that one fused kernel can attend to
    all tokens and nothing is copied.

    Args:
        key: Own unrotated keys (B, E, H, D).
        value: Own values (B, E, H, D).
        past: Compressed past of S tokens.
        metadata: Positions; `runtime.tile_mib` bounds what is decoded at a time.
    """
    assert metadata.past_positions is not None
    batch, _, num_heads, width = key.shape
    shape = (batch, past.tokens + key.shape[1], num_heads, width)
    keys, values = (value.new_empty(shape) for _ in range(2))
    own = slice(past.tokens, None)
    keys[:, own], values[:, own] = key, value
    rotate_(keys[:, own], metadata.key_positions)
    for heads in head_tiles(key, past.tokens, 2 * width, metadata.runtime.tile_mib):
        parts = (whole[:, : past.tokens, heads] for whole in (keys, values))
        past.write(heads, metadata.past_positions, *parts)
    return keys, values


def attend_in_tiles(
    q: Tensor, key: Tensor, value: Tensor, past: Past, metadata: AttentionMetadata
) -> Tensor:
    """Attend to a compressed past and to own tokens, (B, T, H, D), with gradients or a mask.

    Args:
        q: Rotated queries (B, T, H, D).
        key: Own unrotated keys (B, E, H, D).
        value: Own values (B, E, H, D).
        past: Compressed past of S tokens, rebuilt in tiles of heads.
        metadata: Positions and mask; `runtime.tile_mib` bounds a tile.
    """
    assert metadata.past_positions is not None
    key, outputs = rotated(key, metadata.key_positions), list[Tensor]()
    for heads in head_tiles(q, past.tokens, 2 * q.shape[-1], metadata.runtime.tile_mib):
        past_key, past_value = past.heads(heads)
        past_key = rotate_(past_key, metadata.past_positions)
        k = torch.cat([past_key, key[:, :, heads]], 1)
        v = torch.cat([past_value, value[:, :, heads]], 1)
        outputs.append(attend(q[:, :, heads], k, v, metadata.groups))
    return torch.cat(outputs, 2)


def head_tiles(q: Tensor, tokens: int, width: int, tile_mib: int | None) -> list[slice]:
    """Split the heads into nearly equal tiles, so that rebuilt keys and values fit in memory.

    With gradients on there is one tile, because autograd keeps all rebuilt tensors anyway.

    Args:
        q: Queries (B, T, H, D); only shape, dtype and device are used.
        tokens: Rebuilt tokens, S.
        width: Numbers to rebuild for each token and head.
        tile_mib: Most MiB of a tile of more than one head; None for the device's default.
    """
    num_heads = q.shape[2]
    if torch.is_grad_enabled():
        return [slice(0, num_heads)]
    # Rotation computes in float32, so 16-bit keys exist in both dtypes for a while.
    itemsize = q.dtype.itemsize if q.dtype.itemsize >= 4 else q.dtype.itemsize + 4
    head_bytes = max(1, q.shape[0] * tokens * width * itemsize)
    most = (tile_mib or TILE_MIB["cuda" if q.is_cuda else "cpu"]) * 2**20 // head_bytes
    heads = -(-num_heads // -(-num_heads // max(1, most)))
    starts = range(0, num_heads, heads)
    return [slice(start, min(start + heads, num_heads)) for start in starts]
