"""Run the Triton programs in triton's interpreter, and print their largest errors as JSON.

test_kernels starts this file with TRITON_INTERPRET=1, which triton reads when it is imported.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from vmla_convert.kernels import rotary, unpacking
from vmla_convert.maths.quantise import (
    code_bytes,
    dequantise,
    gaussian_tables,
    pack,
    places,
    quantise,
    unpack,
)
from vmla_convert.maths.rope3d import Rotary, rotary_table, rotate, token_positions

HEADS, D, CHANNELS = 3, 32, 40  # no multiple of a step
WIDTHS = (*(16,) * 3, *(w for w in range(8, -1, -1) for _ in range(9)))


def errors(dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of each kernel from plain operations in float64."""
    torch.manual_seed(0)
    # Some tokens more than a whole number of blocks, in tensors whose rows are not contiguous.
    tokens = rotary.DECODE_BLOCK + 7
    table = rotary_table(token_positions(torch.arange(tokens), 1, 1), D)
    x = torch.randn(2, tokens, HEADS + 2, D).to(dtype)[:, :, 1 : HEADS + 1]
    channels = torch.randn(2, tokens, CHANNELS).to(dtype)
    weight = (torch.randn(HEADS * D, CHANNELS + 8) / 6).to(dtype)[:, :CHANNELS]
    mean = torch.randn(HEADS * D).to(dtype)
    out = torch.zeros(2, tokens + 5, HEADS + 1, D, dtype=dtype)
    place = out[:, :tokens, :HEADS]
    rotary._decode_rotated(channels, weight, mean, table.table, place)
    decoded = torch.nn.functional.linear(*(part.double() for part in (channels, weight, mean)))
    fresh, before = rotary._rotated(x, table.table), x.clone()
    rotary._rotate_(x, table.table)
    found = {
        "decode_rotated": far(place, turned(decoded.unflatten(-1, (HEADS, D)), table)),
        "rotated": far(fresh, turned(before.double(), table)),
        "rotate_": far(x, turned(before.double(), table)),
    }
    untouched = out[:, tokens:].abs().max() + out[:, :, HEADS:].abs().max()
    return found | {"unpacked": unpacking_error(dtype), "outside": untouched.item()}


def unpacking_error(dtype: torch.dtype) -> float:
    """Largest difference of the unpacking kernel from its twin, which is none."""
    tables = gaussian_tables()
    codes = quantise(torch.randn(2, unpacking.BLOCK + 3, len(WIDTHS)), tables, WIDTHS)
    stored = pack(codes, WIDTHS)
    assert stored.shape[-1] == code_bytes(WIDTHS)
    made = unpacking._unpacked(stored, *places(WIDTHS, stored.device), tables, dtype)
    return far(made, dequantise(unpack(stored, WIDTHS), tables, WIDTHS, dtype).double())


def turned(x: Tensor, table: Rotary) -> Tensor:
    return rotate(x, Rotary(table.table.double()))


def far(x: Tensor, expected: Tensor) -> float:
    return (x.double() - expected).abs().max().item()


if __name__ == "__main__":
    json.dump(errors(getattr(torch, sys.argv[1])), sys.stdout)
