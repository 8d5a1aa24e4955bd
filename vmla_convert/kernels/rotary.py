"""Rotate keys, and decode keys that are rotated before they are written.

On a GPU with triton each is one kernel that touches every number once; elsewhere plain torch
operations compute the same. A 16-bit rotation in plain torch needs two float32 copies.

Shapes: B batch, S tokens, H heads, D head dim, R channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmla_convert.kernels import available
from vmla_convert.kernels.alignment import aligned
from vmla_convert.maths import rope3d
from vmla_convert.maths.rope3d import Rotary

ROTATE_BLOCK, DECODE_BLOCK, DECODE_STEP = 16, 128, 32
"""Tokens of a program of each kernel, and channels of a step of the decoding one."""
# Half as many warps for decoding spill registers on every GPU (`python -m evals.kernels`).
ROTATE_OPTIONS = {"num_warps": 4, **available.FUSED}
DECODE_OPTIONS = {"num_warps": 8, "num_stages": 3, **available.FUSED}


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """The interleaved pairs of x (B, S, H, D), rotated, in a new tensor."""
    return _rotated(x, rotary.table) if _takes(x) else rope3d.rotate(x, rotary)


def rotate_(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the interleaved pairs of x (B, S, H, D), in place unless gradients are on."""
    if torch.is_grad_enabled():
        return rope3d.rotate(x, rotary)
    if _takes(x):
        _rotate_(x, rotary.table)
        return x
    turned = rope3d.rotate_(x, rotary)
    return x if turned is x else x.copy_(turned)


def decode_rotated(
    channels: Tensor, weight: Tensor, mean: Tensor, rotary: Rotary, out: Tensor
) -> None:
    """Decode channels to keys and rotate them; gradients must be off.

    Args:
        channels: (B, S, R).
        weight: (H·D, R).
        mean: (H·D,).
        rotary: Rotations of the S tokens.
        out: Receives the keys (B, S, H, D); a view where heads follow each other.
    """
    channels, weight = aligned(channels), aligned(weight)
    if _takes(out) and out.dtype.itemsize == 2:
        _decode_rotated(channels, weight, mean, rotary.table, out)
        return
    decode(channels, weight, mean, out)
    rotate_(out, rotary)


def decode(channels: Tensor, weight: Tensor, mean: Tensor, out: Tensor) -> None:
    """Decode channels without rotation; arguments as in `decode_rotated`."""
    channels, weight = aligned(channels), aligned(weight)
    for one, target in zip(channels, out.flatten(-2), strict=True):
        torch.addmm(mean, one, weight.mT, out=target)


def _takes(x: Tensor) -> bool:
    """Whether the kernels take such keys."""
    width = x.shape[-1]
    fits = x.stride(-1) == 1 and width >= 16 and width & (width - 1) == 0
    return fits and available.runs_kernels(x) and x.dtype.itemsize <= 4 and not x.requires_grad


@torch.library.custom_op("vmla::rotated", mutates_args=())
def _rotated(x: Tensor, table: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rotation(x, table, out)
    return out


@_rotated.register_fake
def _(x: Tensor, _table: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("vmla::rotate_", mutates_args=("x",))
def _rotate_(x: Tensor, table: Tensor) -> None:
    _launch_rotation(x, table, x)


@torch.library.custom_op("vmla::decode_rotated", mutates_args=("out",))
def _decode_rotated(
    channels: Tensor, weight: Tensor, mean: Tensor, table: Tensor, out: Tensor
) -> None:
    from vmla_convert.kernels import programs

    batch, tokens, heads, width = out.shape
    sizes = (tokens, channels.shape[-1])
    strides = (*channels.stride()[:2], weight.stride(0), *out.stride()[:3])
    blocks = {"D": width, "BLOCK": DECODE_BLOCK, "STEP": DECODE_STEP}
    program: Any = programs.decode_rotated[(-(-tokens // DECODE_BLOCK), heads, batch)]
    with torch.cuda.device_of(out):
        program(channels, weight, mean, table, out, *sizes, *strides, **blocks, **DECODE_OPTIONS)


@_rotate_.register_fake
@_decode_rotated.register_fake
def _(*_written: Tensor) -> None:
    return None


def _launch_rotation(x: Tensor, table: Tensor, out: Tensor) -> None:
    from vmla_convert.kernels import programs

    batch, tokens, heads, width = x.shape
    strides = (*x.stride()[:3], *out.stride()[:3])
    program: Any = programs.rotate[(-(-tokens // ROTATE_BLOCK), heads, batch)]
    with torch.cuda.device_of(x):
        program(x, out, table, tokens, *strides, D=width, BLOCK=ROTATE_BLOCK, **ROTATE_OPTIONS)
