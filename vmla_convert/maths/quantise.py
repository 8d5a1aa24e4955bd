"""Scalar quantisation of channels with variance 1, and packing of codes of mixed widths.

A Lloyd–Max table holds the 2^b values that represent samples of one distribution with the least
mean squared error (Lloyd, 1982; Max, 1960). One set of tables for 1 to 8 bits serves all channels
of a layer, because every channel has variance 1. A width of 16 bits keeps a channel as float16; a
width of 0 bits does not store the channel.

Shapes: R channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_BITS = 8
WHOLE_BITS = 16
WIDTHS = (*range(MOST_BITS + 1), WHOLE_BITS)
"""Possible widths of a channel, in bits."""

TABLE_SIZE = 2 ** (MOST_BITS + 1) - 2
"""Number of values in the tables for 1 to 8 bits together."""

LLOYD_ROUNDS = 20  # of alternating the two conditions of optimality
DENSITY_CELLS = 512  # for the density of samples that the first guess needs
GAUSSIAN_SAMPLES = 2**16 - 1


def fit_tables(samples: Tensor) -> Tensor:
    """Lloyd–Max tables for 1 to 8 bits, one after the other, (TABLE_SIZE,) float32."""
    ordered = samples.flatten().double().sort().values
    return torch.cat([_lloyd_max(ordered, 2**bits) for bits in range(1, MOST_BITS + 1)]).float()


@cache
def gaussian_tables() -> Tensor:
    """Tables of a Gaussian, for channels without samples; shared, so not to be written to."""
    return fit_tables(gaussian_samples())


def gaussian_samples() -> Tensor:
    """Quantiles of a Gaussian at even steps."""
    even = torch.arange(1, GAUSSIAN_SAMPLES + 1, dtype=torch.float64) / (GAUSSIAN_SAMPLES + 1)
    return torch.special.ndtri(even)


def table(tables: Tensor, bits: int) -> Tensor:
    """The table of a width, ascending, (2^bits,)."""
    return tables[2**bits - 2 : 2 ** (bits + 1) - 2]


def distortions(tables: Tensor, samples: Tensor) -> Tensor:
    """Mean squared error of each of `WIDTHS` relative to storing nothing, falling from 1."""
    samples = samples.flatten().double()
    tables = tables.double()
    errors = [_values(_codes(samples, tables, width), tables, width) - samples for width in WIDTHS]
    return torch.stack([error.square().mean() for error in errors]) / samples.square().mean()


def quantise(channels: Tensor, tables: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes (..., R), int32 from 0 to 2^width − 1, of channels (..., R)."""
    parts = [_codes(part, tables, width) for part, width in _by_width(channels, widths)]
    return torch.cat(parts, -1)


def dequantise(codes: Tensor, tables: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Channels (..., R) from codes (..., R)."""
    parts = [_values(part, tables, width).to(dtype) for part, width in _by_width(codes, widths)]
    return torch.cat(parts, -1)


def code_bytes(widths: Sequence[int]) -> int:
    """Bytes of one token's codes."""
    return -(-sum(widths) // 8)


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Bytes (..., code_bytes) of codes (..., R), one after the other, lowest bit first.

    Channels of 16 bits must come first, so that each of them starts at a whole byte.
    """
    start, _ = places(widths, codes.device)
    byte, bit = start // 8, start % 8
    words = codes << bit
    count = code_bytes(widths)
    # A channel touches at most two bytes and channels share no bit, so sums are unions. A channel
    # of no bits may start after the last byte.
    joined = words.new_zeros(*words.shape[:-1], count + 2)
    joined.index_add_(-1, byte, words & 255).index_add_(-1, byte + 1, words >> 8)
    return joined[..., :count].to(torch.uint8)


def unpack(packed: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes (..., R) int32 from bytes (..., code_bytes)."""
    start, width = places(widths, packed.device)
    byte = start // 8
    single = pad(packed, (0, 2)).int()
    words = single[..., byte] | single[..., byte + 1] << 8
    return words >> start % 8 & (1 << width) - 1


def places(widths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The bit at which each packed channel starts, and its width, both (R,) int32."""
    # Made on the device: a table of the host would be copied there for each layer of each pass.
    sizes = [torch.full((n,), w, dtype=torch.int32, device=device) for w, n in _runs(widths)]
    width = torch.cat(sizes)
    return width.cumsum(0, dtype=torch.int32) - width, width


def _lloyd_max(ordered: Tensor, levels: int) -> Tensor:
    """The values (levels,) that represent sorted samples (n,) with the least squared error."""
    sums = pad(ordered.cumsum(0), (1, 0))
    values = _companded(ordered, levels)
    for _ in range(LLOYD_ROUNDS):
        # Each sample goes to the nearest value, then each value becomes the mean of its samples.
        inner = torch.searchsorted(ordered, (values[1:] + values[:-1]) / 2)
        bounds = pad(pad(inner, (1, 0)), (0, 1), value=len(ordered))
        counts = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / counts.clamp_min(1)
        values = torch.where(counts > 0, means, values).sort().values
    return values


def _companded(ordered: Tensor, levels: int) -> Tensor:
    """Values with the cube root of the samples' density, the optimum for many levels."""
    cells = min(DENSITY_CELLS, len(ordered))
    places = torch.linspace(0, len(ordered) - 1, cells + 1, dtype=torch.float64).long()
    knots = ordered[places]
    # Cells hold equally many samples, so p ∝ 1/w for width w, and p^(1/3) w = w^(2/3).
    mass = pad(knots.diff().clamp_min(1e-12).pow(2 / 3).cumsum(0), (1, 0))
    wanted = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * mass[-1]
    cell = torch.searchsorted(mass, wanted).clamp(1, cells)
    share = (wanted - mass[cell - 1]) / (mass[cell] - mass[cell - 1])
    return torch.lerp(knots[cell - 1], knots[cell], share)


def _by_width(x: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Parts of x (..., R) in which all channels have one width, with the width."""
    runs = _runs(widths)
    parts = x.split([count for _, count in runs], -1)
    return [(part, width) for part, (width, _) in zip(parts, runs, strict=True)]


def _runs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of one width, with the number of channels of each."""
    return [(width, len(list(run))) for width, run in groupby(widths)]


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
