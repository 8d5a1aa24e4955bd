"""A layer's dictionary cache whose keys and values stand for a `TokenCache`.

The host assigns to slices of `cache["k"]` and `cache["v"]` and takes slices of them. Both sides
are one cache, because a codec encodes a token's key and value together: whatever the host does to
one side, it must do to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmla_convert.errors import ConfigError
from vmla_convert.interop.host import HOST_PAGE
from vmla_convert.interop.tokens import TokenCache

SIDES = ("k", "v")


class DictionaryCache:
    """Puts a `TokenCache` into a dictionary, and follows what the host does to it.

    Attributes:
        cache: Keys and values of one layer.
        entries: The host's dictionary.
    """

    def __init__(self, cache: TokenCache, entries: dict[str, Any]) -> None:
        self.cache, self.entries = cache, entries
        self._first, self._reading = 0, True
        self._new: dict[str, tuple[range, Tensor]] = {}
        self._read: tuple[str, range, Tensor] | None = None
        self._moved: tuple[str, range, range] | None = None
        for name in SIDES:
            entries[name] = CacheSide(self, name)

    def start(self, first: int, grid: tuple[int, int]) -> None:
        """Begin a pass over the chunk whose first token is `first`."""
        self.cache.start(grid)
        self._first, self._reading = first, False
        self._new.clear()

    def end(self) -> None:
        """End a pass: attention has run."""
        self._read = None
        self.cache.settle()

    def restore(self) -> None:
        """Give the host dense keys and values again."""
        if isinstance(self.entries["k"], CacheSide) and self.entries["k"].pair is self:
            self.entries.update(zip(SIDES, self.cache.dense(), strict=True))

    def assign(self, name: str, slots: range, value: Tensor | Slice) -> None:
        """Take what the host assigns to slots of one side."""
        self._read = None
        if isinstance(value, Slice):
            self._move(name, slots, value.slots)
            return
        self._new[name] = slots, value
        if len(self._new) == len(SIDES):
            (at, key), (also, new) = (self._new[side] for side in SIDES)
            self._new.clear()
            if at != also:
                raise ConfigError(
                    f"keys are written to slots {at.start} to {at.stop}, values to slots "
                    f"{also.start} to {also.stop}",
                    HOST_PAGE,
                )
            self.cache.write(at, key, new, self._first)
            self._reading = True

    def take(self, name: str, slots: range) -> Tensor | Slice:
        """Slots of one side: a tensor once the pass has written its chunk.

        Before that a host takes slots only in order to move them, which needs no decoding.
        """
        if not self._reading:
            return Slice(slots, lambda: self._decoded(name, slots))
        return self._decoded(name, slots)

    def _decoded(self, name: str, slots: range) -> Tensor:
        if self._read is not None and self._read[:2] == (name, slots):
            (*_, found), self._read = self._read, None
            return found
        key, value = self.cache.read(slots)
        found, kept = (key, value) if name == "k" else (value, key)
        self._read = "v" if name == "k" else "k", slots, kept
        return found

    def _move(self, name: str, target: range, source: range) -> None:
        if self._moved is None:
            self.cache.move(target, source)
            self._moved = name, target, source
        elif self._moved[0] != name and self._moved[1:] == (target, source):
            self._moved = None
        else:
            raise ConfigError("keys and values are moved to different slots", HOST_PAGE)


class CacheSide:
    """Stands for the keys or for the values of a cache, (B, N, H, D), in a host's dictionary."""

    def __init__(self, pair: DictionaryCache, name: str) -> None:
        slots = pair.cache.slots
        self.pair, self._name = pair, name
        self.shape = torch.Size((slots.batch, slots.count, slots.heads, slots.head_dim))
        self.dtype, self.device = slots.dtype, slots.device

    @torch.compiler.disable
    def __getitem__(self, index: Any) -> Tensor | Slice:
        """Slots `[:, start:stop]`."""
        return self.pair.take(self._name, self._slots(index))

    @torch.compiler.disable
    def __setitem__(self, index: Any, value: Tensor | Slice) -> None:
        """Write or move tokens to slots `[:, start:stop]`."""
        self.pair.assign(self._name, self._slots(index), value)

    def size(self, axis: int | None = None) -> torch.Size | int:
        """Shape, or one side of the shape."""
        return self.shape if axis is None else self.shape[axis]

    def zero_(self) -> CacheSide:
        """Do nothing: a host that clears its cache writes slots again before it reads them."""
        return self

    def _slots(self, index: Any) -> range:
        match index:
            case (slice(start=None, stop=None, step=None), slice(step=None) as part):
                found = range(*part.indices(self.shape[1]))
                return found or range(found.start, found.start)
        raise ConfigError(
            f"the cache is used as [{index}], and only slices [:, start:stop] are known", HOST_PAGE
        )


class Slice:
    """Slots of one side that the host took before it wrote its chunk; decoded only if used."""

    def __init__(self, slots: range, decoded: Callable[[], Tensor]) -> None:
        self.slots, self._decoded = slots, decoded

    def clone(self) -> Slice:
        """The slots themselves: moving them copies what is stored."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with decoded tensors."""
        return function(*map(_plain, args), **(kwargs or {}))

    def tensor(self) -> Tensor:
        """The slots, decoded."""
        return self._decoded()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.tensor() if isinstance(value, Slice) else value
