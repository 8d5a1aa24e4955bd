"""The frames in a window with a sink, as a plain list."""

from __future__ import annotations


def held_frames(count: int, window: int, sink: int) -> list[int]:
    """Frames held after `count` frames came one by one, oldest first."""
    held: list[int] = []
    for frame in range(count):
        held.append(frame)
        if len(held) > window:
            held.pop(sink)
    return held


class NaiveWindow:
    """The same with chunks, rewinds, and the newest past frames that stay dense.

    Attributes:
        held: Frames held, the sink first and then oldest first.
        chunk: Frames of the open chunk.
        recent: Past frames that are dense, oldest first.
        next_frame: Index of the next frame.
    """

    def __init__(self, window: int, sink: int, dense_recent: int = 0) -> None:
        self.window, self.sink, self.dense_recent = window, sink, dense_recent
        self.held: list[int] = []
        self.chunk: list[int] = []
        self.recent: list[int] = []
        self.next_frame = 0
        self._since_rewind: list[int] = []

    @property
    def past(self) -> list[int]:
        """Past frames that are not dense."""
        return [frame for frame in self.held if frame not in self.chunk + self.recent]

    def open_chunk(self, frames: int) -> None:
        """Frames come one by one."""
        past = list(self._since_rewind)
        self.chunk = list(range(self.next_frame, self.next_frame + frames))
        for frame in self.chunk:
            self._since_rewind.append(frame)
            self.held.append(frame)
            if len(self.held) > self.window:
                self.held.pop(self.sink)
        self.next_frame += frames
        newest = past[-self.dense_recent :] if self.dense_recent else []
        self.recent = [frame for frame in newest if frame in self.held]

    def rewind(self, frames: int, keep_sink: bool) -> None:
        """Start again some frames earlier, from the sink or from nothing."""
        self.next_frame -= frames
        sink = [frame for frame in self.held[: self.sink] if frame < self.next_frame]
        self.held = sink if keep_sink else []
        self.chunk, self.recent, self._since_rewind = [], [], []
