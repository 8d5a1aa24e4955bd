"""The caches against a plain list of frames: what is read, in which order, and at what bytes."""

from __future__ import annotations

from typing import Any

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

from vmla_convert.config import CachePolicy, MLAConfig, RuntimeConfig
from vmla_convert.layers.cache import DenseCache, KVCache, LatentCache, Storage

BATCH, TOKENS = 2, 3
CPU = torch.device("cpu")
# Layers differ in what they keep, and layers of a kind in their widths.
DENSE_WIDTHS = [(4, 4), (6, 5)]
LATENT_WIDTHS = [{"latent": 5, "rope": 2, "norm": 1}, {"latent": 3}]


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


def latent_cache(widths: dict[str, int], policy: CachePolicy) -> KVCache:
    """The cache of one latent layer."""
    return KVCache(policy, [LatentCache(widths, policy, storage())], RuntimeConfig())


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# A ring buffer is a list of frames


class Caches(RuleBasedStateMachine):
    """Caches of every kind and a list of frames, through chunks, denoising steps and rewinds.

    Layers 0 and 1 are dense, 2 and 3 latent. `written` tells the version of a frame that the last
    pass wrote, and `kept` that of the last pass that was kept.
    """

    @initialize(sink=st.integers(0, 2), room=st.integers(1, 5), offload=st.booleans())
    def start(self, sink: int, room: int, offload: bool) -> None:
        policy, kept = CachePolicy(sink + room, sink), storage(offload=offload)
        self.cache = KVCache(
            policy,
            [
                *(DenseCache(widths, policy, kept) for widths in DENSE_WIDTHS),
                *(LatentCache(widths, policy, kept) for widths in LATENT_WIDTHS),
            ],
            RuntimeConfig(),
        )
        self.room, self.naive = room, NaiveWindow(policy.window_frames, sink)
        self.slots: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self.passes, self.chunk_is_kept = 0, True
        self.widths = [*map(list, DENSE_WIDTHS), *([*w.values()] for w in LATENT_WIDTHS)]

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
        for layer in range(4):
            if layer < 2:
                self.read_dense(layer, keep)
            else:
                self.read_latent(layer, keep)
        if keep:
            self.kept.update(dict.fromkeys(self.naive.chunk, self.passes))
            self.chunk_is_kept = True

    def read_dense(self, layer: int, keep: bool) -> None:
        window, widths = self.cache.window, self.widths[layer]
        new = entries(self.naive.chunk, widths, [self.passes] * len(self.naive.chunk))
        reading = self.cache.update(layer, new, keep)
        held = [self.slots[slot] for slot in range(window.held)]
        assert same(reading.entries, entries(held, widths, [self.written[f] for f in held]))
        assert reading.past is None

    def read_latent(self, layer: int, keep: bool) -> None:
        window, widths, chunk = self.cache.window, self.widths[layer], self.naive.chunk
        now = [self.passes] * len(chunk)
        new = entries(chunk, widths, now)
        past = [self.slots[slot] for slot in window.past_slots]
        before = [self.kept[f] for f in past]
        reading = self.cache.update(layer, new, keep)
        assert same(reading.entries, entries(past + chunk, widths, before + now))
        assert reading.past is None

    @invariant()
    def no_other_frames_are_held(self) -> None:
        held = [self.slots[slot] for slot in range(self.cache.window.held)]
        assert sorted(held) == self.naive.held


TestCaches = Caches.TestCase
TestCaches.settings = settings(
    derandomize=True, deadline=None, max_examples=40, stateful_step_count=40
)


# What is read without work


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_dense_read_is_a_view_of_all_slots_in_use(positions: str) -> None:
    assert positions in ("absolute", "relative")
    policy = CachePolicy(5, 1, positions)
    cache = KVCache(policy, [DenseCache((4,), policy, storage())], RuntimeConfig())
    places = set[int]()
    for count in (2, 4, 5, 5):
        cache.open_chunk(2)
        for keep in (False, True):
            (held,) = cache.update(0, (torch.ones(BATCH, 2 * TOKENS, 4),), keep).entries
            assert held.shape == (BATCH, count * TOKENS, 4)
            assert held._is_view()
            places.add(held.data_ptr())
    assert len(places) == 1


def test_an_open_chunk_reads_its_own_entries_as_they_are() -> None:
    policy = CachePolicy(4)
    cache = latent_cache({"latent": 5, "rope": 2}, policy)
    for seed in range(4):
        new = noise(BATCH, TOKENS, 5, seed=seed), noise(BATCH, TOKENS, 2, seed=10 + seed)
        cache.open_chunk(1)
        for _ in range(2):
            read = cache.update(0, new, True).entries
            assert same(tuple(entry[:, -TOKENS:] for entry in read), new)


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


@pytest.mark.parametrize("mla", [None, TINY_MLA, tiny_mla("split")])
def test_a_cache_takes_the_bytes_that_its_config_says(mla: MLAConfig | None) -> None:
    """For every kind of layer, place and model dtype."""
    config = tiny_config(cache=CachePolicy(7, 2), mla=mla)
    model = tiny_model(config)
    for size in (4, 2):
        for offload in (False, True):
            runtime = RuntimeConfig(offload=offload)
            cache = model.new_cache(3, runtime)
            assert cache.nbytes == model.cache_bytes(3, runtime) == allocated(cache)
            assert cache.nbytes == config.cache_bytes(7, 3) * size // 2
        model = model.bfloat16()


def test_the_bytes_of_a_token_by_hand() -> None:
    """Two frames of three tokens of eight numbers."""
    widths = {"latent": 5, "rope": 2, "norm": 1}
    cache = LatentCache(widths, CachePolicy(2), storage())
    assert cache.nbytes == BATCH * TOKENS * 2 * 4 * 8


def test_a_cache_does_not_grow() -> None:
    policy = CachePolicy(4, 1)
    cache = latent_cache({"latent": 5, "norm": 1}, policy)
    sizes: set[int] = set()
    for seed in range(8):
        cache.open_chunk(2)
        new = noise(BATCH, 2 * TOKENS, 5, seed=seed), noise(BATCH, 2 * TOKENS, 1, seed=seed)
        cache.update(0, new, True)
        sizes.add(allocated(cache))
        if seed == 5:
            cache.rewind(4, keep_sink=True)
    assert sizes == {cache.nbytes}


def test_entries_are_kept_in_the_cache_dtype_but_norms_in_float16() -> None:
    policy = CachePolicy(4)
    widths = {"latent": 5, "rope": 2, "norm": 1}
    for dtype, norm in ((torch.bfloat16, torch.float16), (torch.float32, torch.float32)):
        cache = LatentCache(widths, policy, storage(dtype))
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
