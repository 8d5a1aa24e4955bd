"""Caches against a plain list of frames: what a chunk attends to, in which order, and the bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TINY_MLA, noise, tiny_config, tiny_mla, tiny_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from reference.window import NaiveWindow
from torch import Tensor, nn

from vmla_convert.config import CachePolicy, CodecConfig, RuntimeConfig, Sizes
from vmla_convert.layers.attention import Entries
from vmla_convert.layers.cache import CompressedCache, EntryCache, KVCache, Storage
from vmla_convert.maths.rope3d import Rotary, rotate_

BATCH, TOKENS = 2, 3
CPU = torch.device("cpu")
# Layers differ in what they keep, and layers of a kind in their widths.
ENTRY_WIDTHS = [{"key": 4, "value": 4}, {"latent": 5, "rope": 2, "norm": 1}]
COMPRESSED_WIDTH = 6


def storage(dtype: torch.dtype = torch.float32, offload: bool = False) -> Storage:
    return Storage(BATCH, TOKENS, dtype, CPU, offload)


def entry(frames: list[int], width: int, kind: int, versions: list[int]) -> Tensor:
    """(B, L, width) in which every number tells its clip, frame, token, channel, kind and version.

    Below 2**24, which float32 counts to.
    """
    numbers = [
        [
            [
                b + 2 * (w + 8 * (t + 4 * (kind + 8 * (f % 256 + 256 * (v % 16)))))
                for w in range(width)
            ]
            for f, v in zip(frames, versions, strict=True)
            for t in range(TOKENS)
        ]
        for b in range(BATCH)
    ]
    return torch.tensor(numbers, dtype=torch.float32).view(BATCH, -1, width)


def entries(
    frames: list[int], widths: list[int], versions: list[int], first_kind: int = 0
) -> tuple[Tensor, ...]:
    return tuple(entry(frames, w, first_kind + i, versions) for i, w in enumerate(widths))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


class Listed(NamedTuple):
    """A past that is what was written."""

    entries: Entries

    @property
    def tokens(self) -> int:
        return self.entries[0].shape[1]

    def heads(self, heads: slice) -> Entries:
        return tuple(part.unflatten(-1, (2, -1))[:, :, heads] for part in self.entries)

    def write(self, heads: slice, rotary: Rotary, key: Tensor, value: Tensor) -> None:
        for whole, place in zip(self.heads(heads), (key, value), strict=True):
            place.copy_(whole)
        rotate_(key, rotary)


class PlainStore:
    """A store that compresses nothing."""

    nbytes = 0

    def __init__(self) -> None:
        self.frames: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, slots: Sequence[int], key: Tensor, value: Tensor) -> None:
        parts = zip(key.split(TOKENS, 1), value.split(TOKENS, 1), strict=True)
        self.frames.update(zip(slots, parts, strict=True))

    def past(self, slots: Sequence[int]) -> Listed:
        kept = [self.frames[slot] for slot in slots]
        empty = torch.zeros(BATCH, 0, COMPRESSED_WIDTH)
        return Listed(tuple(torch.cat([empty, *(f[i] for f in kept)], 1) for i in range(2)))

    def state(self, held: int) -> dict[str, Tensor]:
        parts = ((slot, i, self.frames[slot][i]) for slot in range(held) for i in range(2))
        return {f"{slot}-{i}": part for slot, i, part in parts}

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        self.frames = {slot: (tensors[f"{slot}-0"], tensors[f"{slot}-1"]) for slot in range(held)}


# A ring buffer is a list of frames


class Caches(RuleBasedStateMachine):
    """Caches of every kind and a list of frames, through chunks, denoising steps and rewinds.

    Layers 0 and 1 keep entries, layer 2 compresses them. `written` is the version of a frame that
    the last pass wrote, `stayed` the version that the compressed cache kept.
    """

    @initialize(
        sink=st.integers(0, 2),
        room=st.integers(1, 5),
        dense=st.integers(0, 3),
        offload=st.booleans(),
        relative=st.booleans(),
    )
    def start(self, sink: int, room: int, dense: int, offload: bool, relative: bool) -> None:
        dense, kept = min(dense, room - 1), storage(offload=offload)
        policy = CachePolicy(sink + room, sink, "relative" if relative else "absolute", dense)
        self.layers = [
            *(EntryCache(widths, policy, kept) for widths in ENTRY_WIDTHS),
            CompressedCache(PlainStore(), COMPRESSED_WIDTH, policy, kept),
        ]
        self.cache = KVCache(policy, self.layers, RuntimeConfig())
        self.room, self.naive = room, NaiveWindow(policy.window_frames, sink, dense)
        self.slots: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.stayed: dict[int, int] = {}
        self.passes, self.chunk_is_kept = 0, True

    @precondition(lambda self: self.chunk_is_kept)
    @rule(data=st.data())
    def open_a_chunk(self, data: st.DataObject) -> None:
        frames = data.draw(st.integers(1, self.room))
        self.cache.open_chunk(frames)
        self.naive.open_chunk(frames)
        self.slots.update(zip(self.cache.window.chunk_slots, self.naive.chunk, strict=True))
        self.chunk_is_kept = False
        self.denoise(keep=False)

    @precondition(lambda self: self.chunk_is_kept)
    @rule(data=st.data(), keep_sink=st.booleans())
    def rewind(self, data: st.DataObject, keep_sink: bool) -> None:
        frames = data.draw(st.integers(0, self.naive.next_frame))
        self.cache.rewind(frames, keep_sink)
        self.naive.rewind(frames, keep_sink)

    @precondition(lambda self: self.naive.chunk)
    @rule(keep=st.booleans())
    def denoise(self, keep: bool) -> None:
        """One pass of the open chunk through all layers."""
        self.passes += 1
        self.written.update(dict.fromkeys(self.naive.chunk, self.passes))
        for layer in range(2):
            self.update_entries(layer, keep)
        self.update_compressed(keep)
        if keep:
            self.chunk_is_kept = True

    def update_entries(self, layer: int, keep: bool) -> None:
        window, widths = self.cache.window, [*ENTRY_WIDTHS[layer].values()]
        new = entries(self.naive.chunk, widths, [self.passes] * len(self.naive.chunk))
        attended = self.cache.update(layer, new, keep)
        held = [self.slots[slot] for slot in range(window.held)]
        assert same(attended.entries, entries(held, widths, [self.written[f] for f in held]))
        assert attended.past is None
        self.check_positions(layer, held)

    def update_compressed(self, keep: bool) -> None:
        """A kept chunk may be kept again only where no dense frames make way for its own."""
        window, chunk, recent = self.cache.window, self.naive.chunk, self.naive.recent
        widths = [COMPRESSED_WIDTH] * 2
        now = [self.passes] * len(chunk)
        new = entries(chunk, widths, now)
        if recent and self.chunk_is_kept:
            with pytest.raises(ValueError, match="kept already"):
                self.cache.update(2, new, keep)
            return
        past = [self.slots[slot] for slot in window.past_slots]
        assert sorted(past) == self.naive.past
        attended = self.cache.update(2, new, keep)
        own = entries(recent + chunk, widths, [self.stayed[f] for f in recent] + now)
        assert same(attended.entries, own)
        assert isinstance(attended.past, Listed)
        assert same(attended.past.entries, entries(past, widths, [self.stayed[f] for f in past]))
        self.check_positions(2, recent + chunk, past)
        if keep:
            self.stayed.update(dict.fromkeys(chunk, self.passes))

    def check_positions(self, layer: int, own: list[int], past: list[int] | None = None) -> None:
        """Frames have the positions that the policy assigns."""
        held, relative = self.naive.held, self.cache.window.policy.frame_positions == "relative"
        found = self.layers[layer].frame_positions(self.cache.window)
        expected = [
            [held.index(frame) for frame in frames] if relative and frames else frames
            for frames in (own, past)
        ]
        assert [*found] == expected

    @invariant()
    def no_other_frames_are_held(self) -> None:
        held = [self.slots[slot] for slot in range(self.cache.window.held)]
        assert sorted(held) == self.naive.held


TestCaches = Caches.TestCase
TestCaches.settings = settings(
    derandomize=True, deadline=None, max_examples=20, stateful_step_count=25
)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_entries_are_a_view_of_all_slots_in_use(positions: str) -> None:
    assert positions in ("absolute", "relative")
    policy = CachePolicy(5, 1, positions)
    cache = KVCache(policy, [EntryCache({"key": 4}, policy, storage())], RuntimeConfig())
    places = set[int]()
    for count in (2, 4, 5, 5):
        cache.open_chunk(2)
        for keep in (False, True):
            (held,) = cache.update(0, (torch.ones(BATCH, 2 * TOKENS, 4),), keep).entries
            assert held.shape == (BATCH, count * TOKENS, 4)
            assert held._is_view()
            places.add(held.data_ptr())
    assert len(places) == 1


# Bytes


def tensors_in(holder: Any, seen: set[int]) -> list[Tensor]:
    """All tensors that an object keeps, but those of modules."""
    if id(holder) in seen or isinstance(holder, nn.Module):
        return []
    seen.add(id(holder))
    if isinstance(holder, Tensor):
        return [holder]
    if isinstance(holder, dict):
        inner = [*holder.values()]
    elif isinstance(holder, list | tuple | set):
        inner = [*holder]
    else:
        inner = [*getattr(holder, "__dict__", {}).values()]
    return [tensor for part in inner for tensor in tensors_in(part, seen)]


def allocated(cache: KVCache) -> int:
    """Bytes of all storages that a cache keeps."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors_in(cache, set())
    }
    return sum(storages.values())


