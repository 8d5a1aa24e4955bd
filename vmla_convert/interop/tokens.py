"""The cache of one layer as other programs address it: keys and values of tokens in slots.

A host is a program that runs the model and keeps keys and values itself. A host writes the keys
and values of a chunk into slots, moves slots when its window slides, and reads slots to attend to
them. Which tokens stay is the host's decision; this module only stores them. The chunk that was
written last is given back exactly; a `Store` keeps all other tokens, encoded or dense.

Shapes: B batch, S tokens, N slots, H heads, D head dim (H·D = d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import TILE_MIB, in_float32
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import Rotary, rotary_table, rotate, rotate_, token_positions

Run = tuple[int, int]
"""Consecutive tokens: the first one, counted from the start of the clip, and their number."""


@dataclass(frozen=True)
class Slots:
    """Shape, precision and place of a layer's cache, which holds keys and values (B, N, H, D)."""

    batch: int
    count: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense cache."""
        numbers = 2 * self.batch * self.count * self.heads * self.head_dim
        return numbers * self.dtype.itemsize

    @property
    def entry(self) -> tuple[int, int]:
        """Shape of a token's key, and of its value."""
        return self.heads, self.head_dim

    def zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Empty slots (B, N, *shape)."""
        return torch.zeros(self.batch, self.count, *shape, dtype=dtype, device=self.device)


class TokenRuns:
    """Which token is in which slot."""

    def __init__(self) -> None:
        self._runs: list[tuple[range, int]] = []

    def put(self, slots: range, first: int) -> None:
        """Put the tokens first, first + 1, … into slots."""
        kept = [
            (part, token + part.start - run.start)
            for run, token in self._runs
            for part in _outside(slots, run)
            if part
        ]
        self._runs = sorted([*kept, (slots, first)], key=lambda run: run[0].start)

    def move(self, target: range, source: range) -> None:
        """Copy the tokens of `source` to `target`."""
        for run, token in self._within(source):
            shift = target.start - source.start
            self.put(range(run.start + shift, run.stop + shift), token)

    def at(self, slots: range) -> tuple[Run, ...]:
        """The tokens in slots, in the order of the slots.

        Raises:
            ConfigError: A slot was never written.
        """
        found = self._within(slots)
        if sum(len(run) for run, _ in found) != len(slots):
            raise ConfigError(
                f"the program attends to slots {slots.start} to {slots.stop} of its cache, which "
                "it did not write since the codec was attached",
                "attach between two clips, or observe whole clips",
            )
        return tuple((token, len(run)) for run, token in found)

    def slots(self) -> list[range]:
        """Slots that hold a token."""
        return [run for run, _ in self._runs]

    def _within(self, slots: range) -> list[tuple[range, int]]:
        parts = ((_overlap(run, slots), run, token) for run, token in self._runs)
        return [(part, token + part.start - run.start) for part, run, token in parts if part]


class RotaryTables:
    """Rotations of runs of tokens in 3D RoPE, made once for all layers of a host.

    Attributes:
        grid: Rows and columns of tokens in a latent frame.
    """

    def __init__(self, head_dim: int, device: torch.device, kept: int = 2) -> None:
        """Keep the last few tables: of the chunk, and of the tokens before the chunk.

        More tables would take memory, 17 MB each for 21 frames of Wan 1.3B.
        """
        self.grid: tuple[int, int] = (1, 1)
        self._head_dim, self._device, self._kept = head_dim, device, kept
        self._recent: dict[tuple[tuple[int, int], tuple[Run, ...]], Rotary] = {}

    def of(self, runs: tuple[Run, ...]) -> Rotary:
        """Rotations of the tokens of some runs, (S, D/2, 2)."""
        key = (self.grid, runs)
        if key not in self._recent:
            for old in list(self._recent)[: 1 - self._kept]:
                del self._recent[old]
            tokens = torch.cat([torch.arange(first, first + count) for first, count in runs])
            rows, columns = self.grid
            places = token_positions(torch.zeros(1, dtype=torch.long), rows, columns)
            positions = places[tokens % (rows * columns)]
            positions[:, 0] = tokens // (rows * columns)
            self._recent[key] = rotary_table(positions, self._head_dim, self._device)
        return self._recent[key]


class Store(Protocol):
    """Keys and values of tokens in slots."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, full or not."""
        ...

    def write(self, slots: range, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:
        """Keep keys and values, both (B, S, H, D); `rotary` is the rotation of the keys."""
        ...

    def move(self, target: range, source: range) -> None:
        """Copy the tokens of `source` to `target`."""
        ...

    def read(self, slots: range, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:
        """Fill keys and values, both (B, S, H, D), rotated as they were written."""
        ...


class DenseStore:
    """Keys and values as the host writes them."""

    def __init__(self, slots: Slots) -> None:
        self.key, self.value = (slots.zeros(slots.dtype, *slots.entry) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.key.nbytes + self.value.nbytes

    def write(self, slots: range, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:  # noqa: ARG002
        """Keep keys and values."""
        self.key[:, slots.start : slots.stop] = key
        self.value[:, slots.start : slots.stop] = value

    def move(self, target: range, source: range) -> None:
        """Copy tokens."""
        for entries in (self.key, self.value):
            _move(entries, target, source)

    def read(self, slots: range, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:  # noqa: ARG002
        """Fill keys and values."""
        key.copy_(self.key[:, slots.start : slots.stop])
        value.copy_(self.value[:, slots.start : slots.stop])


class EncodedStore:
    """Channels of a cache codec, quantised or not.

    Keys are rotated back before they are encoded, and rotated again after they are decoded. A move
    copies stored bytes, so a token is encoded once, however often the host's window slides.
    """

    def __init__(
        self,
        codec: LayerCodec,
        rate: Rate,
        slots: Slots,
        sum_over_heads: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Make empty slots.

        Args:
            codec: Codec of the slots' heads, in the dtype and on the device of the slots.
            rate: Channels and bits that the codec stores of a token.
            slots: Slots of these heads.
            sum_over_heads: Adds up the channels (B, S, r) of processes that hold other heads.
        """
        self._codec, self._rate, self._sum_over_heads = codec, rate, sum_over_heads
        width = rate.token_bytes(1) if rate.quantised else len(rate.widths)
        self._stored = slots.zeros(torch.uint8 if rate.quantised else slots.dtype, width)
        self._heads = slice(0, slots.heads)
        # Tokens that are decoded at a time: both keys and values, in float32.
        token_bytes = 2 * 4 * slots.batch * slots.heads * slots.head_dim
        mib = TILE_MIB["cuda" if slots.device.type == "cuda" else "cpu"]
        self._tile = max(1, mib * 2**20 // token_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._stored.nbytes

    def write(self, slots: range, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:
        """Encode keys and values."""
        if rotary is not None:
            key = rotate(in_float32(key), rotary.inverse())
        channels = self._codec.channels(key.flatten(2), value.flatten(2), self._rate)
        if self._sum_over_heads is not None:
            channels = self._sum_over_heads(channels)
        self._stored[:, slots.start : slots.stop] = self._codec.store(channels, self._rate)

    def move(self, target: range, source: range) -> None:
        """Copy stored channels."""
        _move(self._stored, target, source)

    def grow(self, count: int) -> None:
        """Add empty slots, up to `count`."""
        self._stored = pad(self._stored, (0, 0, 0, count - self._stored.shape[1]))

    def read(self, slots: range, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:
        """Decode keys and values, some tokens at a time."""
        for part in _tiles(slots, self._tile):
            inside = _inside(part, slots)
            channels = self._codec.fetch(self._stored[:, part.start : part.stop], self._rate)
            decoded, value[:, inside] = self._codec.decode_heads(channels, self._heads)
            if rotary is not None:
                decoded = rotate_(decoded, Rotary(rotary.table[inside]))
            key[:, inside] = decoded


def placed_codec(codec: LayerCodec, rate: Rate, slots: Slots, first: int = 0) -> LayerCodec:
    """The stored channels of a codec, for the slots' heads, which begin with head `first`.

    The linear maps get the dtype of the slots; means and tables stay float32.
    """
    part = codec.part(slice(first, first + slots.heads), len(rate.widths)).requires_grad_(False)
    for linear in (part.encode, part.decode):
        linear.data = linear.data.to(slots.dtype)
    return part.to(slots.device)


class _Chunk(NamedTuple):
    slots: range
    key: Tensor
    value: Tensor


class TokenCache:
    """The cache of one layer of a host.

    Attributes:
        slots: Shape of the keys and values that the host sees.
        store: Where tokens are kept, other than those of the newest chunk.
    """

    def __init__(self, slots: Slots, store: Store, rotary: RotaryTables | None) -> None:
        """Make an empty cache; `rotary` is None for a host that caches unrotated keys."""
        self.slots, self.store = slots, store
        self._rotary, self._tokens = rotary, TokenRuns()
        self._chunk: _Chunk | None = None

    @property
    def nbytes(self) -> int:
        """Bytes between two passes."""
        chunk = 0 if self._chunk is None else self._chunk.key.nbytes + self._chunk.value.nbytes
        return self.store.nbytes + chunk

    def start(self, grid: tuple[int, int]) -> None:
        """Begin a pass over a chunk of latent frames with rows and columns of tokens."""
        if self._rotary is not None:
            self._rotary.grid = grid

    def write(self, slots: range, key: Tensor, value: Tensor, first: int) -> None:
        """Take the keys and values of a chunk, both (B, S, H, D).

        Args:
            slots: Slots of the chunk, which may hold an earlier pass over the same chunk.
            key: Keys, rotated or not as the host caches them.
            value: Values.
            first: Number of the chunk's first token, counted from the start of the clip.
        """
        self.settle()
        self._tokens.put(slots, first)
        self._chunk = _Chunk(slots, key, value)

    def move(self, target: range, source: range) -> None:
        """Copy the tokens of `source` to `target`, which may overlap."""
        self.settle()
        self._tokens.move(target, source)
        self.store.move(target, source)

    def read(self, slots: range) -> tuple[Tensor, Tensor]:
        """Keys and values, both (B, S, H, D); those of the newest chunk are exactly as written."""
        return self.read_parts((slots,))

    def read_parts(self, parts: Sequence[range]) -> tuple[Tensor, Tensor]:
        """Keys and values of several ranges of slots, one after the other, as `read`."""
        chunk = self._chunk
        if chunk is not None and len(parts) == 1 and _overlap(chunk.slots, parts[0]) == parts[0]:
            inside = _inside(parts[0], chunk.slots)
            return chunk.key[:, inside], chunk.value[:, inside]
        shape = (self.slots.batch, sum(map(len, parts)), *self.slots.entry)
        key = torch.empty(shape, dtype=self.slots.dtype, device=self.slots.device)
        value, done = torch.empty_like(key), 0
        for part in parts:
            place = slice(done, done + len(part))
            self._fill(part, key[:, place], value[:, place])
            done += len(part)
        return key, value

    def _fill(self, slots: range, key: Tensor, value: Tensor) -> None:
        """Copy the newest chunk's part of some slots, and decode the others."""
        chunk = self._chunk
        at = chunk.slots if chunk is not None else range(slots.stop, slots.stop)
        own = _overlap(at, slots)
        if chunk is not None and own:
            key[:, _inside(own, slots)] = chunk.key[:, _inside(own, at)]
            value[:, _inside(own, slots)] = chunk.value[:, _inside(own, at)]
        for part in filter(None, _outside(at, slots)):
            inside = _inside(part, slots)
            self.store.read(part, key[:, inside], value[:, inside], self._rotary_of(part))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, both (B, N, H, D); slots without a token are zeros."""
        key, value = (self.slots.zeros(self.slots.dtype, *self.slots.entry) for _ in range(2))
        for part in self._tokens.slots():
            for entries, found in zip((key, value), self.read(part), strict=True):
                entries[:, part.start : part.stop] = found
        return key, value

    def settle(self) -> None:
        """Keep the newest chunk in the store; after a pass this frees the chunk's own tensors."""
        if self._chunk is not None:
            chunk, self._chunk = self._chunk, None
            with torch.no_grad():
                self.store.write(*chunk, self._rotary_of(chunk.slots))

    def _rotary_of(self, slots: range) -> Rotary | None:
        return None if self._rotary is None else self._rotary.of(self._tokens.at(slots))


def _overlap(one: range, other: range) -> range:
    """Numbers that are in both of two ranges."""
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _outside(part: range, whole: range) -> tuple[range, range]:
    """Numbers of `whole` before and after `part`."""
    before = range(whole.start, min(whole.stop, part.start))
    return before, range(max(whole.start, part.stop), whole.stop)


def _inside(part: range, whole: range) -> slice:
    """Where a part lies in a whole."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _tiles(slots: range, size: int) -> Iterator[range]:
    for start in range(slots.start, slots.stop, size):
        yield range(start, min(start + size, slots.stop))


def _move(entries: Tensor, target: range, source: range) -> None:
    moved = entries[:, source.start : source.stop].clone()  # the two may overlap
    entries[:, target.start : target.stop] = moved
