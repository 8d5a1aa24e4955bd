"""3D rotary positions in Wan's convention: interleaved pairs, split over time, height and width.

Channel pairs (2f, 2f + 1) of a head are complex numbers z_f, rotated by exp(i·w_f·p), with p the
token's position along the axis that pair f belongs to (Wan 2.1, `rope_params`; theta 10⁴). Tables
are built in float64 and used in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0


class Rotary(NamedTuple):
    """Cosines and sines of every pair at every token, both (L, pairs)."""

    cos: Tensor
    sin: Tensor

    def select(self, pairs: Tensor) -> Rotary:
        """The table of some pairs only, (L, len(pairs))."""
        return Rotary(self.cos[:, pairs], self.sin[:, pairs])

    def at(self, tokens: Tensor) -> Rotary:
        """The table of some tokens only, (len(tokens), pairs)."""
        return Rotary(self.cos[tokens], self.sin[tokens])

    def turns(self) -> Tensor:
        """exp(i·angle) of every pair at every token, (L, pairs) complex."""
        return torch.complex(self.cos, self.sin)


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of the D/2 pairs rotate with time, height and width (22, 21, 21 for D = 128)."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def pair_frequencies(head_dim: int) -> tuple[Tensor, Tensor]:
    """Axis (0 time, 1 height, 2 width) and angular frequency of each pair, both (D/2,)."""
    counts = axis_pairs(head_dim)
    axes = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    frequencies = [THETA ** (-torch.arange(n, dtype=torch.float64) / n) for n in counts]
    return axes, torch.cat(frequencies)


def token_positions(frames: Tensor, height: int, width: int) -> Tensor:
    """Positions (L, 3) of all tokens of the given frames, in token order (frame, row, column)."""
    rows = torch.arange(height, device=frames.device)
    columns = torch.arange(width, device=frames.device)
    grid = torch.meshgrid(frames, rows, columns, indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 3)


def rotary_table(positions: Tensor, head_dim: int) -> Rotary:
    """Rotation of every pair at every position.

    Args:
        positions: (L, 3), time, height, width.
        head_dim: D.
    """
    axes, frequencies = pair_frequencies(head_dim)
    along_axis = positions.double()[:, axes.to(positions.device)]
    angles = along_axis * frequencies.to(positions.device)
    return Rotary(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the interleaved pairs of x (B, L, H, 2·pairs) by a table (L, pairs)."""
    real, imaginary = x[..., 0::2], x[..., 1::2]
    cos, sin = rotary.cos[:, None].to(x.dtype), rotary.sin[:, None].to(x.dtype)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)