@pytest.mark.parametrize(
    "kind", [{}, {"mla": TINY_MLA}, {"mla": tiny_mla("split")}], ids=["dense", "joint", "split"]
)
def test_a_cache_takes_the_bytes_that_its_config_says(kind: dict[str, Any]) -> None:
    """For every kind of layer, place and model dtype."""
    config = tiny_config(cache=CachePolicy(7, 2), **kind)
    model = tiny_model(config)
    for size in (4, 2):
        for offload in (False, True):
            runtime = RuntimeConfig(offload=offload)
            cache = model.new_cache(3, runtime)
            assert cache.nbytes == model.cache_bytes(3, runtime) == allocated(cache)
            assert cache.nbytes == config.cache_bytes(7, 3) * size // 2
        model = model.bfloat16()


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("nbytes", [1, 12.5, 40])
def test_a_codecs_cache_keeps_nothing_that_its_size_does_not_count(
    nbytes: float, dense: int
) -> None:
    policy = CachePolicy(7, 2, dense_recent_frames=dense)
    codec = CodecConfig(20, Sizes(nbytes))
    model = tiny_model(tiny_config(cache=policy, codec=codec))
    # 25 bytes for two layers, of 7 frames of 6 tokens of 3 clips; exact numbers take 4.
    expected = 3 * 6 * (7 * int(2 * nbytes) + 2 * dense * 96 * 4)
    for offload in (False, True):
        cache = model.new_cache(3, RuntimeConfig(offload=offload))
        assert cache.nbytes == allocated(cache) == expected
        assert model.cache_bytes(3) == expected
    in_bytes = dataclasses.replace(model.config, cache=CachePolicy(7, 2)).cache_bytes(7, 3)
    assert in_bytes == 3 * 6 * 7 * 2 * nbytes


def test_entries_are_kept_in_the_cache_dtype_but_norms_in_float16() -> None:
    policy = CachePolicy(4)
    widths = {"latent": 5, "rope": 2, "norm": 1}
    for dtype, norm in ((torch.bfloat16, torch.float16), (torch.float32, torch.float32)):
        cache = EntryCache(widths, policy, storage(dtype))
        kept = {(t.shape[-1], t.dtype) for t in tensors_in(cache, set())}
        assert kept == {(5, dtype), (2, dtype), (1, norm)}
        new = tuple(noise(BATCH, TOKENS, width).to(dtype) for width in widths.values())
        whole = KVCache(policy, [cache], RuntimeConfig())
        for _ in range(2):
            whole.open_chunk(1)
            read = whole.update(0, new, True).entries
            assert [part.dtype for part in read[:2]] == [dtype] * 2
            assert read[2].dtype.itemsize >= norm.itemsize
            assert same(tuple(part[:, :TOKENS] for part in read), new)
