"""The rotary table of any positions, each angle by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.maths.rope3d import Rotary, pair_frequencies


def rotary_table(positions: Tensor, head_dim: int) -> Rotary:
    """Rotation of every pair at every position.

    Args:
        positions: (L, 3), time, height, width.
        head_dim: D.
    """
    axes, frequencies = pair_frequencies(head_dim)
    along_axis = positions.double()[:, axes.to(positions.device)]
    angles = along_axis * frequencies.to(positions.device)
    return Rotary(torch.stack([angles.cos(), angles.sin()], -1).float())
