"""Turn packed codes back into channels.

On a GPU with triton one kernel reads each byte and writes each channel once; elsewhere plain torch
operations compute the same, with about ten times the traffic.

Shapes: B batch, S tokens, R channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vmla_convert.kernels import available
from vmla_convert.maths.quantise import dequantise, places, unpack

BLOCK, STEP = 16, 64
"""Tokens and channels of a program."""
OPTIONS = {"num_warps": 4, **available.FUSED}


def unpacked(stored: Tensor, tables: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Channels (B, S, R) from bytes (B, S, code_bytes) that `quantise.pack` made of codes.

    Args:
        stored: Packed codes.
        tables: Values of the codes, as `quantise.fit_tables` gives them.
        widths: Bits of each channel.
        dtype: Numbers of the channels.
    """
    if available.runs_kernels(stored):
        starts, sizes = places(widths, stored.device)
        return _unpacked(stored, starts, sizes, tables, dtype)
    return dequantise(unpack(stored, widths), tables, widths, dtype)


@torch.library.custom_op("vmla::unpacked", mutates_args=())
def _unpacked(
    stored: Tensor, starts: Tensor, widths: Tensor, tables: Tensor, dtype: torch.dtype
) -> Tensor:
    from vmla_convert.kernels import programs

    stored = stored.contiguous()
    tokens, channels = stored.shape[:-1].numel(), len(starts)
    out = torch.empty(*stored.shape[:-1], channels, dtype=dtype, device=stored.device)
    blocks = {"BLOCK": BLOCK, "STEP": STEP}
    program: Any = programs.unpacked[(-(-tokens // BLOCK), -(-channels // STEP))]
    with torch.cuda.device_of(out):
        sizes = (tokens, channels, stored.shape[-1])
        program(stored, starts, widths, tables, out, *sizes, **blocks, **OPTIONS)
    return out


@_unpacked.register_fake
def _(
    stored: Tensor, starts: Tensor, _widths: Tensor, _tables: Tensor, dtype: torch.dtype
) -> Tensor:
    shape = (*stored.shape[:-1], len(starts))
    return torch.empty(shape, dtype=dtype, device=stored.device)
