"""Which slots SGLang's causal cache writes and attends to, without any tensor.

Source: `CausalSelfAttentionKVCache` of SGLang-Diffusion 0.5.23. Slots fill from the left. When a
chunk does not fit, the tokens behind the sink move left and the oldest of these are dropped. A
pinned chunk stays visible wherever it is, and is never dropped once it is beside the global sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Move(NamedTuple):
    """Copy the tokens of some slots to others."""

    target: range
    source: range


@dataclass
class SlotWindow:
    """The slots of one layer.

    Attributes:
        size: Number of slots.
        attended: Number of newest slots that a chunk attends to; 0 for all.
        sink_tokens: First tokens that are never dropped, while no chunk is pinned.
        global_sink_tokens: First tokens that are never dropped.
        grows: Add slots instead of dropping tokens.
        tokens: Number of tokens since the start of the clip.
        filled: Number of slots that hold a token.
    """

    size: int
    attended: int = 0
    sink_tokens: int = 0
    global_sink_tokens: int = 0
    grows: bool = False
    tokens: int = 0
    filled: int = 0

    def __post_init__(self) -> None:
        self.attended = self.attended or self.size
        self._pinned = range(0)

    def reset(self) -> None:
        """Start a new clip."""
        self.tokens, self.filled, self._pinned = 0, 0, range(0)

    def pin(self, tokens: int) -> None:
        """Pin the newest chunk of `tokens` tokens, as far as the sink is long; 0 unpins."""
        start = self.filled - tokens
        self._pinned = range(start, start + max(0, min(self.sink_tokens, tokens)))

    def place(self, first: int, count: int) -> tuple[range, Move | None]:
        """Give a chunk slots; return them, and the move that makes room for the chunk.

        A chunk that ends before the newest token keeps its slots, whatever chunks were written in
        between.

        Args:
            first: Number of the chunk's first token, counted from the start of the clip.
            count: Number of tokens of the chunk.

        Raises:
            RuntimeError: The cache is too small for the chunk, or the chunk has been dropped.
        """
        added = max(0, first + count - self.tokens)
        needed, size = self.filled + added, self.size
        if self.grows and needed > size:
            size = max(needed, 2 * size)
        dropped = max(0, needed - size)
        filled = needed - dropped
        start = filled - count if added else first - self.tokens + filled
        if start < 0 or start + count > size:
            raise RuntimeError(
                f"tokens {first} to {first + count} have no place: the cache has {size} slots, "
                f"and holds {self.filled} of {self.tokens} tokens"
            )
        sink = self._sink()
        kept = max(0, self.filled - dropped - sink) if dropped else 0
        move = Move(range(sink, sink + kept), range(sink + dropped, sink + dropped + kept))
        if self._is_pinned and self._pinned.start >= sink:
            self._pinned = _shifted(self._pinned, -dropped)
        if self.attended == self.size:
            self.attended = size
        self.size, self.filled, self.tokens = size, filled, self.tokens + added
        return range(start, start + count), move if kept else None

    def visible(self, chunk: range, recent: int | None) -> list[range]:
        """The slots that a chunk attends to, in order.

        Args:
            chunk: Slots of the chunk.
            recent: Number of tokens before the chunk, besides sinks; None for the whole window.
        """
        if recent is None:
            return self._whole_window()
        sink = self._sink()
        start = max(sink, chunk.start - recent)
        if start <= sink:
            return [range(self.filled)]
        pinned = [self._pinned] if self._is_visible_apart(sink, start) else []
        return [*([range(sink)] if sink else []), *pinned, range(start, self.filled)]

    def _whole_window(self) -> list[range]:
        """The sinks that the newest slots do not reach, and fewer of the newest slots for it."""
        start = max(0, self.filled - self.attended)
        if not self.global_sink_tokens and not self._is_pinned:
            return [range(start, self.filled)]
        sink = self._sink()
        first = range(sink if start else 0)
        pinned = self._pinned if self._is_visible_apart(sink, start) else range(0)
        if not first and not pinned:
            return [range(start, self.filled)]
        start = self.filled - max(0, self.attended - len(first) - len(pinned))
        return [*(part for part in (first, pinned) if part), range(start, self.filled)]

    def _sink(self) -> int:
        """Number of first slots whose tokens are never dropped."""
        if not self._is_pinned:
            return max(self.global_sink_tokens, self.sink_tokens)
        beside = self._pinned.start == self.global_sink_tokens
        return self.global_sink_tokens + (len(self._pinned) if beside else 0)

    @property
    def _is_pinned(self) -> bool:
        return self._pinned.start >= 0 and len(self._pinned) > 0

    def _is_visible_apart(self, sink: int, start: int) -> bool:
        """Whether the pinned chunk lies behind the sink and before a slot."""
        return self._is_pinned and sink <= self._pinned.start < start


def _shifted(slots: range, by: int) -> range:
    return range(slots.start + by, slots.stop + by)
