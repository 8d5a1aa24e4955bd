"""Tiles cover a frame, overlap as they should, and blend to what they were cut from."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import noise

from vmla_convert.maths.tiles import blend, cover


@pytest.mark.parametrize("size", [(4, 6), (8, 8), (9, 30), (60, 104)])
def test_tiles_cover_and_overlap(size: tuple[int, int]) -> None:
    tiles = cover(size, 8, 3)
    seen = torch.zeros(size)
    for tile in tiles:
        part = tile.cut(seen)
        assert part.shape == (min(8, size[0]), min(8, size[1]))
        part += 1
    assert seen.min() >= 1
    rows = sorted({tile.rows for tile in tiles})
    assert all(above[1] - below[0] >= 3 for above, below in pairwise(rows))
    assert len(rows) == (1 if size[0] <= 8 else -(-(size[0] - 3) // 5))


def test_a_small_frame_is_one_tile() -> None:
    frames = noise(2, 3, 4, 6)
    (tile,) = cover((4, 6), 8, 3)
    assert torch.equal(tile.cut(frames), frames)
    assert tile.scaled(8) == ((0, 32), (0, 48))


def test_what_was_cut_blends_to_the_whole() -> None:
    frames = noise(2, 3, 17, 30)
    tiles = cover((17, 30), 8, 3)
    assert len(tiles) > 6
    whole = blend([tile.cut(frames) for tile in tiles], tiles, (17, 30))
    torch.testing.assert_close(whole, frames)


def test_tiles_that_differ_meet_without_a_seam() -> None:
    tiles = cover((8, 13), 8, 3)
    parts = [torch.full((8, 8), float(index)) for index in range(len(tiles))]
    row = blend(parts, tiles, (8, 13))[0]
    assert len(tiles) == 2
    assert (row[:5] == 0).all() and (row[8:] == 1).all()
    assert (row[4:9].diff() > 0).all() and row.diff().max() < 0.5
