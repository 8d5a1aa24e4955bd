"""Caches of dense, compressed and MLA models: preallocated, with a window and a sink.

A `KVCache` holds one cache per layer and one `FrameWindow`, which gives every frame a slot for all
layers. `EntryCache` keeps entries unchanged; every pass overwrites the entries of the open chunk.
`CompressedCache` keeps the past compressed; the open chunk attends to its own dense keys and
values, and the last pass over the chunk compresses them.

Shapes: B batch, L tokens, E tokens attended to without compression, d width of keys and of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy, RuntimeConfig
from vmla_convert.layers.attention import AttendedTokens, AttentionMetadata, Entries, Past
from vmla_convert.layers.codec import ChannelPast, LayerCodec
from vmla_convert.layers.parallel import ALONE, OneProcess
from vmla_convert.layers.window import FrameWindow
from vmla_convert.maths.masks import runs
from vmla_convert.maths.rates import Rate


class Storage(NamedTuple):
    """Size, precision and place of the cache of one layer.

    Attributes:
        batch: B.
        tokens_per_frame: Tokens of one latent frame.
        dtype: Dtype of entries.
        device: Device of the layers.
        offload: Keep entries in host memory, pinned where the layers are on a GPU.
        parallel: Processes that compute the stream together. Each keeps all latents, but only its
            own heads of keys and values.
    """

    batch: int
    tokens_per_frame: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    offload: bool = False
    parallel: OneProcess = ALONE


class FrameBuffer:
    """Slots of one frame each for one kind of entry."""

    def __init__(self, slots: int, width: int, storage: Storage, dtype: torch.dtype) -> None:
        self._device = storage.device
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
        """Entries (B, L, width) of slots, a view where the slots follow each other."""
        # Slices of runs: an index tensor would cost a transfer to the device.
        held = [self._slots[:, run] for run in runs(slots) or (slice(0, 0),)]
        parts = [part.flatten(1, 2).to(self._device, non_blocking=True) for part in held]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class FramePositions(NamedTuple):
    """Time positions of the frames that a chunk attends to.

    Attributes:
        entries: Positions of the frames of `AttendedTokens.entries`.
        past: Positions of the frames of `AttendedTokens.past`; None where there is no such part.
    """

    entries: list[int]
    past: list[int] | None = None


class LayerCache(Protocol):
    """The cache of one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, full or not."""
        ...

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of what `update` returns, in the same order."""
        ...

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:
        """Entries that the open chunk attends to; with `keep`, later chunks attend to its own."""
        ...

    def state(self, window: FrameWindow) -> dict[str, Tensor]:
        """The entries of all frames in the window, by name."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], window: FrameWindow) -> None:
        """Fill an empty cache with what `state` returned, in a window that is restored already."""
        ...


class EntryCache:
    """Entries of one layer as they are: dense keys and values, or latents, rope keys and norms."""

    def __init__(
        self,
        widths: Mapping[str, int],
        policy: CachePolicy,
        storage: Storage,
        by_head: OneProcess = ALONE,
    ) -> None:
        """Allocate all slots.

        Args:
            widths: Numbers kept per token, by name.
            policy: Window.
            storage: Size and place.
            by_head: Processes that hold different heads of these entries, if there are several.
        """
        self._by_head = by_head
        self._entries = [
            FrameBuffer(policy.window_frames, width, storage, _entry_dtype(name, storage.dtype))
            for name, width in widths.items()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(entry.nbytes for entry in self._entries)

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of all frames in the window, in the order of the slots."""
        return FramePositions(window.frame_positions(list(range(window.held))))

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:  # noqa: ARG002
        """Write the open chunk on every pass, whatever `keep` says: the last pass is what stays."""
        for buffer, new in zip(self._entries, entries, strict=True):
            buffer.write(window.chunk_slots, new)
        held = (buffer.read(range(window.held)) for buffer in self._entries)
        return AttendedTokens(tuple(held))

    def state(self, window: FrameWindow) -> dict[str, Tensor]:
        """Entries of all frames in the window, by number."""
        return read_all(self._entries, window.held, self._by_head)

    def restore(self, tensors: Mapping[str, Tensor], window: FrameWindow) -> None:
        """Fill the slots of the window."""
        write_all(self._entries, tensors, window.held, self._by_head)


