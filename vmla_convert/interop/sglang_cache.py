"""A codec's cache with the interface of SGLang's dense cache of one layer.

SGLang's attention hands over the keys and values of a chunk and gets back what the chunk attends
to. The chunk itself comes back exactly; all other tokens are decoded. Nothing here imports SGLang.

Shapes: B batch, S tokens, H heads of the model, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from vmla_convert.interop.slot_window import SlotWindow
from vmla_convert.interop.tokens import (
    EncodedStore,
    RotaryTables,
    Slots,
    TokenCache,
    placed_codec,
)
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.maths.rates import Rate

F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(function: F) -> F:
    """Keep a function out of graphs of torch.compile, which would be made anew for every chunk."""
    return cast(F, torch.compiler.disable(function))


class AttentionView(NamedTuple):
    """Keys and values that a chunk attends to; attributes as in SGLang's `CausalAttentionKVView`.

    Attributes:
        k: Keys of some heads, (B, S, heads, D).
        v: Values of the same heads.
        local_start_index: First slot of the chunk.
        local_end_index: Slot after the chunk.
        visible_local_end: Number of slots that hold a token.
        visible_global_end: Number of tokens since the start of the clip.
    """

    k: Tensor
    v: Tensor
    local_start_index: int
    local_end_index: int
    visible_local_end: int
    visible_global_end: int


class HeadCodecs:
    """The codec of one layer, cut to the heads that a process holds; shared by all its caches."""

    def __init__(
        self,
        codec: LayerCodec,
        rate: Rate,
        sum_over_heads: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keep a codec on the CPU.

        Args:
            codec: Codec of the layer, for all H heads.
            rate: Channels and bits that the codec stores of a token.
            sum_over_heads: Adds up channels of processes that hold different heads. Without it,
                a cache that is handed some of the heads takes the others for their mean.
        """
        self._codec, self._rate, self._sum_over_heads = codec, rate, sum_over_heads
        self._placed: dict[tuple[int, int, torch.dtype, torch.device], LayerCodec] = {}

    def store(self, first: int, slots: Slots) -> EncodedStore:
        """Empty slots for heads from the `first` on."""
        place = (first, slots.heads, slots.dtype, slots.device)
        if place not in self._placed:
            self._placed[place] = placed_codec(self._codec, self._rate, slots, first)
        return EncodedStore(self._placed[place], self._rate, slots, self._sum_over_heads)


