"""One cache policy for dense, compressed and MLA models: preallocated, window and sink.

A `KVCache` has one cache for every layer, and one `FrameWindow` that tells all of them which frame
is in which slot. A dense cache is written in place at every pass; a compressed one gives the open
chunk its own exact keys and values, and is written by the pass that is kept.

Letters: B batch, L and S tokens, E tokens attended to exactly, H heads, D head dim (H·D = d).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy, RuntimeConfig
from vmla_convert.layers.attention import AttendedTokens, AttentionMetadata, Entries, Past
from vmla_convert.layers.codec import DecodedPast, LayerCodec
from vmla_convert.layers.window import FrameWindow
from vmla_convert.maths.rates import Rate


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


class FramePositions(NamedTuple):
    """Time positions of what a chunk attends to.

    Attributes:
        entries: Positions of the frames of `AttendedTokens.entries`.
        past: Positions of the frames of `AttendedTokens.past`; None where there is no such part.
    """

    entries: list[int]
    past: list[int] | None = None


class LayerCache(Protocol):
    """What one layer keeps of the frames in the window."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, full or not."""
        ...

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of what `update` returns, in the same order."""
        ...

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:
        """Return what the open chunk attends to, and keep the chunk's entries if asked to."""
        ...


class DenseCache:
    """Keys, unrotated, and values of one layer, written in place at every pass."""

    def __init__(self, widths: Sequence[int], policy: CachePolicy, storage: Storage) -> None:
        slots = policy.window_frames
        self._entries = [FrameBuffer(slots, width, storage, storage.dtype) for width in widths]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(entry.nbytes for entry in self._entries)

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of all that is held, in the order of the slots."""
        return FramePositions(window.frame_positions(list(range(window.held))))

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:  # noqa: ARG002
        """Write the open chunk; the next pass over the chunk overwrites it, if it is not kept."""
        for buffer, new in zip(self._entries, entries, strict=True):
            buffer.write(window.chunk_slots, new)
        return AttendedTokens(tuple(buffer.read(range(window.held)) for buffer in self._entries))


class LatentCache:
    """Latents, rope keys and norms of one MLA layer."""

    def __init__(self, widths: dict[str, int], policy: CachePolicy, storage: Storage) -> None:
        """Allocate all slots.

        Args:
            widths: Numbers that the layer keeps per token, by name: `latent`, `rope`, `norm`.
            policy: Window and sink.
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

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of the past, then of the open chunk."""
        return FramePositions(window.frame_positions([*window.past_slots, *window.chunk_slots]))

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:
        """Return the past's latents and then the chunk's own."""
        past = [buffer.read(window.past_slots) for buffer in self._entries]
        attended = AttendedTokens(
            tuple(torch.cat([old, new], 1) for old, new in zip(past, entries, strict=True))
        )
        if keep:
            for buffer, new in zip(self._entries, entries, strict=True):
                buffer.write(window.chunk_slots, new)
        return attended


class Store(Protocol):
    """A compressed form of keys and values, in slots of one frame each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, full or not."""
        ...

    def write(self, slots: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Compress a chunk's keys and values, both (B, L, d), into slots."""
        ...

    def past(self, slots: Sequence[int]) -> Past:
        """The tokens of some slots, to be rebuilt when they are attended to."""
        ...


