"""Which frame is in which slot: a ring of frames with a sink, without tensors.

A chunk claims its slots once and overwrites them at every denoising step. Slots are not in time
order. Attention does not depend on the order, because keys are kept unrotated and each slot gets a
position when it is attended to.

Worked example, window 6, sink 2, chunks of 2 (frame held by each slot; relative position below)::

    after frames 0..5    [0 1 | 2 3 4 5]      after frames 6, 7    [0 1 | 6 7 4 5]
                          0 1   2 3 4 5                             0 1   4 5 2 3
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmla_convert.config import CachePolicy


class FrameWindow:
    """The frames that a policy keeps, and their slots.

    Attributes:
        policy: Window, sink, positions, and number of recent frames that stay dense.
        chunk_slots: Slots of the open chunk, oldest frame first.
        recent: Past frames that are kept dense, oldest first.
        opened: Number of chunks opened so far.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.chunk_slots: list[int] = []
        self.recent: list[int] = []
        self.opened = 0
        self._slot_frames: list[int] = []
        self._next_frame = 0
        self._sink_start = 0

    def open_chunk(self, frames: int) -> None:
        """Claim slots for the next frames; in a full window they replace the oldest after the sink.

        Raises:
            ValueError: The chunk is larger than the window without the sink.
        """
        if not 1 <= frames <= self.policy.window_frames - self.policy.sink_frames:
            raise ValueError(f"a chunk of {frames} frames does not fit the window")
        self.opened += 1
        dense = self.policy.dense_recent_frames
        self.recent = (self.recent + self.chunk_frames)[-dense:] if dense else []
        self.chunk_slots = [self._claim_slot() for _ in range(frames)]
        self.recent = [frame for frame in self.recent if frame in self._slot_frames]

    def rewind(self, frames: int, keep_sink: bool) -> None:
        """Forget all frames but the sink; the next chunk starts `frames` frames earlier.

        Args:
            frames: Number of newest frames that will be written again.
            keep_sink: Keep the sink's entries; else the first frames written again become the sink.

        Raises:
            ValueError: There are fewer frames than that.
        """
        if not 0 <= frames <= self._next_frame:
            raise ValueError(f"{frames} frames back is before the first")
        self._next_frame -= frames
        kept = [f for f in self._slot_frames if self._in_sink(f) and f < self._next_frame]
        self._slot_frames = sorted(kept) if keep_sink else []
        if not keep_sink or self._next_frame < self._sink_start:
            self._sink_start = self._next_frame
        self.chunk_slots, self.recent = [], []

    def state(self) -> dict[str, Any]:
        """Which frame is in which slot, as JSON data."""
        return {
            "chunk_slots": self.chunk_slots,
            "recent": self.recent,
            "opened": self.opened,
            "slot_frames": self._slot_frames,
            "next_frame": self._next_frame,
            "sink_start": self._sink_start,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: The state holds more frames than the window.
        """
        if len(state["slot_frames"]) > self.policy.window_frames:
            raise ValueError(f"{len(state['slot_frames'])} frames do not fit the window")
        self.chunk_slots, self.recent = list(state["chunk_slots"]), list(state["recent"])
        self.opened, self._slot_frames = state["opened"], list(state["slot_frames"])
        self._next_frame, self._sink_start = state["next_frame"], state["sink_start"]

    @property
    def next_frame(self) -> int:
        """Index of the frame after the open chunk."""
        return self._next_frame

    @property
    def sink_end(self) -> int:
        """Index of the first frame after the sink."""
        return self._sink_start + self.policy.sink_frames

    @property
    def held(self) -> int:
        """Number of slots that hold a frame, from the first slot on."""
        return len(self._slot_frames)

    @property
    def chunk_frames(self) -> list[int]:
        """Frames of the open chunk."""
        return [self._slot_frames[slot] for slot in self.chunk_slots]

    @property
    def past_slots(self) -> list[int]:
        """Slots of past frames that are not kept dense."""
        own = {*self.chunk_frames, *self.recent}
        return [slot for slot, frame in enumerate(self._slot_frames) if frame not in own]

    def frame_positions(self, slots: list[int]) -> list[int]:
        """Time positions of the frames in some slots, absolute or relative as the policy says."""
        if self.policy.frame_positions == "absolute":
            return [self._slot_frames[slot] for slot in slots]
        order = {frame: place for place, frame in enumerate(sorted(self._slot_frames))}
        return [order[self._slot_frames[slot]] for slot in slots]

    def own_positions(self) -> list[int]:
        """Time positions of the dense recent frames and then of the open chunk."""
        recent = [self._slot_frames.index(frame) for frame in self.recent]
        return self.frame_positions(recent + self.chunk_slots)

    def _in_sink(self, frame: int) -> bool:
        return self._sink_start <= frame < self.sink_end

    def _claim_slot(self) -> int:
        frame, self._next_frame = self._next_frame, self._next_frame + 1
        if self.held < self.policy.window_frames:
            self._slot_frames.append(frame)
            return self.held - 1
        slot = self._slot_frames.index(min(f for f in self._slot_frames if not self._in_sink(f)))
        self._slot_frames[slot] = frame
        return slot
