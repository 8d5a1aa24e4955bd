"""3D rotary positions in Wan's convention: interleaved pairs, split over time, height and width.

Channel pairs (2f, 2f + 1) of a head are complex numbers z_f, rotated by exp(i·w_f·p), with p the
token's position along the axis of pair f (Wan 2.1, `rope_params`; theta 10⁴). Tables are computed
in float64 and used in float32.

Shapes: B batch, L tokens, H heads, D head dim, F frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0


class Rotary(NamedTuple):
    """Cosine and sine of every pair at every token, (L, pairs, 2) float32."""

    table: Tensor

    def select(self, pairs: Tensor) -> Rotary:
        """The table of some pairs; pairs may repeat."""
        return Rotary(self.table[..., pairs, :])

    def at(self, tokens: Tensor) -> Rotary:
        """The table of some tokens."""
        return Rotary(self.table.index_select(-3, tokens))

    def inverse(self) -> Rotary:
        """The rotations that undo these."""
        return Rotary(self.table * self.table.new_tensor([1.0, -1.0]))

    def rotations(self) -> Tensor:
        """exp(i·angle) of every pair at every token, (L, pairs) complex."""
        return torch.view_as_complex(self.table)


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Number of pairs that rotate with time, height and width (22, 21, 21 for D = 128)."""
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


def rotary_table(positions: Tensor, head_dim: int, device: torch.device | str = "cpu") -> Rotary:
    """Rotation of every pair at positions (L, 3) in time, height and width."""
    axes, frequencies = pair_frequencies(head_dim)
    # On the CPU: some devices have no float64.
    angles = positions.cpu().double()[:, axes] * frequencies
    return Rotary(torch.stack([angles.cos(), angles.sin()], -1).float().to(device))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the interleaved pairs of x (B, L, H, 2·pairs), in float32 at least."""
    table, pairs = rotary.table.unsqueeze(-3), x.unflatten(-1, (-1, 2))
    if x.dtype.itemsize < 4:
        pairs = pairs.float()
    if torch.compiler.is_compiling():
        # Inductor fuses real arithmetic only; in eager mode one complex product is faster.
        (real, imaginary), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x in place where possible: without gradients, in float32 or wider; else as `rotate`.

    A copy of a large tensor costs more than its rotation.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype.itemsize < 4:
        return rotate(x, rotary)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs *= torch.view_as_complex(rotary.table.unsqueeze(-3))
    return x
