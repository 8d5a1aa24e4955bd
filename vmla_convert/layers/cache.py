"""One cache for dense and converted models: preallocated, window and sink in frames, no shifting.

Each layer keeps the entries of its attention (key and value, or latents) in slots of one frame. A
chunk claims its slots once and overwrites them at every denoising step; the last, clean pass leaves
what later chunks read. Slots are not in time order; attention does not mind, because keys are kept
unrotated and each slot's position is assigned when it is read.

Worked example, window 6, sink 2, chunks of 2 (frame held by each slot; relative position below)::

    after frames 0..5    [0 1 | 2 3 4 5]      after frames 6, 7    [0 1 | 6 7 4 5]
                          0 1   2 3 4 5                             0 1   4 5 2 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmla_convert.config import CachePolicy
from vmla_convert.layers.attention import Entries


class KVCache:
    """Entries of the frames that a window with a sink keeps, for every layer."""

    def __init__(
        self,
        policy: CachePolicy,
        entry_widths: list[tuple[int, ...]],
        batch: int,
        tokens_per_frame: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate all slots.

        Args:
            policy: Window, sink and positions.
            entry_widths: For each layer the widths of what its attention keeps.
            batch: B.
            tokens_per_frame: Tokens of one latent frame.
            dtype: Of the kept entries.
            device: Where they live.
        """
        self.policy = policy
        self.tokens_per_frame = tokens_per_frame
        shape = (batch, policy.window_frames, tokens_per_frame)
        self._buffers = [
            [torch.zeros(*shape, width, dtype=dtype, device=device) for width in widths]
            for widths in entry_widths
        ]
        self._slot_frames: list[int] = []
        self._chunk_slots: list[int] = []
        self._next_frame = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, full or not."""
        return sum(buffer.nbytes for layer in self._buffers for buffer in layer)

    def open_chunk(self, frames: int) -> None:
        """Claim slots for the next frames; beyond the window the oldest after the sink give way.

        Raises:
            ValueError: The chunk is larger than the window leaves room for.
        """
        if frames > self.policy.window_frames - self.policy.sink_frames:
            raise ValueError(f"a chunk of {frames} frames does not fit the window")
        self._chunk_slots = [self._claim_slot() for _ in range(frames)]

    def chunk_positions(self) -> Tensor:
        """Time positions (F,) of the frames of the open chunk."""
        return self.positions()[self._chunk_slots]

    def positions(self) -> Tensor:
        """Time positions of all held slots, in slot order, as the policy assigns them."""
        frames = torch.tensor(self._slot_frames)
        return frames if self.policy.positions == "absolute" else frames.argsort().argsort()

    def past_tokens(self) -> Tensor:
        """Indices (P,) of the held tokens that came before the open chunk, into S."""
        slots = [s for s in range(len(self._slot_frames)) if s not in self._chunk_slots]
        offsets = torch.arange(self.tokens_per_frame)
        starts = self.tokens_per_frame * torch.tensor(slots, dtype=torch.long)
        return (starts[:, None] + offsets).flatten()

    def update(self, layer: int, entries: Entries) -> Entries:
        """Write the open chunk's entries (B, T, width) and return those of all held tokens.

        The result is a view (B, S, width) of the buffers, S = held frames · tokens_per_frame.
        """
        held = len(self._slot_frames)
        views: list[Tensor] = []
        for buffer, entry in zip(self._buffers[layer], entries, strict=True):
            buffer[:, self._chunk_slots] = entry.unflatten(1, (-1, self.tokens_per_frame)).to(
                buffer.dtype
            )
            views.append(buffer[:, :held].flatten(1, 2))
        return tuple(views)

    def _claim_slot(self) -> int:
        frame, self._next_frame = self._next_frame, self._next_frame + 1
        if len(self._slot_frames) < self.policy.window_frames:
            self._slot_frames.append(frame)
            return len(self._slot_frames) - 1
        evictable = [f for f in self._slot_frames if f >= self.policy.sink_frames]
        slot = self._slot_frames.index(min(evictable))
        self._slot_frames[slot] = frame
        return slot
