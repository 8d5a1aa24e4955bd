"""Widths and addresses that the fast kernels of a GPU take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MULTIPLE = {"cuda": 8}
"""Numbers, by device, that widths and row starts must be multiples of: 16 bytes of 16-bit numbers.

Fused attention refuses other widths, and matrix products take slower kernels.
"""


def aligned(x: Tensor, width: int | None = None) -> Tensor:
    """The tensor (…, W), padded with zeros to a width, or to the next one that the device takes.

    A tensor that starts or steps between two multiples is copied.
    """
    multiple = MULTIPLE.get(x.device.type, 1)
    wide = -(-(width or x.shape[-1]) // multiple) * multiple
    if wide != x.shape[-1]:
        return pad(x, (0, wide - x.shape[-1]))
    if multiple == 1 or torch.compiler.is_compiling():  # compiled code aligns what it calls
        return x
    steps = (x.storage_offset(), *x.stride()[:-1])
    return x.clone() if any(step % multiple for step in steps) else x
