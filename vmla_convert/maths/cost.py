"""Operations of a block and of attention to a latent cache, and bytes between processes."""

from __future__ import annotations

from typing import NamedTuple

from vmla_convert.config import Geometry


class AttentionShape(NamedTuple):
    """Sizes of one attention call.

    Attributes:
        queries: Query tokens of all clips.
        keys: Attended tokens of one clip.
        batch: Clips.
        heads: Heads.
        key_width: Width of a rebuilt key of one head, content and rope part.
        value_width: Width of a rebuilt value of one head.
        shared_key: Width of the shared key that the absorbed backend attends to.
        shared_value: Part of the latent that values use.
    """

    queries: int
    keys: int
    batch: int
    heads: int
    key_width: int
    value_width: int
    shared_key: int
    shared_value: int


def materialised_flops(shape: AttentionShape) -> int:
    """Operations to rebuild keys and values of all heads and attend; one width for both."""
    rebuilt = shape.shared_key * shape.key_width + shape.shared_value * shape.value_width
    up = 2 * shape.batch * shape.keys * shape.heads * rebuilt
    width = max(shape.key_width, shape.value_width)
    return up + 4 * shape.queries * shape.keys * shape.heads * width


def absorbed_flops(shape: AttentionShape) -> int:
    """Operations to map queries into the shared space, attend there, and map the result out."""
    mixed = shape.shared_key * shape.key_width + shape.shared_value * shape.value_width
    width = max(shape.shared_key, shape.shared_value)
    return 2 * shape.queries * shape.heads * (mixed + 2 * shape.keys * width)


def block_flops(geometry: Geometry, queries: int, keys: int) -> int:
    """Operations of one dense block in a forward pass.

    Args:
        geometry: Sizes of the block.
        queries: Tokens that pass the block.
        keys: Tokens that each of them attends to in self-attention.
    """
    dim = geometry.dim
    # Query, key, value and output of self-attention, query and output of cross-attention.
    linear = 2 * queries * (6 * dim * dim + 2 * dim * geometry.ffn_dim)
    return linear + 4 * queries * (keys + geometry.text_len) * dim


class Exchange(NamedTuple):
    """Numbers that processes exchange of each token of a chunk, in one layer.

    Attributes:
        by_head: Bytes in every pass that are divided by heads: queries, outputs, dense keys and
            values.
        whole: Bytes in every pass that every process gets: entries of MLA layers.
        summed: Bytes once in a chunk that all processes add up: channels of a codec.
    """

    by_head: int
    whole: int = 0
    summed: int = 0


def exchanged_bytes(
    exchange: Exchange, frames: int, tokens_per_frame: int, heads: int, processes: int, passes: int
) -> int:
    """Bytes that all processes together send in one layer for one chunk of one clip.

    A sum is counted as a ring's: each process sends its tensor twice, but for one share of it.

    Args:
        exchange: Bytes of a token.
        frames: Frames of the chunk.
        tokens_per_frame: Tokens of a frame.
        heads: Heads, divided as evenly as they go.
        processes: Number of processes.
        passes: Passes of the model over the chunk.
    """
    tokens = frames * tokens_per_frame
    kept = sum(  # what each process would send to itself
        own_tokens * own_heads
        for own_tokens, own_heads in zip(
            even_shares(tokens_per_frame, processes), even_shares(heads, processes), strict=True
        )
    )
    moved = exchange.by_head * frames * (tokens_per_frame * heads - kept) // heads
    others = (processes - 1) * tokens
    return passes * (moved + exchange.whole * others) + 2 * exchange.summed * others


def even_shares(total: int, parts: int) -> list[int]:
    """Numbers that differ by at most one and add up to `total`, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
