"""The dense cache quantised in place: a baseline for the codec.

As in KIVI (arXiv 2402.02750), keys are quantised per channel over the tokens of a chunk, because
the spread of keys differs by channel, and values per token and head. Each group has a least value
and a step, both float16.

Shapes: B batch, S tokens, H heads, D head dim (H·D = d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.kernels.rotary import rotate_
from vmla_convert.layers.attention import Entries, split_heads
from vmla_convert.layers.cache import FrameBuffer, Storage, read_all, write_all
from vmla_convert.maths.quantise import code_bytes, pack, unpack
from vmla_convert.maths.rope3d import Rotary

LEAST_STEP = 2.0**-24  # the smallest float16 above 0 replaces a step of 0


class Grid(NamedTuple):
    """Even steps from a least value, both float16 and of one shape."""

    least: Tensor
    step: Tensor


class QuantisedStore:
    """Keys and values in a few bits per number."""

    def __init__(self, num_heads: int, width: int, bits: int, slots: int, storage: Storage) -> None:
        """Allocate all slots; the grids of keys are made chunk by chunk.

        Args:
            num_heads: H.
            width: Width d of keys and of values.
            bits: Bits of each number, 1 to 8.
            slots: Frames of the window.
            storage: Size and place.
        """
        self._num_heads, self._dtype = num_heads, storage.dtype
        self._device, self._parallel = storage.device, storage.parallel
        self._widths, size = (bits,) * width, code_bytes((bits,) * width)
        self._codes = [FrameBuffer(slots, size, storage, torch.uint8) for _ in range(2)]
        self._value_grid = [
            FrameBuffer(slots, num_heads, storage, torch.float16) for _ in Grid._fields
        ]
        self._key_grids: dict[int, Grid] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots and of the key grids in use."""
        grids = {id(grid): sum(part.nbytes for part in grid) for grid in self._key_grids.values()}
        buffers = (*self._codes, *self._value_grid)
        return sum(buffer.nbytes for buffer in buffers) + sum(grids.values())

    def write(self, slots: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Quantise a chunk."""
        key_grid = fit_grid(key, 1, self._widths[0])
        by_head = split_heads(value, self._num_heads)
        value_grid = fit_grid(by_head, -1, self._widths[0])
        codes = (
            to_codes(key, key_grid, self._widths[0]),
            to_codes(by_head, value_grid, self._widths[0]),
        )
        for buffer, part in zip(self._codes, (codes[0], codes[1].flatten(2)), strict=True):
            buffer.write(slots, pack(part, self._widths))
        for buffer, part in zip(self._value_grid, value_grid, strict=True):
            buffer.write(slots, part[..., 0])
        # The frames of a chunk share one grid.
        self._key_grids |= dict.fromkeys(slots, key_grid)

    def past(self, slots: Sequence[int]) -> RebuiltPast:
        """Dequantised keys and values."""
        key_codes, value_codes = (unpack(b.read(slots), self._widths) for b in self._codes)
        grids = [self._key_grids[slot] for slot in slots]
        if not grids:
            empty = key_codes.to(self._dtype)
            return RebuiltPast((empty, empty), self._num_heads)
        key_grid = Grid(*(torch.cat(parts, 1) for parts in zip(*grids, strict=True)))
        frames = key_codes.unflatten(1, (len(slots), -1))
        key = from_codes(frames, Grid(*(part[:, :, None] for part in key_grid))).flatten(1, 2)
        value_grid = Grid(*(b.read(slots)[..., None] for b in self._value_grid))
        value = from_codes(split_heads(value_codes, self._num_heads), value_grid).flatten(2)
        return RebuiltPast((key.to(self._dtype), value.to(self._dtype)), self._num_heads)

    def state(self, held: int) -> dict[str, Tensor]:
        """Codes of keys and values, and their grids, of the first slots."""
        grids = [self._key_grids[slot] for slot in range(held)]
        parts = zip(Grid._fields, zip(*grids, strict=True), strict=bool(grids))
        gather = self._parallel.gather_heads
        keys = {f"key_{name}": gather(torch.cat(part, 1)) for name, part in parts}
        return read_all([*self._codes, *self._value_grid], held, self._parallel) | keys

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        """Fill the first slots."""
        write_all([*self._codes, *self._value_grid], tensors, held, self._parallel)
        own, device = self._parallel.part_of_heads, self._device
        for slot in range(held):
            parts = (own(tensors[f"key_{name}"])[:, slot : slot + 1] for name in Grid._fields)
            self._key_grids[slot] = Grid(*(part.to(device) for part in parts))


class RebuiltPast(NamedTuple):
    """A past of dequantised keys and values, both (B, S, d)."""

    entries: Entries
    num_heads: int

    @property
    def tokens(self) -> int:
        """Number of tokens, S."""
        return self.entries[0].shape[1]

    def heads(self, heads: slice) -> Entries:
        """Unrotated keys and values of some heads, both (B, S, heads, D)."""
        return tuple(split_heads(part, self.num_heads)[:, :, heads] for part in self.entries)

    def write(self, heads: slice, rotary: Rotary, key: Tensor, value: Tensor) -> None:
        """Write rotated keys and values of some heads into tensors of that shape."""
        for whole, place in zip(self.heads(heads), (key, value), strict=True):
            place.copy_(whole)
        rotate_(key, rotary)


def fit_grid(x: Tensor, dim: int, bits: int) -> Grid:
    """The grid of 2^bits values that covers x along one dimension, which keeps size 1."""
    least, most = x.float().aminmax(dim=dim, keepdim=True)
    return Grid(least.half(), ((most - least) / (2**bits - 1)).half())


def to_codes(x: Tensor, grid: Grid, bits: int) -> Tensor:
    """Index of the nearest grid value for each number, int32."""
    step = grid.step.float().clamp_min(LEAST_STEP)
    steps = (x.float() - grid.least.float()) / step
    return steps.round().clamp(0, 2**bits - 1).int()


def from_codes(codes: Tensor, grid: Grid) -> Tensor:
    """Grid values of codes, float32."""
    return torch.addcmul(grid.least.float(), codes.float(), grid.step.float())
