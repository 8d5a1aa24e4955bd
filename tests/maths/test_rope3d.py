"""3D rotary positions against complex numbers, in Wan's convention."""

from __future__ import annotations

import cmath

import pytest
import torch
from conftest import noise
from torch import Tensor

from vmla_convert.maths.rope3d import (
    axis_pairs,
    pair_frequencies,
    rotary_table,
    rotate,
    rotate_,
    token_positions,
)

HEAD_DIMS = pytest.mark.parametrize("head_dim", [6, 8, 16, 22, 64, 128])


def rotate_one_by_one(x: Tensor, positions: Tensor) -> Tensor:
    """Wan's rotation, one complex number at a time."""
    head_dim = x.shape[-1]
    width_pairs = height_pairs = head_dim // 6
    time_pairs = head_dim // 2 - height_pairs - width_pairs
    axes = [0] * time_pairs + [1] * height_pairs + [2] * width_pairs
    places = [*range(time_pairs), *range(height_pairs), *range(width_pairs)]
    sizes = (time_pairs, height_pairs, width_pairs)
    turned = torch.empty_like(x, dtype=torch.float64)
    for batch in range(x.shape[0]):
        for token in range(x.shape[1]):
            for head in range(x.shape[2]):
                for pair, (axis, place) in enumerate(zip(axes, places, strict=True)):
                    frequency = 10_000 ** (-place / sizes[axis])
                    real, imaginary = x[batch, token, head, 2 * pair : 2 * pair + 2].tolist()
                    angle = float(positions[token, axis]) * frequency
                    z = complex(real, imaginary) * cmath.exp(1j * angle)
                    turned[batch, token, head, 2 * pair] = z.real
                    turned[batch, token, head, 2 * pair + 1] = z.imag
    return turned


def test_rotation_is_wans_complex_multiplication() -> None:
    positions = token_positions(torch.tensor([0, 3, 700]), 2, 3)
    x = noise(2, len(positions), 3, 16)
    turned = rotate(x, rotary_table(positions, 16))
    torch.testing.assert_close(turned.double(), rotate_one_by_one(x, positions), atol=1e-6, rtol=0)


def test_wan_splits_128_channels_into_22_21_21_pairs() -> None:
    assert axis_pairs(128) == (22, 21, 21)


@HEAD_DIMS
def test_axes_share_all_pairs_of_a_head(head_dim: int) -> None:
    counts = axis_pairs(head_dim)
    axes, frequencies = pair_frequencies(head_dim)
    assert sum(counts) == head_dim // 2
    assert min(counts) > 0
    assert axes.bincount().tolist() == list(counts)
    assert torch.equal(axes, axes.sort().values)
    for axis in range(3):
        own = frequencies[axes == axis]
        assert own[0] == 1
        assert (own.diff() < 0).all()


def test_tokens_run_over_columns_then_rows_then_frames() -> None:
    positions = token_positions(torch.tensor([5, 2]), 2, 3).tolist()
    assert positions == [[t, y, x] for t in (5, 2) for y in range(2) for x in range(3)]


def test_inner_products_depend_on_relative_positions_only() -> None:
    q, k = noise(1, 6, 2, 16, seed=1), noise(1, 6, 2, 16, seed=2)
    positions = torch.randint(0, 20, (6, 3), generator=torch.Generator().manual_seed(0))

    def scores(shift: Tensor, key_shift: Tensor) -> Tensor:
        turned_q = rotate(q, rotary_table(positions + shift, 16))
        turned_k = rotate(k, rotary_table(positions.flip(0) + key_shift, 16))
        return torch.einsum("bthd,bshd->bhts", turned_q, turned_k)

    here = scores(torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0]))
    shift = torch.tensor([7, 3, 5])
    torch.testing.assert_close(scores(shift, shift), here, atol=1e-5, rtol=0)
    for axis in range(3):
        one = torch.eye(3, dtype=torch.long)[axis]
        assert (scores(one, 0 * one) - here).abs().max() > 0.1


def test_selected_pairs_turn_as_they_do_in_the_whole_head() -> None:
    table = rotary_table(token_positions(torch.arange(3), 2, 2), 16)
    x = noise(1, 12, 1, 16)
    pairs = torch.tensor([6, 0, 3, 0])
    channels = torch.stack([2 * pairs, 2 * pairs + 1], dim=-1).flatten()
    assert torch.equal(
        rotate(x[..., channels], table.select(pairs)), rotate(x, table)[..., channels]
    )


def test_turning_in_place_is_turning_and_never_under_gradients() -> None:
    table, x = rotary_table(token_positions(torch.arange(2), 2, 2), 16), noise(2, 8, 3, 16)
    turned, under_gradients, narrow = rotate(x, table), x.clone(), x.bfloat16()
    assert torch.equal(rotate_(under_gradients, table), turned)
    assert torch.equal(under_gradients, x)
    with torch.no_grad():
        assert torch.equal(rotate_(narrow, table), rotate(narrow, table))
        assert rotate_(x, table) is x
    assert torch.equal(x, turned)