class Store(Protocol):
    """Compressed keys and values, in slots of one frame each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, full or not."""
        ...

    def write(self, slots: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Compress a chunk's keys and values, both (B, L, d), into slots."""
        ...

    def past(self, slots: Sequence[int]) -> Past:
        """The tokens of some slots."""
        ...

    def state(self, held: int) -> dict[str, Tensor]:
        """The content of the first slots, by name."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        """Fill the first slots with what `state` returned."""
        ...


class CodecStore:
    """Channels of a cache codec, quantised or not."""

    def __init__(self, codec: LayerCodec, rate: Rate, slots: int, storage: Storage) -> None:
        self._codec, self._rate, self._parallel = codec, rate, storage.parallel
        if storage.parallel.size > 1:
            own = storage.parallel.own_heads(codec.dim // codec.head_dim)
            self._codec = codec.part(own, len(rate.widths)).to(codec.decode.dtype)
        width = rate.token_bytes(1) if rate.quantised else len(rate.widths)
        dtype = torch.uint8 if rate.quantised else storage.dtype
        self._slots = FrameBuffer(slots, width, storage, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._slots.nbytes

    def write(self, slots: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Encode a chunk. The channels of all heads are the sum of those of each process's."""
        channels = self._parallel.sum(self._codec.channels(key, value, self._rate))
        self._slots.write(slots, self._codec.store(channels, self._rate))

    def past(self, slots: Sequence[int]) -> ChannelPast:
        """Channels that attention decodes head by head."""
        return ChannelPast(self._codec, self._codec.fetch(self._slots.read(slots), self._rate))

    def state(self, held: int) -> dict[str, Tensor]:
        """Stored channels of the first slots."""
        return read_all([self._slots], held)

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        """Fill the first slots."""
        write_all([self._slots], tensors, held)


class CompressedCache:
    """A compressed past beside the dense keys and values of the open chunk.

    The newest past frames are kept dense as well, where the policy asks for it.
    """

    def __init__(self, store: Store, width: int, policy: CachePolicy, storage: Storage) -> None:
        self._store, self._parallel = store, storage.parallel
        recent = policy.dense_recent_frames
        self._recent = [
            FrameBuffer(recent, width, storage, storage.dtype) for _ in range(2 if recent else 0)
        ]
        self._kept = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, dense recent frames included."""
        return self._store.nbytes + sum(entry.nbytes for entry in self._recent)

    def frame_positions(self, window: FrameWindow) -> FramePositions:
        """Positions of the dense frames, the chunk last, and of the compressed past."""
        return FramePositions(window.own_positions(), window.frame_positions(window.past_slots))

    def update(self, entries: Entries, window: FrameWindow, keep: bool) -> AttendedTokens:
        """The compressed past, and the dense keys and values of recent frames and the chunk.

        Raises:
            ValueError: A pass with `keep` already ran for this chunk, and replaced recent dense
            frames
                that another pass would attend to.
        """
        if window.recent and self._kept == window.opened:
            raise ValueError("this chunk was kept already; open the next one")
        past = self._store.past(window.past_slots)
        attended = AttendedTokens(self._own_entries(entries, window), past)
        if keep:
            self._store.write(window.chunk_slots, *entries)
            self._keep_recent(entries, window)
            self._kept = window.opened
        return attended

    def state(self, window: FrameWindow) -> dict[str, Tensor]:
        """The compressed window, and recent frames that are dense."""
        recent = read_all(self._recent, window.policy.dense_recent_frames, self._parallel)
        return self._store.state(window.held) | {f"recent.{n}": t for n, t in recent.items()}

    def restore(self, tensors: Mapping[str, Tensor], window: FrameWindow) -> None:
        """Fill the slots of the window. The open chunk was kept when the state was saved."""
        self._store.restore(tensors, window.held)
        start = "recent."
        recent = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        write_all(self._recent, recent, window.policy.dense_recent_frames, self._parallel)
        self._kept = window.opened

    def _own_entries(self, entries: Entries, window: FrameWindow) -> Entries:
        """Keys and values (B, E, d) of the recent frames and then of the chunk."""
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
        runtime: How layers attend to the cache.
        metadata: Positions of the open chunk's attention, made by the model at the first pass.
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

    def state(self) -> dict[str, Tensor]:
        """The entries of all layers, by layer and name; the window has a state of its own."""
        return {
            f"cache.{number}.{name}": tensor
            for number, layer in enumerate(self._layers)
            for name, tensor in layer.state(self.window).items()
        }

    def restore(self, window: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Fill an empty cache with a window's state and what `state` returned.

        Raises:
            KeyError: An entry is missing.
            RuntimeError: An entry has another shape.
            ValueError: The window holds more frames than this cache.
        """
        self.window.restore(window)
        for number, layer in enumerate(self._layers):
            start = f"cache.{number}."
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            layer.restore(own, self.window)

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
        """Entries that the open chunk attends to in a layer, from its own entries of `project`."""
        return self._layers[layer].update(entries, self.window, keep)


def read_all(
    buffers: Sequence[FrameBuffer], held: int, by_head: OneProcess = ALONE
) -> dict[str, Tensor]:
    """The first slots of some buffers (B, L, width), by number.

    Args:
        buffers: Buffers.
        held: Number of slots.
        by_head: Processes that hold different heads, if there are several; the result has all.
    """
    return {
        str(number): by_head.gather_heads(buffer.read(range(held)))
        for number, buffer in enumerate(buffers)
    }


def write_all(
    buffers: Sequence[FrameBuffer],
    tensors: Mapping[str, Tensor],
    held: int,
    by_head: OneProcess = ALONE,
) -> None:
    """Fill the first slots of some buffers with what `read_all` returned."""
    for number, buffer in enumerate(buffers):
        if held:
            buffer.write(range(held), by_head.part_of_heads(tensors[str(number)]))


def _entry_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Store 1 / norm as float16 in 16-bit models: bfloat16's rounding would scale a whole key."""
    return torch.float16 if name == "norm" and dtype.itemsize < 4 else dtype
