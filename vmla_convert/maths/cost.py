"""How many operations it takes to read a latent cache, rebuilt or absorbed (METHOD 8)."""

from __future__ import annotations

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Sizes of one read.

    Attributes:
        queries: B·T.
        keys: S of one clip.
        batch: B.
        heads: H.
        key_width: Of a rebuilt key of one head: content and rope part.
        value_width: D.
        shared_key: Of the key that all heads share when absorbed.
        shared_value: R that values read.
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
    """Rebuild keys and values of all heads, then attend; values are as wide as keys."""
    rebuilt = shape.shared_key * shape.key_width + shape.shared_value * shape.value_width
    up = 2 * shape.batch * shape.keys * shape.heads * rebuilt
    width = max(shape.key_width, shape.value_width)
    return up + 4 * shape.queries * shape.keys * shape.heads * width


def absorbed_flops(shape: AttentionShape) -> int:
    """Take queries into the shared space, attend there, take what they gathered out again."""
    mixed = shape.shared_key * shape.key_width + shape.shared_value * shape.value_width
    width = max(shape.shared_key, shape.shared_value)
    return 2 * shape.queries * shape.heads * (mixed + 2 * shape.keys * width)
