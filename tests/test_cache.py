"""The caches against a plain list of frames: what is read, in which order, and at what bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import EVERY_LAYER, fitting, layer_id, noise, tiny_config, tiny_mla, tiny_model
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

from vmla_convert.config import CachePolicy, RuntimeConfig
from vmla_convert.layers import cache as cache_module
from vmla_convert.layers.attention import Projection, Reading
from vmla_convert.layers.cache import DenseCache, KVCache, LatentCache, Storage
from vmla_convert.maths.quant import fit_code, pack, unpack

BATCH, TOKENS, DENSE_WIDTH = 2, 3, 6
CPU = torch.device("cpu")
# Layers differ in what they keep, and layers of a kind in their widths.
DENSE_WIDTHS = [{"key": 4, "value": 4}, {"key": 6, "value": 5}]
LATENT_WIDTHS = [{"latent": 5, "rope": 2, "norm": 1}, {"latent": 3}]
CACHE_DTYPES = [
    RuntimeConfig(cache_dtype=cache_dtype, rope_dtype=rope_dtype)
    for cache_dtype in ("model", "int8", "int4")
    for rope_dtype in ("model", "int8")
]


def storage(dtype: torch.dtype = torch.float32, offload: bool = False) -> Storage:
    return Storage(BATCH, TOKENS, dtype, CPU, offload)


def unit(samples: Tensor) -> Tensor:
    return torch.eye(samples.shape[1])


def latent_cache(
    widths: dict[str, int],
    policy: CachePolicy,
    runtime: RuntimeConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> LatentCache:
    runtime = runtime or RuntimeConfig()
    return LatentCache(widths, DENSE_WIDTH, policy, storage(dtype, runtime.offload), runtime, unit)


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


# A ring buffer is a list of frames


class Caches(RuleBasedStateMachine):
    """Caches of every kind and a list of frames, through chunks, denoising steps and rewinds.

    Layers 0 and 1 are dense, 2 and 3 latent with a dense chunk, and 4 and 5, where nothing stays
    dense, latent throughout. `written` tells the version of a frame that the last pass wrote, and
    `kept` that of the last pass that was kept.
    """

    @initialize(
        sink=st.integers(0, 2),
        room=st.integers(1, 5),
        dense=st.integers(0, 3),
        offload=st.booleans(),
    )
    def start(self, sink: int, room: int, dense: int, offload: bool) -> None:
        dense = min(dense, room - 1)
        policy = CachePolicy(sink + room, sink, dense_recent_frames=dense)
        runtime = RuntimeConfig(offload=offload)
        latent = LATENT_WIDTHS * (1 if dense else 2)
        self.cache = KVCache(
            policy,
            [
                *(DenseCache(widths, policy, storage(offload=offload)) for widths in DENSE_WIDTHS),
                *(latent_cache(widths, policy, runtime) for widths in latent),
            ],
        )
        self.room, self.naive = room, NaiveWindow(policy.window_frames, sink, dense)
        self.slots: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self.passes, self.chunk_is_kept = 0, True
        self.widths = [
            [*widths.values()] for widths in (*DENSE_WIDTHS, *LATENT_WIDTHS, *LATENT_WIDTHS)
        ]

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

    # A chunk that reads dense frames is kept once.
    @precondition(lambda self: self.naive.chunk and not (self.chunk_is_kept and self.naive.recent))
    @rule(keep=st.booleans())
    def denoise(self, keep: bool) -> None:
        """One pass of the open chunk through all layers."""
        self.passes += 1
        self.written.update(dict.fromkeys(self.naive.chunk, self.passes))
        latent_layers = 2 if self.naive.dense_recent else 4
        for layer in range(2 + latent_layers):
            if layer < 2:
                self.read_dense(layer, keep)
            else:
                self.read_latent(layer, keep, own_is_dense=layer < 4)
        if keep:
            self.kept.update(dict.fromkeys(self.naive.chunk, self.passes))
            self.chunk_is_kept = True

    def read_dense(self, layer: int, keep: bool) -> None:
        window, widths = self.cache.window, self.widths[layer]
        new = entries(self.naive.chunk, widths, [self.passes] * len(self.naive.chunk))
        reading = self.cache.update(layer, Projection(new, keep=keep))
        held = [self.slots[slot] for slot in range(window.held)]
        assert same(reading.entries, entries(held, widths, [self.written[f] for f in held]))
        assert reading.exact is None

    def read_latent(self, layer: int, keep: bool, own_is_dense: bool) -> None:
        window, widths, chunk = self.cache.window, self.widths[layer], self.naive.chunk
        now = [self.passes] * len(chunk)
        new = entries(chunk, widths, now)
        past = [self.slots[slot] for slot in window.latent_slots]
        before = [self.kept[f] for f in past]
        if not own_is_dense:
            reading = self.cache.update(layer, Projection(new, keep=keep))
            assert same(reading.entries, entries(past + chunk, widths, before + now))
            assert reading.exact is None
            return
        dense_widths = [DENSE_WIDTH] * 2
        own = entries(chunk, dense_widths, now, first_kind=4)
        reading = self.cache.update(layer, Projection(new if keep else (), own, keep))
        assert same(reading.entries, entries(past, widths, before))
        recent = self.naive.recent
        versions = [self.kept[f] for f in recent] + now
        assert reading.exact is not None
        assert same(reading.exact, entries(recent + chunk, dense_widths, versions, first_kind=4))

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
    cache, places = KVCache(policy, [DenseCache({"key": 4}, policy, storage())]), set[int]()
    for count in (2, 4, 5, 5):
        cache.open_chunk(2)
        for keep in (False, True):
            (held,) = cache.update(0, Projection((torch.ones(BATCH, 2 * TOKENS, 4),), keep=keep))[0]
            assert held.shape == (BATCH, count * TOKENS, 4)
            assert held._is_view()
            places.add(held.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("runtime", CACHE_DTYPES, ids=lambda r: f"{r.cache_dtype}-{r.rope_dtype}")
def test_an_open_chunk_reads_its_own_entries_as_they_are(runtime: RuntimeConfig) -> None:
    policy = CachePolicy(4)
    whole = KVCache(policy, [latent_cache({"latent": 5, "rope": 2}, policy, runtime)])
    split = KVCache(policy, [latent_cache({"latent": 5, "rope": 2}, policy, runtime)])
    for seed in range(4):
        new = noise(BATCH, TOKENS, 5, seed=seed), noise(BATCH, TOKENS, 2, seed=10 + seed)
        own = noise(BATCH, TOKENS, DENSE_WIDTH, seed=20 + seed), new[1]
        for cache in (whole, split):
            cache.open_chunk(1)
        for _ in range(2):
            latest = [
                old_and_new[:, -TOKENS:] for old_and_new in whole.update(0, Projection(new))[0]
            ]
            assert same(tuple(latest), new)
            exact = split.update(0, Projection(new, own)).exact
            assert exact is not None
            assert all(a is b for a, b in zip(exact, own, strict=True))


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


@pytest.mark.parametrize("layer", [None, *EVERY_LAYER], ids=lambda k: layer_id(k) if k else "dense")
def test_a_cache_takes_the_bytes_that_its_config_says(layer: Any) -> None:
    """For every kind of layer, cache and rope dtype, model dtype and number of dense frames."""
    mla = tiny_mla(layer) if layer else None
    own_is_dense = mla and mla.layer.current_chunk == "dense"
    for dense in (0, 1, 3) if own_is_dense else (0,):
        config = tiny_config(cache=CachePolicy(7, 2, dense_recent_frames=dense), mla=mla)
        model = tiny_model(config)
        for size in (4, 2):
            for asked in CACHE_DTYPES if mla else CACHE_DTYPES[:1]:
                runtime = fitting(asked, mla)
                cache = model.new_cache(3, runtime)
                assert cache.nbytes == config.cache_bytes(7, 3, size, runtime) == allocated(cache)
                offloaded = model.new_cache(3, dataclasses.replace(runtime, offload=True))
                assert offloaded.nbytes == cache.nbytes == allocated(offloaded)
            model = model.bfloat16()


def test_the_bytes_of_a_token_by_hand() -> None:
    """Two frames of three tokens, one of them dense: codes of 5 and 2 numbers, and their scales."""
    policy = CachePolicy(2, dense_recent_frames=1)
    widths = {"latent": 5, "rope": 2, "norm": 1}
    for runtime, size in (
        (RuntimeConfig(), 4 * 8),
        (RuntimeConfig(cache_dtype="int8"), (5 + 2) + 4 * 2 + 4),
        (RuntimeConfig(cache_dtype="int4", rope_dtype="int8"), (3 + 2) + (2 + 2) + 4),
    ):
        dense = 2 * DENSE_WIDTH * 4
        expected = BATCH * TOKENS * (2 * size + dense)
        assert latent_cache(widths, policy, runtime).nbytes == expected


def test_a_cache_does_not_grow() -> None:
    """But for the code of each quantised entry, which is made once."""
    policy, runtime = CachePolicy(4, 1, dense_recent_frames=1), RuntimeConfig(cache_dtype="int4")
    cache = KVCache(policy, [latent_cache({"latent": 5, "norm": 1}, policy, runtime)])
    sizes: list[int] = []
    for seed in range(8):
        cache.open_chunk(2)
        new = noise(BATCH, 2 * TOKENS, 5, seed=seed), noise(BATCH, 2 * TOKENS, 1, seed=seed)
        own = (noise(BATCH, 2 * TOKENS, DENSE_WIDTH, seed=seed),) * 2
        cache.update(0, Projection(new, own))
        sizes.append(allocated(cache))
        if seed == 5:
            cache.rewind(4, keep_sink=True)
    assert {*sizes[1:]} == {sizes[1]}
    # Mean, costs, analysis and synthesis in float32; widths in int64.
    assert sizes[0] - cache.nbytes == 4 * (5 + 5 + 2 * 5 * 5) + 8 * 5


def test_entries_are_kept_in_the_cache_dtype_but_norms_in_float16() -> None:
    policy = CachePolicy(4)
    widths = {"latent": 5, "rope": 2, "norm": 1}
    for dtype, norm in ((torch.bfloat16, torch.float16), (torch.float32, torch.float32)):
        cache = latent_cache(widths, policy, dtype=dtype)
        kept = {(t.shape[-1], t.dtype) for t in tensors_in(cache, set())}
        assert kept == {(5, dtype), (2, dtype), (1, norm)}
        new = tuple(noise(BATCH, TOKENS, width).to(dtype) for width in widths.values())
        whole = KVCache(policy, [cache])
        for _ in range(2):
            whole.open_chunk(1)
            read = whole.update(0, Projection(new)).entries
            assert [part.dtype for part in read[:2]] == [dtype] * 2
            assert read[2].dtype.itemsize >= norm.itemsize
            assert same(tuple(part[:, :TOKENS] for part in read), new)


# Quantised entries


def steep_latents(seed: int, tokens: int = 4 * TOKENS, width: int = 12) -> Tensor:
    """(B, L, width) of channels that vary ever less, in a fixed random basis, off zero."""
    basis = torch.linalg.qr(noise(width, width, seed=99)).Q
    deviations = 10 ** -torch.linspace(0, 1.5, width)
    return noise(BATCH, tokens, width, seed=seed) * deviations @ basis + noise(width, seed=98)


def stretched(samples: Tensor) -> Tensor:
    """A metric that is not the identity, and depends on what it is asked for."""
    weight = torch.linspace(1, 3, samples.shape[1]).double()
    return torch.diag(weight) + samples.double().mean(0).square().diag()


def coded(runtime: RuntimeConfig, policy: CachePolicy) -> KVCache:
    widths = {"latent": 12, "rope": 4, "norm": 1}
    layer = LatentCache(widths, DENSE_WIDTH, policy, storage(), runtime, stretched)
    return KVCache(policy, [layer])


def coded_entries(seed: int) -> tuple[Tensor, ...]:
    return (
        steep_latents(seed),
        steep_latents(100 + seed, width=4),
        noise(BATCH, 4 * TOKENS, 1, seed=200 + seed),
    )


def rollout(cache: KVCache, chunks: int) -> list[Reading]:
    """What each chunk of four frames reads in its last pass; earlier ones see something else."""
    readings: list[Reading] = []
    for seed in range(chunks):
        cache.open_chunk(4)
        cache.update(0, Projection(coded_entries(50 + seed), keep=False))
        readings.append(cache.update(0, Projection(coded_entries(seed))))
    return readings


@pytest.mark.parametrize(("cache_dtype", "bits", "most"), [("int8", 8, 0.01), ("int4", 4, 0.15)])
def test_a_past_chunk_is_what_its_code_says(cache_dtype: str, bits: int, most: float) -> None:
    """By a code fitted to the first chunk that was kept, in the metric of the layer."""
    assert cache_dtype in ("int8", "int4")
    runtime = RuntimeConfig(cache_dtype=cache_dtype, rope_dtype="int8")
    readings = rollout(coded(runtime, CachePolicy(12)), 3)
    first_latents, first_ropes = (part.flatten(0, 1) for part in coded_entries(0)[:2])
    codes = (
        fit_code(first_latents, stretched(first_latents), bits),
        fit_code(first_ropes, torch.eye(4), 8),
    )
    for which, reading in enumerate(readings):
        latents, ropes, norms = reading.entries
        for seed in range(which):
            past = slice(4 * TOKENS * seed, 4 * TOKENS * (seed + 1))
            right = coded_entries(seed)
            for code, now, before in zip(codes, (latents, ropes), right[:2], strict=True):
                expected = unpack(code, pack(code, before), torch.float32)
                torch.testing.assert_close(now[:, past], expected, atol=1e-5, rtol=0)
            varied = (right[0] - right[0].mean(1, keepdim=True)).square().mean()
            wrong = (latents[:, past] - right[0]).square().mean()
            assert 0 < wrong < most**2 * varied
            assert torch.equal(norms[:, past], right[2])
        assert same(tuple(part[:, -4 * TOKENS :] for part in reading.entries), coded_entries(which))


def test_a_code_is_fitted_once_to_what_is_kept_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[Tensor, int]] = []

    def note(latents: Tensor, metric: Tensor, bits: int) -> Any:
        fitted.append((latents, bits))
        return fit_code(latents, metric, bits)

    monkeypatch.setattr(cache_module, "fit_code", note)
    cache = coded(RuntimeConfig(cache_dtype="int4", rope_dtype="int8"), CachePolicy(8, 2))
    rollout(cache, 3)
    cache.rewind(8, keep_sink=False)
    rollout(cache, 2)
    assert [bits for _, bits in fitted] == [4, 8]
    for (samples, _), first in zip(fitted, coded_entries(0)[:2], strict=True):
        assert torch.equal(samples, first.flatten(0, 1))


@pytest.mark.parametrize("runtime", CACHE_DTYPES, ids=lambda r: f"{r.cache_dtype}-{r.rope_dtype}")
def test_an_offloaded_cache_reads_the_same(runtime: RuntimeConfig) -> None:
    policy = CachePolicy(10, 2)
    here = rollout(coded(runtime, policy), 4)
    offloaded = rollout(coded(dataclasses.replace(runtime, offload=True), policy), 4)
    for one, other in zip(here, offloaded, strict=True):
        assert same(one.entries, other.entries)
        assert {part.device for part in other.entries} == {CPU}
