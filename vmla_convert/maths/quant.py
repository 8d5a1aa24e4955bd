"""Latents in a few bits per number: transform coding with one scale per token.

Any invertible mix of the latent is free, it goes into the next matrix. In the Karhunen-Loève basis,
in the metric of the error, bits go to channels by reverse water-filling, b_i = b + ½ log2(σ_i² /
geometric mean) (Cover and Thomas, "Elements of Information Theory", 10.3), in whole bits by
greedy choice.

Channels of equal width are mixed once more: scaled to standard deviations σ^½ and rotated by
cosines. That spreads what σ still differ by, so that n of them err by (Σσ)²/n in place of Σσ², and
it makes long tails Gaussian. At 8 bits all channels are one such group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from vmla_convert.errors import ConfigError

MOST_BITS = 8
# Weight of a direction without error, of the heaviest one's: enough to divide by in float64.
RIDGE = 1e-8
# Share of a latent's mean square below which a channel's variance is rounding.
NO_VARIANCE = 1e-13
# The scales tried for a token, of the one at which nothing clips.
TIGHTER = (1.0, 0.85, 0.7, 0.55)
# Rounds up whatever is rounded to the nearest float16 after it.
ROUND_UP = 1 + 2**-10


class LatentCode(NamedTuple):
    """How the latents of one layer are written in few bits; R channels, the most varied first.

    Attributes:
        mean: (R,).
        analysis: From latents to channels, in units of a step, (R, R); 0 for those without bits.
        synthesis: From channels back to latents, a row each, (R, R); 0 for those without bits.
        widths: Bits of each channel, 0 to 8, falling, (R,) int64.
        costs: What an error of one step of a channel costs, of the most costly's, (R,).
        bits: Mean bits per number that the widths may take.
    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    widths: Tensor
    costs: Tensor
    bits: int


class Packed(NamedTuple):
    """Latents of some tokens, as kept.

    Attributes:
        codes: Channels one after the other, lowest bit first, (..., code_bytes) uint8.
        scale: Size of a token's steps, (..., 1) float16.
    """

    codes: Tensor
    scale: Tensor


