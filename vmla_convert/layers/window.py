"""Which frame is in which slot: a ring of frames with a sink, before any tensor.

A chunk claims its slots once and overwrites them at every denoising step. Slots are not in time
order; attention does not mind, because keys are kept unrotated and each slot's position is assigned
when it is read.

Worked example, window 6, sink 2, chunks of 2 (frame held by each slot; relative position below)::

    after frames 0..5    [0 1 | 2 3 4 5]      after frames 6, 7    [0 1 | 6 7 4 5]
                          0 1   2 3 4 5                             0 1   4 5 2 3
"""

from __future__ import annotations

from vmla_convert.config import CachePolicy


class FrameWindow:
    """Frames that a policy keeps, and the slots they are in.

    Attributes:
        policy: Window, sink, positions, and how many of the newest frames stay dense.
        chunk_slots: Slots of the open chunk, oldest frame first.
        recent: Frames before the open chunk that are kept dense as well, oldest first.
        opened: How many chunks were opened so far.
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
        """Claim slots for the next frames; beyond the window the oldest after the sink give way.

        Raises:
            ValueError: The chunk is larger than the window leaves room for.
        """
        if not 1 <= frames <= self.policy.window_frames - self.policy.sink_frames:
            raise ValueError(f"a chunk of {frames} frames does not fit the window")
        self.opened += 1
        dense = self.policy.dense_recent_frames
        self.recent = (self.recent + self.chunk_frames)[-dense:] if dense else []
        self.chunk_slots = [self._claim_slot() for _ in range(frames)]
        self.recent = [frame for frame in self.recent if frame in self._slot_frames]

    def rewind(self, frames: int, keep_sink: bool) -> None:
        """Forget all that is held but the sink; the next chunk starts `frames` frames earlier.

        Args:
            frames: How many of the newest frames will be written again.
            keep_sink: Keep the sink's entries; else the first frames written again become the sink.

        Raises:
            ValueError: More frames than were ever written.
        """
        if not 0 <= frames <= self._next_frame:
            raise ValueError(f"{frames} frames back is before the first")
        self._next_frame -= frames
        kept = [f for f in self._slot_frames if self._in_sink(f) and f < self._next_frame]
        self._slot_frames = sorted(kept) if keep_sink else []
        if not keep_sink or self._next_frame < self._sink_start:
            self._sink_start = self._next_frame
        self.chunk_slots, self.recent = [], []

    @property
    def next_frame(self) -> int:
        """Index of the frame after the open chunk."""
        return self._next_frame

    @property
    def sink_end(self) -> int:
        """Index of the first frame after the sink's."""
        return self._sink_start + self.policy.sink_frames

    @property
    def held(self) -> int:
        """How many slots hold a frame; they are the first ones."""
        return len(self._slot_frames)

    @property
    def chunk_frames(self) -> list[int]:
        """Frames of the open chunk."""
        return [self._slot_frames[slot] for slot in self.chunk_slots]

    @property
    def past_slots(self) -> list[int]:
        """Slots of the past that no dense copy is kept of."""
        own = {*self.chunk_frames, *self.recent}
        return [slot for slot, frame in enumerate(self._slot_frames) if frame not in own]

    def frame_positions(self, slots: list[int]) -> list[int]:
        """Time positions of the frames in some slots, as the policy assigns them."""
        if self.policy.frame_positions == "absolute":
            return [self._slot_frames[slot] for slot in slots]
        order = {frame: place for place, frame in enumerate(sorted(self._slot_frames))}
        return [order[self._slot_frames[slot]] for slot in slots]

    def own_positions(self) -> list[int]:
        """Time positions of the recent frames and then the open chunk."""
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