class CodecStore:
    """Channels of a cache codec, quantised or not."""

    def __init__(self, codec: LayerCodec, rate: Rate, slots: int, storage: Storage) -> None:
        self._codec, self._rate = codec, rate
        width = rate.token_bytes(1) if rate.quantised else len(rate.widths)
        dtype = torch.uint8 if rate.quantised else storage.dtype
        self._slots = FrameBuffer(slots, width, storage, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._slots.nbytes

    def write(self, slots: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Encode a chunk."""
        channels = self._codec.channels(key, value, self._rate)
        self._slots.write(slots, self._codec.store(channels, self._rate))

    def past(self, slots: Sequence[int]) -> DecodedPast:
        """Channels that attention decodes head by head."""
        return DecodedPast(self._codec, self._codec.fetch(self._slots.read(slots), self._rate))


class CompressedCache:
    """A compressed past beside the exact keys and values of the open chunk.

    The newest past frames may be kept exactly as well, where the policy asks for it.
    """

    def __init__(self, store: Store, width: int, policy: CachePolicy, storage: Storage) -> None:
        """Allocate what the store does not hold.

        Args:
            store: Holds the past.
            width: d, of keys and of values.
            policy: Window, and how many frames stay dense as well.
            storage: Where and how.
        """
        self._store, recent = store, policy.dense_recent_frames
        self._recent = [
            FrameBuffer(recent, width, storage, storage.dtype) for _ in range(2 if recent else 0)
        ]
        self._kept = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, those of dense recent frames among them."""
        return self._store.nbytes + sum(entry.nbytes for entry in self._recent)

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of the exact frames, the chunk last, and of the compressed past."""
        return FramePositions(window.own_positions(), window.frame_positions(window.past_slots))

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:
        """Return the compressed past, and the exact keys and values of recent frames and chunk.

        Raises:
            ValueError: This chunk was kept already, over dense frames that it attends to.
        """
        if window.recent and self._kept == window.opened:
            raise ValueError("this chunk was kept already; open the next one")
        attended = AttendedTokens(
            self._own_entries(entries, window), self._store.past(window.past_slots)
        )
        if keep:
            self._store.write(window.chunk_slots, *entries)
            self._keep_recent(entries, window)
            self._kept = window.opened
        return attended

    def _own_entries(self, entries: Entries, window: FrameWindow) -> Entries:
        """Keys and values (B, E, d) of the recent frames and then the chunk's own."""
        if not window.recent:
            return entries
        slots = [frame % window.policy.dense_recent_frames for frame in window.recent]
        pairs = zip(self._recent, entries, strict=True)
        return tuple(torch.cat([buffer.read(slots), new], 1) for buffer, new in pairs)

    def _keep_recent(self, entries: Entries, window: FrameWindow) -> None:
        recent = window.policy.dense_recent_frames
        newest = window.chunk_frames[-recent:] if recent else []
        for buffer, new in zip(self._recent, entries, strict=bool(recent)):
            tokens = new.shape[1] // len(window.chunk_frames) * len(newest)
            buffer.write([frame % recent for frame in newest], new[:, -tokens:])


class KVCache:
    """The caches of all layers, and which frames they hold.

    Attributes:
        window: Which frame is in which slot.
        runtime: How layers read.
        metadata: Positions that the open chunk reads at, made once by the model; None before.
    """

    def __init__(
        self, policy: CachePolicy, layers: Sequence[LayerCache], runtime: RuntimeConfig
    ) -> None:
        self.window = FrameWindow(policy)
        self.runtime = runtime
        self.metadata: AttentionMetadata | None = None
        self._layers = layers

    @property
    def nbytes(self) -> int:
        """Bytes of all slots of all layers."""
        return sum(layer.nbytes for layer in self._layers)

    def open_chunk(self, frames: int) -> None:
        """Claim slots for the next frames; see `FrameWindow.open_chunk`."""
        self.window.open_chunk(frames)
        self.metadata = None

    def rewind(self, frames: int, keep_sink: bool = True) -> None:
        """Forget the window, to write its newest frames again; see `FrameWindow.rewind`."""
        self.window.rewind(frames, keep_sink)
        self.metadata = None

    def frame_positions(self) -> FramePositions:
        """Positions of what `update` returns, the same for all layers."""
        return self._layers[0].frame_positions(self.window)

    def update(self, layer: int, entries: Entries, keep: bool) -> AttendedTokens:
        """Return what the open chunk attends to in a layer; keep the chunk's entries if asked to.

        Args:
            layer: Its index.
            entries: From the layer's `project`.
            keep: Whether later chunks attend to this pass.
        """
        return self._layers[layer].update(entries, self.window, keep)


def _kept_dtype(name: str, storage: Storage) -> torch.dtype:
    """float16 for a norm in narrow models, as its error scales a whole key; else the model's."""
    narrow = storage.dtype.itemsize < 4
    return torch.float16 if name == "norm" and narrow else storage.dtype