def code_bytes(rank: int, bits: int) -> int:
    """Bytes of the codes of one token; its scale takes two more."""
    return -(-rank * bits // 8)


def fit_code(latents: Tensor, metric: Tensor, bits: int) -> LatentCode:
    """The code that errs least on latents such as these, in float64 on their device.

    Args:
        latents: c of at least one token, (N, R).
        metric: M, symmetric and positive semi-definite: an error δ in c costs δᵀ M δ, (R, R).
        bits: Mean bits per number, 1 to 8.

    Returns:
        The code, in float32.

    Raises:
        ConfigError: Another number of bits.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ConfigError(f"no latent is kept at {bits} bits per number", "take 8 or 4 bits")
    exact = latents.double()
    mean = exact.mean(0)
    root, unroot = _roots(metric.to(exact))
    weighed = (exact - mean) @ root
    noise = NO_VARIANCE * (exact @ root).square().sum(1).mean()
    energies, vectors = torch.linalg.eigh(weighed.mT @ weighed / len(weighed))
    energies, vectors = energies.flip(0), vectors.flip(1)
    energies = energies.where(energies > noise, 0)
    widths = allocate(energies, bits)

    # Eigenvectors come with any sign, and what is mixed below depends on it.
    down = vectors.mT @ root.mT
    down = down * down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
    up = down @ unroot @ unroot.mT
    mix = _mix(widths).to(down)
    quarter = energies.where(widths > 0, 0).sqrt().sqrt()
    deviation = (mix.square() @ quarter.square()).sqrt()
    # Deviations that a channel covers. Optimal for one Gaussian are 1.6 at 1 bit to 3.9 at 8, but a
    # token's scale settles their level, which the most deviant channel decides: only the slope is
    # left to choose. This erred least at 4 bits per number, R of 16 to 512, on Gaussian latents and
    # on those of longer tails, which mixing makes Gaussian (1.3 + b/3 and a constant 3 err more).
    step = (2.2 + widths / 6) * deviation * 2 / _levels(widths)
    analysis = _inverse(step)[:, None] * (mix @ (_inverse(quarter)[:, None] * down))
    synthesis = step[:, None] * (mix @ (quarter[:, None] * up))
    costs = (synthesis @ root).square().sum(1)
    costs = costs * _inverse(costs.amax())
    return LatentCode(
        mean.float(), analysis.float(), synthesis.float(), widths, costs.float(), bits
    )


def allocate(energies: Tensor, bits: int) -> Tensor:
    """Bits of each channel, the one that lowers the summed error most bought first.

    A bit quarters a channel's error, so gains fall and greedy choice is optimal. Channels without
    energy take none.

    Args:
        energies: Of each channel, (R,).
        bits: Mean bits per number, 1 to 8.

    Returns:
        Whole bits, 0 to 8, at most bits · R together, (R,).
    """
    left = 4.0 ** -torch.arange(MOST_BITS, device=energies.device)
    gains, order = torch.outer(energies, left).flatten().sort(descending=True, stable=True)
    bought = order[: bits * len(energies)][gains[: bits * len(energies)] > 0]
    return torch.bincount(bought // MOST_BITS, minlength=len(energies))


def pack(code: LatentCode, latents: Tensor) -> Packed:
    """Latents in few bits.

    Args:
        code: Fitted to latents such as these.
        latents: (..., R) of any float type.

    Returns:
        Codes and scales of every token. It errs, by `costs`, no more than at the least scale at
        which nothing clips, where each channel errs by half a step times the scale.
    """
    steps = (latents.float() - code.mean) @ code.analysis.mT
    levels = _levels(code.widths)
    fitting = (steps.abs() / (levels / 2)).amax(-1, keepdim=True)
    trials = (_quantise(code, steps, share * fitting) for share in TIGHTER)
    fields, scale, error = next(trials)
    for tighter in trials:  # a little clipping is often worth finer steps
        better = tighter[2] < error
        fields = tighter[0].where(better, fields)
        scale, error = tighter[1].where(better, scale), tighter[2].where(better, error)
    if code.bits == MOST_BITS:  # a byte per channel: those without bits are the last ones
        return Packed(fields.to(torch.uint8), scale)
    return Packed(_join(fields.int(), code.widths, code_bytes(len(code.mean), code.bits)), scale)


def unpack(code: LatentCode, packed: Packed, dtype: torch.dtype) -> Tensor:
    """The latents (..., R) that were packed, computed in float32, as `dtype`."""
    codes = packed.codes if code.bits == MOST_BITS else _split(packed.codes, code.widths)
    centre = (0.5 - _levels(code.widths) / 2) @ code.synthesis
    steps = linear(codes.float(), code.synthesis.mT, centre)
    return torch.addcmul(code.mean, steps, packed.scale.float()).to(dtype)


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """G and its inverse's transpose, of G Gᵀ ∝ M; both (R, R)."""
    values, vectors = torch.linalg.eigh(metric)
    scales = (values * _inverse(values.amax())).clamp_min(RIDGE).sqrt()
    return vectors * scales, vectors / scales


def _mix(widths: Tensor) -> Tensor:
    """Rotates channels of equal width among each other, (R, R), on the CPU."""
    counts = widths.unique_consecutive(return_counts=True)[1].tolist()
    return torch.block_diag(*(_cosines(count) for count in counts))


def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (size, size): no entry is large."""
    index = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * torch.outer(index, index + 0.5)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0)


def _levels(widths: Tensor) -> Tensor:
    """Numbers that each channel can take; with 0 bits the one that stands for 0."""
    return torch.exp2(widths.float())


def _quantise(code: LatentCode, steps: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., R) at a scale (..., 1), the scale as it can be kept, and the error (..., 1).

    No level is 0 (midrise), so that one bit tells the sign.
    """
    limits = torch.finfo(torch.float16)
    kept = (scale * ROUND_UP).clamp(limits.smallest_normal, limits.max).half()
    levels, size = _levels(code.widths), kept.float()
    inside = (steps / size).add_(levels / 2)
    fields = inside.floor().clamp_min_(0).clamp_max_(levels - 1)
    wrong = inside.sub_(fields).sub_(0.5).square_() @ code.costs[:, None]
    return fields, kept, wrong * size.square()


def _places(widths: Tensor) -> tuple[Tensor, Tensor]:
    """First byte of each channel, and the bit in it that it starts at."""
    start = widths.cumsum(0) - widths
    return start // 8, start % 8


def _join(fields: Tensor, widths: Tensor, count: int) -> Tensor:
    """Integers (..., R) of some widths as bytes (..., count)."""
    byte, bit = _places(widths)
    words = fields << bit.int()
    # Channels share no bit, so that sums are unions. Two more: what has no bits starts at the end.
    joined = words.new_zeros(*words.shape[:-1], count + 2)
    joined.index_add_(-1, byte, words & 255).index_add_(-1, byte + 1, words >> 8)
    return joined[..., :count].to(torch.uint8)


def _split(codes: Tensor, widths: Tensor) -> Tensor:
    """The integers (..., R) that bytes hold."""
    byte, bit = _places(widths)
    single = pad(codes, (0, 2)).int()
    words = single[..., :-1] | single[..., 1:] << 8  # no channel touches more than two bytes
    return words[..., byte] >> bit.int() & (1 << widths.int()) - 1
