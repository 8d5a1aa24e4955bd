"""The cache codec of one layer as a module: keys and values to channels, and back head by head.

A codec stands beside a dense self-attention and does not change it. A chunk attends to its own
dense keys and values, and to past ones decoded from channels (Method: the cache codec).

Shapes: B batch, S tokens, H heads, D head dim (H·D = d), R channels, r stored channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmla_convert.kernels import rotary as kernels
from vmla_convert.kernels.unpacking import unpacked
from vmla_convert.layers.attention import Entries, in_float32
from vmla_convert.maths.quantise import (
    TABLE_SIZE,
    WHOLE_BITS,
    WIDTHS,
    dequantise,
    pack,
    quantise,
)
from vmla_convert.maths.rates import Purchases, Rate, purchases
from vmla_convert.maths.rope3d import Rotary


class LayerCodec(nn.Module):
    """Linear maps between [k; v] of one layer and R channels of mean 0 and variance 1.

    `encode` (R, 2d) and `decode` (2d, R) are trained in recovery, the short fine-tune. `mean`
    (2d,), `energies` (R,), `tables` and `distortions` come from calibration and stay float32.

    Attributes:
        rate: Channels that a masked pass stores, and their bits; a cache may have another rate.
    """

    mean: Tensor
    energies: Tensor
    tables: Tensor
    distortions: Tensor

    def __init__(self, dim: int, num_heads: int, rank: int) -> None:
        super().__init__()
        self.dim, self.head_dim = dim, dim // num_heads
        self.encode = nn.Parameter(torch.zeros(rank, 2 * dim))
        self.decode = nn.Parameter(torch.zeros(2 * dim, rank))
        for name, size in (("mean", 2 * dim), ("energies", rank), ("tables", TABLE_SIZE)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32))
        self.register_buffer("distortions", torch.zeros(len(WIDTHS), dtype=torch.float32))
        self.rate = Rate((WHOLE_BITS,) * rank, quantised=False)

    def part(self, heads: slice, channels: int) -> LayerCodec:
        """The first channels of a codec, for a process that holds only some of the heads.

        The channels of a token are the sum of the channels that the parts of all heads give.
        """
        rows = torch.arange(2 * self.dim, device=self.mean.device).view(2, -1, self.head_dim)
        rows = rows[:, heads].flatten()
        part = LayerCodec(len(rows) // 2, len(rows) // 2 // self.head_dim, channels)
        state = self.state_dict() | {
            "encode": self.encode[:channels, rows],
            "decode": self.decode[rows, :channels],
            "mean": self.mean[rows],
            "energies": self.energies[:channels],
        }
        part.load_state_dict(state)
        return part.to(self.mean.device)

    def purchases(self) -> Purchases:
        """The channels and bits that could be added, with their gains, for `rates.allocate`."""
        return purchases(self.energies.cpu(), self.distortions.cpu())

    def channels(self, key: Tensor, value: Tensor, rate: Rate) -> Tensor:
        """The stored channels (B, S, r) of normed, unrotated keys and values, both (B, S, d).

        Channels are float32 at least: rounding them to bfloat16 first would add to their error.
        """
        entries = in_float32(torch.cat([key, value], -1)) - self.mean
        return F.linear(entries, in_float32(self.encode[: len(rate.widths)]))

    def store(self, channels: Tensor, rate: Rate) -> Tensor:
        """Channels (B, S, r) as a cache keeps them: (B, S, bytes) uint8, or unchanged."""
        if not rate.quantised:
            return channels
        return pack(quantise(channels, self.tables, rate.widths), rate.widths)

    def fetch(self, stored: Tensor, rate: Rate) -> Tensor:
        """Channels (B, S, r) from what `store` returned."""
        if not rate.quantised:
            return stored
        return unpacked(stored, self.tables, rate.widths, self.decode.dtype)

    def past(self, key: Tensor, value: Tensor) -> ChannelPast:
        """The tokens as a past stored at `rate`; gradients pass straight through the rounding."""
        channels = self.channels(key, value, self.rate)
        if self.rate.quantised:
            with torch.no_grad():
                codes = quantise(channels, self.tables, self.rate.widths)
                rounded = dequantise(codes, self.tables, self.rate.widths, channels.dtype)
            channels = channels + (rounded - channels).detach()
        return ChannelPast(self, channels.to(self.decode.dtype))

    def decode_heads(self, channels: Tensor, heads: slice) -> Entries:
        """Unrotated keys and values (B, S, heads, D) of some heads from channels (B, S, r)."""
        start, stop = heads.start * self.head_dim, heads.stop * self.head_dim
        used = channels.shape[-1]

        def part(rows: slice) -> Tensor:
            mean = self.mean[rows].to(self.decode.dtype)
            decoded = F.linear(channels, self.decode[rows, :used], mean)
            return decoded.unflatten(-1, (-1, self.head_dim))

        return part(slice(start, stop)), part(slice(self.dim + start, self.dim + stop))

    def write_heads(
        self, channels: Tensor, heads: slice, rotary: Rotary, key: Tensor, value: Tensor
    ) -> None:
        """Write rotated keys and values of some heads, both (B, S, heads, D), without gradients."""
        keys = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        values = slice(self.dim + keys.start, self.dim + keys.stop)
        # The dtype of the cache under autocast, which does not reach operations with an `out`.
        weight = self.decode[:, : channels.shape[-1]].to(key.dtype)
        mean, channels = self.mean.to(key.dtype), channels.to(key.dtype)
        kernels.decode_rotated(channels, weight[keys], mean[keys], rotary, key)
        kernels.decode(channels, weight[values], mean[values], value)


class ChannelPast(NamedTuple):
    """Past tokens as channels (B, S, r), which attention decodes some heads at a time."""

    codec: LayerCodec
    channels: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens, S."""
        return self.channels.shape[1]

    def heads(self, heads: slice) -> Entries:
        """Unrotated keys and values of some heads, both (B, S, heads, D)."""
        return self.codec.decode_heads(self.channels, heads)

    def write(self, heads: slice, rotary: Rotary, key: Tensor, value: Tensor) -> None:
        """Write rotated keys and values of some heads into tensors of that shape."""
        self.codec.write_heads(self.channels, heads, rotary, key, value)
