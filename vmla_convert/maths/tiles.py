"""Cover a frame by overlapping tiles, and blend the results of the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Rows and columns of a frame, each as first and one after the last."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    def cut(self, frames: Tensor) -> Tensor:
        """The tile of frames (..., height, width)."""
        return frames[..., slice(*self.rows), slice(*self.columns)]

    def scaled(self, factor: int) -> Tile:
        """The same tile of frames that are larger by a factor."""
        rows, columns = ((first * factor, end * factor) for first, end in self)
        return Tile(rows, columns)


def cover(size: Sequence[int], side: int, overlap: int) -> list[Tile]:
    """Tiles of at most `side` rows and columns, evenly spread over a frame (height, width).

    Neighbouring tiles share at least `overlap` < `side` rows or columns.
    """
    spans = [_spans(length, side, overlap) for length in size]
    return [Tile(rows, columns) for rows, columns in product(*spans)]


def blend(parts: Sequence[Tensor], tiles: Sequence[Tile], size: tuple[int, int]) -> Tensor:
    """Frames (..., *size) from parts (..., h, w), weighted by the distance from inner edges."""
    whole = parts[0].new_zeros(*parts[0].shape[:-2], *size)
    total = parts[0].new_zeros(size)
    for part, tile in zip(parts, tiles, strict=True):
        weight = _ramp(tile.rows, size[0])[:, None] * _ramp(tile.columns, size[1])
        weight = weight.to(part)
        tile.cut(whole).add_(part * weight)
        tile.cut(total).add_(weight)
    return whole / total


def _spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    if length <= side:
        return [(0, length)]
    count = -(-(length - overlap) // (side - overlap))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    return [(start, start + side) for start in starts]


def _ramp(span: tuple[int, int], length: int) -> Tensor:
    """Weights that rise from inner edges and are flat at the edges of the frame."""
    first, end = span
    place = torch.arange(end - first) + 0.5
    ramp = torch.ones(end - first)
    if first > 0:
        ramp = torch.minimum(ramp, place / (end - first))
    if end < length:
        ramp = torch.minimum(ramp, (end - first - place) / (end - first))
    return ramp