class CodecKVCache:
    """One layer's keys and values, encoded by a cache codec.

    The arguments and attributes with SGLang's names mean what they mean in SGLang's
    `CausalSelfAttentionKVCache`.
    """

    def __init__(
        self,
        codecs: HeadCodecs,
        slots: Slots,
        rotary: RotaryTables | None = None,
        *,
        sink_tokens: int = 0,
        global_sink_tokens: int = 0,
        attention_window_size: int = 0,
        allow_growth: bool = False,
    ) -> None:
        """Make an empty cache; memory is taken at the first chunk.

        Args:
            codecs: Codec of the layer.
            slots: Size, precision and place of the dense cache.
            rotary: Rotations of the cached keys; None where keys are cached before RoPE.
            sink_tokens: First tokens that are never dropped.
            global_sink_tokens: First tokens that are never dropped, even with a pinned chunk.
            attention_window_size: Newest tokens that a chunk attends to; 0 for all.
            allow_growth: Add slots instead of dropping tokens.
        """
        self._codecs, self._slots, self._rotary = codecs, slots, rotary
        self._window = SlotWindow(
            slots.count, attention_window_size, sink_tokens, global_sink_tokens, allow_growth
        )
        self._parts: dict[tuple[int, int], _Heads] = {}
        self._ahead: int | None = None if rotary else 0

    @property
    def cache_size(self) -> int:
        """Number of slots."""
        return self._window.size

    @property
    def num_cache_heads(self) -> int:
        """Number of heads, H."""
        return self._slots.heads

    @property
    def sink_tokens(self) -> int:
        """First tokens that are never dropped."""
        return self._window.sink_tokens

    @property
    def global_sink_tokens(self) -> int:
        """First tokens that are never dropped, even with a pinned chunk."""
        return self._window.global_sink_tokens

    @property
    def nbytes(self) -> int:
        """Bytes between two passes."""
        return sum(part.nbytes for part in self._parts.values())

    def start(self, grid: tuple[int, int], ahead: int = 0) -> None:
        """Begin a pass over a chunk, before `update_and_get_attention_kv`.

        Args:
            grid: Rows and columns of tokens in a latent frame.
            ahead: How far the positions of RoPE are ahead of the number of tokens.
        """
        self._ahead = ahead
        if self._rotary is not None:
            self._rotary.grid = grid

    def reset_indices(self) -> None:
        """Start a new clip."""
        self._window.reset()

    def pin_current_chunk(self, current_num_tokens: int) -> None:
        """Keep the newest chunk visible, as far as the sink is long, until another is pinned."""
        self._window.pin(current_num_tokens)

    def can_direct_current_attention(self, num_new_tokens: int) -> bool:
        """Whether a chunk attends to itself alone, so that no cache is needed."""
        window = self._window
        return not window.sink_tokens and window.size == window.attended == num_new_tokens

    @_uncompiled
    def update_and_get_attention_kv(
        self,
        *,
        key: Tensor,
        value: Tensor,
        current_chunk_start: int,
        cache_head_start: int | None = None,
        recent_window_tokens: int | None = None,
        debug_name: str = "causal KV cache",
    ) -> AttentionView:
        """Encode a chunk, and return what the chunk attends to.

        Args:
            key: Keys of all heads or of some, (B, L, heads, D).
            value: Values of the same heads.
            current_chunk_start: Number of the chunk's first token since the start of the clip.
            cache_head_start: First of these heads, where they are not all.
            recent_window_tokens: Number of tokens before the chunk that the chunk attends to,
                besides sinks; None for the whole window.
            debug_name: Name of the cache for messages.

        Raises:
            RuntimeError: The chunk has no place in the cache, or `start` was not called.
            ValueError: The first head is not told, or the recent window is negative.
        """
        if self._ahead is None:
            raise RuntimeError(f"{debug_name}: the positions of cached keys cannot be told")
        if recent_window_tokens is not None and recent_window_tokens < 0:
            raise ValueError(
                f"{debug_name}: recent_window_tokens {recent_window_tokens} is negative"
            )
        part, window = self._part(key.shape[2], cache_head_start, debug_name), self._window
        part.fill(window.filled)
        chunk, move = window.place(current_chunk_start, key.shape[1])
        visible = window.visible(chunk, recent_window_tokens)
        part.grow(window.size)
        if move is not None:
            part.cache.move(*move)
        part.write(chunk, key, value, current_chunk_start + self._ahead)
        keys, values = part.cache.read_parts([slots for slots in visible if slots])
        # The chunk is encoded after every pass, so that no pass leaves dense tensors behind.
        part.cache.settle()
        return AttentionView(keys, values, chunk.start, chunk.stop, window.filled, window.tokens)

    def _part(self, heads: int, first: int | None, name: str) -> _Heads:
        """The cache of some heads, made at their first chunk."""
        if heads == self._slots.heads:
            first = 0
        if first is None:
            raise ValueError(
                f"{name} holds {self._slots.heads} heads and is handed {heads}: "
                "cache_head_start must say which"
            )
        if (first, heads) not in self._parts:
            slots = replace(self._slots, count=self._window.size, heads=heads)
            store = self._codecs.store(first, slots)
            self._parts[first, heads] = _Heads(store, TokenCache(slots, store, self._rotary))
        return self._parts[first, heads]


class _Heads:
    """Keys and values of some heads, in slots that may never have been written."""

    def __init__(self, store: EncodedStore, cache: TokenCache) -> None:
        self.cache, self._store, self._written = cache, store, 0

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def grow(self, count: int) -> None:
        """Add empty slots."""
        if count > self.cache.slots.count:
            self.cache.slots = replace(self.cache.slots, count=count)
            self._store.grow(count)

    def fill(self, count: int) -> None:
        """Make zeros of slots before `count` that were never written."""
        slots = self.cache.slots
        if count > self._written:
            skipped = range(self._written, count)
            zeros = torch.zeros(
                slots.batch, len(skipped), *slots.entry, dtype=slots.dtype, device=slots.device
            )
            self.cache.write(skipped, zeros, zeros, 0)
            self._written = count

    def write(self, chunk: range, key: Tensor, value: Tensor, first: int) -> None:
        """Take the keys and values of a chunk, both (B, L, heads, D)."""
        self.fill(chunk.start)
        dtype = self.cache.slots.dtype
        self.cache.write(chunk, key.to(dtype), value.to(dtype), first)
        self._written = max(self._written, chunk.stop)
