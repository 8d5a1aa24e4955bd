"""What a window with a sink holds, as a plain list."""

from __future__ import annotations


def held_frames(count: int, window: int, sink: int) -> list[int]:
    """Frames held after `count` frames came one by one, oldest first."""
    held: list[int] = []
    for frame in range(count):
        held.append(frame)
        if len(held) > window:
            held.pop(sink)
    return held
