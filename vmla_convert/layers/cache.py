"""One cache policy for dense and converted models: preallocated, window and sink, no shifting.

A `KVCache` has one `DenseCache` or `LatentCache` for every layer, and one `FrameWindow` that tells
them all which frame is in which slot. A dense cache is written in place at every pass and read as a
view; a latent one hands the open chunk its own latents as they are, and is written by the pass that
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy, RuntimeConfig
from vmla_convert.layers.attention import Projection, Reading, Sight
from vmla_convert.layers.window import FrameWindow


class Storage(NamedTuple):
    """Where and how entries are kept.

    Attributes:
        batch: B.
        tokens_per_frame: Tokens of one latent frame.
        dtype: Of entries.
        device: Where layers read them.
        offload: Keep them in host memory, pinned where the reader is a GPU.
    """

    batch: int
    tokens_per_frame: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    offload: bool = False


class FrameBuffer:
    """Slots of one frame each for one kind of entry."""

    def __init__(self, slots: int, width: int, storage: Storage, dtype: torch.dtype) -> None:
        self._reader = storage.device
        pinned = storage.offload and storage.device.type == "cuda"
        home = torch.device("cpu") if storage.offload else storage.device
        shape = (storage.batch, slots, storage.tokens_per_frame, width)
        self._slots = torch.zeros(shape, dtype=dtype, device=home, pin_memory=pinned)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, full or not."""
        return self._slots.nbytes

    def write(self, slots: Sequence[int], entry: Tensor) -> None:
        """Overwrite slots by the frames of an entry (B, L, width)."""
        frames = entry.unflatten(1, (len(slots), -1)).unbind(1)
        for slot, frame in zip(slots, frames, strict=True):
            self._slots[:, slot].copy_(frame)

    def read(self, slots: Sequence[int]) -> Tensor:
        """Entries (B, L, width) of slots, a view where these follow each other."""
        runs = _runs(slots) or [(0, -1)]
        held = (self._slots[:, first : last + 1].flatten(1, 2) for first, last in runs)
        parts = [part.to(self._reader, non_blocking=True) for part in held]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of slots that follow each other; indices would cost a transfer."""
    breaks = [i for i, (a, b) in enumerate(pairwise(slots), 1) if b != a + 1]
    bounds = [0, *breaks, len(slots)]
    return [(slots[start], slots[end - 1]) for start, end in pairwise(bounds) if end > start]


class DenseCache:
    """Keys, unrotated, and values of one layer."""

    def __init__(self, widths: dict[str, int], policy: CachePolicy, storage: Storage) -> None:
        slots = policy.window_frames
        self._entries = [
            FrameBuffer(slots, width, storage, storage.dtype) for width in widths.values()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(entry.nbytes for entry in self._entries)

    def update(self, projection: Projection, window: FrameWindow) -> Reading:
        """Write the open chunk, and return all that is held, in the order of the slots."""
        for entry, new in zip(self._entries, projection.cached, strict=True):
            entry.write(window.chunk_slots, new)
        return Reading(tuple(entry.read(range(window.held)) for entry in self._entries))


class LatentCache:
    """Latents of one layer."""

    def __init__(self, widths: dict[str, int], policy: CachePolicy, storage: Storage) -> None:
        """Allocate all slots.

        Args:
            widths: Of what the layer keeps, by name: `latent`, `rope`, `norm`.
            policy: Window.
            storage: Where and how.
        """
        slots = policy.window_frames
        self._entries = [
            FrameBuffer(slots, width, storage, _kept_dtype(name, storage))
            for name, width in widths.items()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(entry.nbytes for entry in self._entries)

    def update(self, projection: Projection, window: FrameWindow) -> Reading:
        """Return what the open chunk reads, its own latents last; keep these where asked to."""
        past = [entry.read(window.latent_slots) for entry in self._entries]
        pairs = zip(past, projection.cached, strict=True)
        reading = Reading(tuple(torch.cat([old, new], 1) for old, new in pairs))
        if projection.keep:
            for entry, new in zip(self._entries, projection.cached, strict=True):
                entry.write(window.chunk_slots, new)
        return reading


LayerCache = DenseCache | LatentCache


class KVCache:
    """The caches of all layers, and which frames they hold.

    Attributes:
        window: Which frame is in which slot.
        runtime: How layers read.
        sight: Positions that the open chunk reads at, made once by the model; None before.
    """

    def __init__(
        self, policy: CachePolicy, layers: list[LayerCache], runtime: RuntimeConfig | None = None
    ) -> None:
        self.window = FrameWindow(policy)
        self.runtime = runtime or RuntimeConfig()
        self.sight: Sight | None = None
        self._layers = layers

    @property
    def nbytes(self) -> int:
        """Bytes of all slots of all layers."""
        return sum(layer.nbytes for layer in self._layers)

    def open_chunk(self, frames: int) -> None:
        """Claim slots for the next frames; see `FrameWindow.open_chunk`."""
        self.window.open_chunk(frames)
        self.sight = None

    def rewind(self, frames: int, keep_sink: bool = True) -> None:
        """Forget the window, to write its newest frames again; see `FrameWindow.rewind`."""
        self.window.rewind(frames, keep_sink)
        self.sight = None

    def update(self, layer: int, projection: Projection) -> Reading:
        """Write the open chunk's entries of a layer and return what it reads."""
        return self._layers[layer].update(projection, self.window)


def _kept_dtype(name: str, storage: Storage) -> torch.dtype:
    """Of two bytes a norm gets those with the finer step: its error scales a whole key."""
    narrow = storage.dtype.itemsize < 4
    return torch.float16 if name == "norm" and narrow else storage.dtype
