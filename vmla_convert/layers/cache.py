"""One cache policy for dense and converted models: preallocated, window and sink, no shifting.

A `KVCache` has one `DenseCache` or `LatentCache` for every layer, and one `FrameWindow` that tells
them all which frame is in which slot. A dense cache is written in place at every pass and read as a
view; a latent one hands the open chunk its own latents as they are, and is written, and quantised,
by the pass that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vmla_convert.config import CODE_BITS, CachePolicy, RuntimeConfig
from vmla_convert.layers.attention import Entries, Projection, Reading, Sight
from vmla_convert.layers.window import FrameWindow
from vmla_convert.maths.quant import LatentCode, Packed, code_bytes, fit_code, pack, unpack


class Storage(NamedTuple):
    """Where and how entries are kept.

    Attributes:
        batch: B.
        tokens_per_frame: Tokens of one latent frame.
        dtype: Of entries that are not quantised.
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

    constant_nbytes = 0

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


Metric = Callable[[Tensor], Tensor]
"""What an error in latents costs, (R, R), given samples (n, R) of them."""


class CodedEntry:
    """Entries in a few bits a number, by a code fitted to the first chunk that is kept."""

    def __init__(self, slots: int, width: int, storage: Storage, bits: int, metric: Metric) -> None:
        self._dtype, self._width, self._bits, self._metric = storage.dtype, width, bits, metric
        self._codes = FrameBuffer(slots, code_bytes(width, bits), storage, torch.uint8)
        self._scale = FrameBuffer(slots, 1, storage, torch.float16)
        self._code: LatentCode | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, each token's scale among them."""
        return self._codes.nbytes + self._scale.nbytes

    @property
    def constant_nbytes(self) -> int:
        """Bytes of the code itself, whatever the frames and clips; 0 before it is fitted."""
        parts = self._code._asdict().values() if self._code else ()
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    def write(self, slots: Sequence[int], entry: Tensor) -> None:
        """Quantise into slots."""
        if self._code is None:
            samples = entry.flatten(0, 1)
            self._code = fit_code(samples, self._metric(samples), self._bits)
        codes, scale = pack(self._code, entry)
        self._codes.write(slots, codes)
        self._scale.write(slots, scale)

    def read(self, slots: Sequence[int]) -> Tensor:
        """Entries (B, L, R) of slots, as near as the code is."""
        packed = Packed(self._codes.read(slots), self._scale.read(slots))
        if self._code is None:
            # Nothing was kept yet, so that there is nothing to read.
            shape = (*packed.scale.shape[:-1], self._width)
            return packed.scale.new_zeros(shape, dtype=self._dtype)
        return unpack(self._code, packed, self._dtype)


class DenseCache:
    """Keys, unrotated, and values of one layer."""

    constant_nbytes = 0

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
    """Latents of one layer, and dense keys and values of its newest frames where asked for."""

    def __init__(
        self,
        widths: dict[str, int],
        dense_width: int,
        policy: CachePolicy,
        storage: Storage,
        runtime: RuntimeConfig,
        metric: Metric,
    ) -> None:
        """Allocate all slots.

        Args:
            widths: Of what the layer keeps, by name: `latent`, `rope`, `norm`.
            dense_width: d, of dense keys and values.
            policy: Window, and how many frames stay dense as well.
            storage: Where and how.
            runtime: Bits of the latents.
            metric: What an error in the content latents costs.
        """
        slots, recent = policy.window_frames, policy.dense_recent_frames
        dtypes = {"latent": runtime.cache_dtype, "rope": runtime.rope_dtype}
        self._entries: list[FrameBuffer | CodedEntry] = []
        for name, width in widths.items():
            bits = CODE_BITS[dtypes.get(name, "model")]
            if bits is None:
                self._entries.append(FrameBuffer(slots, width, storage, _kept_dtype(name, storage)))
            else:
                cost = metric if name == "latent" else _indifferent
                self._entries.append(CodedEntry(slots, width, storage, bits, cost))
        self._recent = [
            FrameBuffer(recent, dense_width, storage, storage.dtype)
            for _ in range(2 if recent else 0)
        ]
        self._kept = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(entry.nbytes for entry in (*self._entries, *self._recent))

    @property
    def constant_nbytes(self) -> int:
        """Bytes of fitted codes."""
        return sum(entry.constant_nbytes for entry in self._entries)

    def update(self, projection: Projection, window: FrameWindow) -> Reading:
        """Return what the open chunk reads, then keep the chunk if it was projected for that.

        Where the chunk reads its own latents they come last; else the newest tokens come dense.

        Raises:
            ValueError: A pass of this chunk was kept already, over the dense frames that it read.
        """
        if window.recent and self._kept == window.opened:
            raise ValueError("this chunk was kept already; open the next one")
        past = tuple(entry.read(window.latent_slots) for entry in self._entries)
        if projection.own is None:
            pairs = zip(past, projection.cached, strict=True)
            reading = Reading(tuple(torch.cat([old, new], 1) for old, new in pairs))
        else:
            reading = Reading(past, self._newest(projection.own, window))
        if projection.keep:
            self._write(projection, window)
            self._kept = window.opened
        return reading

    def _newest(self, own: Entries, window: FrameWindow) -> Entries:
        """Dense keys and values (B, E, d) of the recent frames and then the chunk's own."""
        if not window.recent:
            return own
        slots = [frame % window.policy.dense_recent_frames for frame in window.recent]
        pairs = zip(self._recent, own, strict=True)
        return tuple(torch.cat([entry.read(slots), new], 1) for entry, new in pairs)

    def _write(self, projection: Projection, window: FrameWindow) -> None:
        for entry, new in zip(self._entries, projection.cached, strict=True):
            entry.write(window.chunk_slots, new)
        recent = window.policy.dense_recent_frames
        if not recent or projection.own is None:
            return
        newest = window.chunk_frames[-recent:]
        for entry, new in zip(self._recent, projection.own, strict=True):
            tokens = new.shape[1] // len(window.chunk_frames) * len(newest)
            entry.write([frame % recent for frame in newest], new[:, -tokens:])


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

    @property
    def constant_nbytes(self) -> int:
        """Bytes that quantised caches take whatever the window and the batch: their codes."""
        return sum(layer.constant_nbytes for layer in self._layers)

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


def _indifferent(samples: Tensor) -> Tensor:
    """The metric in which all errors cost the same."""
    return torch.eye(samples.shape[1], device=samples.device)
