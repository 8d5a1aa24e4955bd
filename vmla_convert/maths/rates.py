"""How many bits each channel of each layer gets: one global reverse water-filling.

A channel of energy e stored in b bits costs e·D(b) at the model's output, with D the distortion of
its layer's tables. D is convex, so buying, bit by bit, whatever lowers the summed cost most is
optimal for every budget (Cover and Thomas, "Elements of Information Theory", 10.3; Method: rate
allocation). Truncation is the same choice: a channel of 0 bits is not stored. Larger budgets only
add bits, so one codec file serves every size.

Shapes: R channels of a layer, n steps from one width to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.maths.quantise import WHOLE_BITS, WIDTHS, code_bytes

_STEPS = torch.tensor(WIDTHS).diff()


class Rate(NamedTuple):
    """The numbers that one layer stores of a token.

    Attributes:
        widths: Bits of each stored channel, never rising, from the first channel on.
        quantised: False when the channels keep the model's dtype.
    """

    widths: tuple[int, ...]
    quantised: bool = True

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token; an unquantised channel takes `itemsize` bytes."""
        return code_bytes(self.widths) if self.quantised else len(self.widths) * itemsize


class Purchases(NamedTuple):
    """All steps of width that one layer can buy, the most useful first.

    Attributes:
        gains: Cost saved for each bit of a step, falling, (n,).
        channels: Channel of each step, (n,).
        bits: Bits of each step, (n,).
    """

    gains: Tensor
    channels: Tensor
    bits: Tensor

    def before(self, least: float) -> int:
        """Bits of all steps with a gain above `least`."""
        return int(self.bits[: int((self.gains > least).sum())].sum())

    def widths(self, budget: int) -> tuple[int, ...]:
        """Bits of each stored channel when the layer may spend `budget` bits."""
        bought = self.bits.cumsum(0) <= budget
        # A step that does not fit ends the purchase, because later steps gain less.
        count = len(bought) if bool(bought.all()) else int(bought.int().argmin())
        total = torch.bincount(self.channels[:count], self.bits[:count].double())
        return tuple(width for width in total.int().tolist() if width)


def purchases(energies: Tensor, distortions: Tensor) -> Purchases:
    """The steps that a layer can buy, from its energies (R,) and its tables' `distortions`."""
    per_bit = -distortions.double().diff() / _STEPS
    # Tables of few samples could make a later bit gain more than an earlier one.
    per_bit = per_bit.cummin(0).values.clamp_min(0)
    gains = energies.double().clamp_min(0)[:, None] * per_bit
    order = gains.flatten().sort(descending=True, stable=True).indices
    channels, step = order // len(per_bit), order % len(per_bit)
    return Purchases(gains.flatten()[order], channels, _STEPS[step])


def allocate(layers: Sequence[Purchases], total_bytes: int) -> list[Rate]:
    """Divide bytes of a token among all channels of all layers.

    Layers store whole bytes and at least one; bits left over by rounding up are spent too.

    Args:
        layers: The steps of every layer.
        total_bytes: Bytes of one token in all layers together, at least one for each layer.
    """
    gains = torch.cat([layer.gains for layer in layers]).sort(descending=True).values

    def needed(count: int) -> list[int]:
        """Bytes of each layer when the `count` most useful steps are bought."""
        least = float(gains[count]) if count < len(gains) else -1.0
        return [max(1, -(-layer.before(least) // 8)) for layer in layers]

    few, many = 0, len(gains)
    while few < many:
        middle = (few + many + 1) // 2
        if sum(needed(middle)) <= total_bytes:
            few = middle
        else:
            many = middle - 1
    return [
        Rate(layer.widths(8 * nbytes)) for layer, nbytes in zip(layers, needed(few), strict=True)
    ]


def truncate(energies: Sequence[Tensor], total: int) -> list[Rate]:
    """Keep the most energetic channels unquantised: `total` of all layers, one or more in each.

    Args:
        energies: Energies of the channels of each layer, falling, each (R,).
        total: Channels of all layers together, at least one for each layer.
    """
    best = torch.cat([layer[1:] for layer in energies]).sort(descending=True).values
    more = total - len(energies)
    least = float(best[more]) if more < len(best) else -1.0
    counts = [1 + int((layer[1:] > least).sum()) for layer in energies]
    return [Rate((WHOLE_BITS,) * count, quantised=False) for count in counts]
