"""Scalar quantisation of unit-variance channels, and codes of mixed widths packed into bytes.

A Lloyd–Max table holds the 2^b values that represent samples of one distribution with the least
mean squared error (Lloyd, 1982; Max, 1960). One set of tables, for 1 to 8 bits, serves all channels
of a layer, because every channel is scaled to variance 1. A width of 16 bits keeps a channel as
float16; a width of 0 bits does not store it.

Letters: R channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_BITS = 8
WHOLE_BITS = 16
WIDTHS = (*range(MOST_BITS + 1), WHOLE_BITS)
"""The widths that a channel may have, in bits."""

TABLE_SIZE = 2 ** (MOST_BITS + 1) - 2
"""Values in the tables for 1 to 8 bits together."""

# Alternating the two conditions of optimality this often leaves less than 1 % to gain on the
# shipped model's latents (10 and 40 rounds differ by 0.3 %).
LLOYD_ROUNDS = 20
# Cells in which the density of samples is estimated for the first guess.
DENSITY_CELLS = 512
GAUSSIAN_SAMPLES = 2**16 - 1


class Run(NamedTuple):
    """Neighbouring channels of one width.

    Attributes:
        width: Bits of each channel.
        channels: Which channels.
    """

    width: int
    channels: slice


def runs(widths: Sequence[int]) -> list[Run]:
    """The runs of equal widths, in order."""
    found, start = list[Run](), 0
    for width, group in groupby(widths):
        count = len(list(group))
        found.append(Run(width, slice(start, start + count)))
        start += count
    return found


def fit_tables(samples: Tensor) -> Tensor:
    """Lloyd–Max tables for 1 to 8 bits, one after the other, (TABLE_SIZE,) float32.

    Args:
        samples: Numbers of mean 0 and variance 1, any shape.
    """
    ordered = samples.flatten().double().sort().values
    return torch.cat([_lloyd_max(ordered, 2**bits) for bits in range(1, MOST_BITS + 1)]).float()


@cache
def gaussian_tables() -> Tensor:
    """The tables of a Gaussian, for channels that were never sampled; not to be written to."""
    return fit_tables(gaussian_samples())


def gaussian_samples() -> Tensor:
    """Quantiles of a Gaussian at even steps: samples without chance."""
    even = torch.arange(1, GAUSSIAN_SAMPLES + 1, dtype=torch.float64) / (GAUSSIAN_SAMPLES + 1)
    return torch.special.ndtri(even)


def table(tables: Tensor, bits: int) -> Tensor:
    """The table for so many bits, (2^bits,), ascending."""
    return tables[2**bits - 2 : 2 ** (bits + 1) - 2]


def distortions(tables: Tensor, samples: Tensor) -> Tensor:
    """Mean squared error of each of `WIDTHS`, relative to that of storing nothing.

    Args:
        tables: From `fit_tables`.
        samples: Numbers of variance 1, any shape.

    Returns:
        (len(WIDTHS),) float64, falling from 1.
    """
    samples = samples.flatten().double()
    errors = [
        (_approximate(samples, tables.double(), width) - samples).square().mean()
        for width in WIDTHS[1:]
    ]
    power = samples.square().mean()
    relative = torch.stack(errors) / power
    return torch.cat([relative.new_ones(1), relative])


def quantise(channels: Tensor, tables: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes (..., R) int32 of channels (..., R), each in 0 … 2^width − 1."""
    parts = [_codes(channels[..., run.channels], tables, run.width) for run in runs(widths)]
    return torch.cat(parts, -1)


def dequantise(codes: Tensor, tables: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Channels (..., R) that codes (..., R) stand for."""
    parts = [_values(codes[..., run.channels], tables, run.width) for run in runs(widths)]
    return torch.cat([part.to(dtype) for part in parts], -1)


def code_bytes(widths: Sequence[int]) -> int:
    """Bytes of one token's codes."""
    return -(-sum(widths) // 8)


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes (..., R) one after the other, lowest bit first: (..., code_bytes) uint8.

    Args:
        codes: From `quantise`.
        widths: Bits of each channel; those of 16 bits come first, so that all of them start at a
            whole byte.
    """
    byte, bit = _places(widths, codes.device)
    words = codes << bit
    count = code_bytes(widths)
    # No channel touches more than two bytes, and channels share no bit, so that sums are unions.
    # A channel of no bits may start after the last byte.
    joined = words.new_zeros(*words.shape[:-1], count + 2)
    joined.index_add_(-1, byte, words & 255).index_add_(-1, byte + 1, words >> 8)
    return joined[..., :count].to(torch.uint8)


def unpack(packed: Tensor, widths: Sequence[int]) -> Tensor:
    """The codes (..., R) int32 that `pack` wrote."""
    byte, bit = _places(widths, packed.device)
    single = pad(packed, (0, 2)).int()
    words = single[..., byte] | single[..., byte + 1] << 8
    masks = torch.tensor([(1 << width) - 1 for width in widths], device=packed.device)
    return (words >> bit & masks).int()


def _lloyd_max(ordered: Tensor, levels: int) -> Tensor:
    """Values that represent sorted samples (n,) with the least squared error, (levels,)."""
    sums = pad(ordered.cumsum(0), (1, 0))
    values = _companded(ordered, levels)
    for _ in range(LLOYD_ROUNDS):
        # Each sample belongs to the nearest value; each value becomes the mean of its samples.
        inner = torch.searchsorted(ordered, (values[1:] + values[:-1]) / 2)
        bounds = pad(pad(inner, (1, 0)), (0, 1), value=len(ordered))
        counts = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / counts.clamp_min(1)
        values = torch.where(counts > 0, means, values).sort().values
    return values


def _companded(ordered: Tensor, levels: int) -> Tensor:
    """Values whose density is the cube root of the samples': the optimum for many levels."""
    cells = min(DENSITY_CELLS, len(ordered))
    places = torch.linspace(0, len(ordered) - 1, cells + 1, dtype=torch.float64).long()
    knots = ordered[places]
    # A cell of width w holds equally many samples as any other, so p ∝ 1/w and p^(1/3) w = w^(2/3).
    mass = pad(knots.diff().clamp_min(1e-12).pow(2 / 3).cumsum(0), (1, 0))
    wanted = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * mass[-1]
    cell = torch.searchsorted(mass, wanted).clamp(1, cells)
    share = (wanted - mass[cell - 1]) / (mass[cell] - mass[cell - 1])
    return torch.lerp(knots[cell - 1], knots[cell], share)


def _approximate(samples: Tensor, tables: Tensor, width: int) -> Tensor:
    return _values(_codes(samples, tables, width), tables, width).to(samples.dtype)


def _codes(channels: Tensor, tables: Tensor, width: int) -> Tensor:
    if width == 0:
        return torch.zeros_like(channels, dtype=torch.int32)
    if width == WHOLE_BITS:
        return channels.half().view(torch.int16).int() & 0xFFFF
    values = table(tables, width).to(channels.dtype)
    edges = (values[1:] + values[:-1]) / 2
    return torch.bucketize(channels.contiguous(), edges, out_int32=True)


def _values(codes: Tensor, tables: Tensor, width: int) -> Tensor:
    if width == 0:
        return torch.zeros_like(codes, dtype=tables.dtype)
    if width == WHOLE_BITS:
        return codes.to(torch.int16).view(torch.float16)
    return table(tables, width)[codes]


def _places(widths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """First byte of each channel, and the bit in it that the channel starts at."""
    width = torch.tensor(widths)
    start = (width.cumsum(0) - width).to(device)
    return start // 8, (start % 8).int()
