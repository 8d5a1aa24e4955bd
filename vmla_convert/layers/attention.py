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
from vmla_convert.layers.parallel import ALONE, OneProcess
from vmla_convert.layers.sdpa import attend, attend_partly, merge
from vmla_convert.maths.masks import QueryGroup
from vmla_convert.maths.rope3d import Rotary, rotate, rotate_

# MiB of keys and values that are rebuilt at a time: few enough for the L3 cache of a CPU, enough
# to keep a GPU busy.
TILE_MIB = {"cpu": 64, "cuda": 1024}

Entries = tuple[Tensor, ...]
"""What a cache keeps of some tokens: key and value, or latent, rope key and norm; (B, S, width)."""


class Past(Protocol):
    """Compressed past tokens whose keys and values are rebuilt some heads at a time."""

    @property
    def tokens(self) -> int:
        """Number of tokens, S."""
        ...

    def heads(self, heads: slice) -> Entries:
        """Unrotated keys and values of some heads, both (B, S, heads, D)."""
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
        q, key = rotate(q, metadata.query_positions), rotate(key, metadata.key_positions)
        if attended.past is None or not attended.past.tokens:
            output = attend(q, key, value, metadata.groups)
        else:
            output = attend_with_past(q, key, value, attended.past, metadata)
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


def attend_with_past(
    q: Tensor, key: Tensor, value: Tensor, past: Past, metadata: AttentionMetadata
) -> Tensor:
    """Attend to a compressed past, rebuilt in tiles of heads, and to own tokens: (B, T, H, D).

    At inference the own tokens are attended to once, and the output of each tile is merged with
    theirs. Under gradients or a mask each tile is one softmax over past and own tokens.

    Args:
        q: Rotated queries (B, T, H, D).
        key: Rotated own keys (B, E, H, D).
        value: Own values (B, E, H, D).
        past: Compressed past of S tokens.
        metadata: Positions and mask; `runtime.tile_mib` bounds a tile.
    """
    assert metadata.past_positions is not None
    scale, separate = q.shape[-1] ** -0.5, metadata.groups is None and not torch.is_grad_enabled()
    own = attend_partly(q, key, value, scale) if separate else None
    outputs: list[Tensor] = []
    for heads in head_tiles(q, past.tokens, 2 * q.shape[-1], metadata.runtime.tile_mib):
        past_key, past_value = past.heads(heads)
        past_key, part = rotate_(past_key, metadata.past_positions), q[:, :, heads]
        if own is not None:
            tile = attend_partly(part, past_key, past_value, scale)
            outputs.append(merge(tile, own.of_heads(heads)))
        else:
            k = torch.cat([past_key, key[:, :, heads]], 1)
            v = torch.cat([past_value, value[:, :, heads]], 1)
            outputs.append(attend(part, k, v, metadata.groups))
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
