"""The dense cache in a few bits per number: how wrong it is, what it takes, and that it stays."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from conftest import (
    TINY_GEOMETRY,
    TINY_MLA,
    clip_of,
    noise,
    rollout,
    tiny_config,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmla_convert.config import DENSE_BITS, CachePolicy, CodecConfig, RuntimeConfig, Sizes
from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import split_heads
from vmla_convert.layers.cache import KVCache, Storage
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.quantised import QuantisedStore, fit_grid, from_codes, to_codes

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 3, 2, 6
WIDTH = HEADS * HEAD_DIM
HALF_ROUNDING = 2.0**-11  # of a float16, relative
BITS = [*DENSE_BITS.values()]
CacheDtype = Literal["int8", "int4", "int3", "int2"]
DTYPES: tuple[CacheDtype, ...] = ("int8", "int4", "int3", "int2")
repeatable = settings(derandomize=True, deadline=None, max_examples=15)


def store(bits: int, slots: int = 6, dtype: torch.dtype = torch.float32) -> QuantisedStore:
    return QuantisedStore(HEADS, WIDTH, bits, slots, Storage(BATCH, TOKENS, dtype))


def chunk(frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, L, d); channels of keys and tokens of values differ in size and mean."""
    shape = BATCH, frames * TOKENS, WIDTH
    key = noise(*shape, seed=seed) * torch.logspace(-2, 1, WIDTH) + 5 * noise(WIDTH, seed=1)
    return key, noise(*shape, seed=seed + 1) * torch.logspace(-1, 1, shape[1])[:, None] + 1


def kept(held: QuantisedStore, slots: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values (B, L, d) that a store rebuilds."""
    past = held.past(slots)
    assert past.tokens == TOKENS * len(slots)
    key, value = past.heads(slice(0, HEADS))
    return key.flatten(2), value.flatten(2)


def allowed(x: Tensor, dim: int, bits: int) -> Tensor:
    """Half a step of the grid over a dimension, and what float16 rounds of its ends."""
    least, most = x.amin(dim, True), x.amax(dim, True)
    step = (most - least) / (2**bits - 1)
    return step / 2 + HALF_ROUNDING * (least.abs() + most - least) + 2.0**-25 * 2**bits


# How wrong


@given(
    st.sampled_from([1, *BITS]),
    st.integers(0, 99),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.floats(-50, 50),
)
@repeatable
def test_a_number_is_wrong_by_half_a_step_at_most(
    bits: int, seed: int, size: float, mean: float
) -> None:
    x = size * noise(3, 7, 5, seed=seed) + mean
    for dim in (1, -1):
        grid = fit_grid(x, dim, bits)
        codes = to_codes(x, grid, bits)
        assert codes.min() >= 0 and codes.max() < 2**bits
        assert ((from_codes(codes, grid) - x).abs() <= allowed(x, dim, bits)).all()


def test_numbers_that_are_all_alike_come_back() -> None:
    x = torch.full((2, 4, 3), 0.75)
    grid = fit_grid(x, 1, 2)
    assert torch.equal(from_codes(to_codes(x, grid, 2), grid), x)


@pytest.mark.parametrize("bits", BITS)
def test_keys_have_a_grid_for_each_channel_and_values_for_each_head_of_a_token(bits: int) -> None:
    held, (key, value) = store(bits), chunk(2, 0)
    held.write([3, 1], key, value)
    got_key, got_value = kept(held, [3, 1])
    assert ((got_key - key).abs() <= allowed(key, 1, bits)).all()
    by_head = split_heads(value, HEADS)
    gap = (split_heads(got_value, HEADS) - by_head).abs()
    assert (gap <= allowed(by_head, -1, bits)).all()
    # The ends of each grid are met: no grid is wider than it must be.
    for one, other, dim in ((got_key, key, 1), (got_value.unflatten(-1, (HEADS, -1)), by_head, -1)):
        for end in (torch.amin, torch.amax):
            torch.testing.assert_close(end(one, dim), end(other, dim), rtol=2e-3, atol=2e-3)


def streamed(
    model: CausalWanModel, frames: int, runtime: RuntimeConfig | None = None
) -> tuple[Tensor, KVCache]:
    """Velocities of a clip, and the cache after it."""
    latents, timestep, context = clip_of(model.config, frames)
    latents, context = (x.to(model.patch_embedding.weight.dtype) for x in (latents, context))
    cache = model.new_cache(2, runtime)
    return rollout(model, latents, timestep, context, cache), cache


def test_more_bits_are_nearer_to_the_dense_model() -> None:
    model = tiny_model(tiny_config(cache=CachePolicy(6, 1, "relative")))
    exact, _ = streamed(model, 8)
    errors = [
        (streamed(model, 8, RuntimeConfig(cache_dtype=dtype))[0] - exact).square().mean().item()
        for dtype in DTYPES
    ]
    assert 0 < errors[0] < errors[1] / 20 < errors[2] / 60
    assert errors[2] < errors[3] / 2
    # The first chunk attends to itself alone.
    first = streamed(model, 8, RuntimeConfig(cache_dtype="int2"))[0][:, :2]
    torch.testing.assert_close(first, exact[:, :2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int2"])
def test_host_memory_and_dense_frames_change_what_they_should(dtype: CacheDtype) -> None:
    model = tiny_model(tiny_config(cache=CachePolicy(6)))
    near, _ = streamed(model, 8, RuntimeConfig(cache_dtype=dtype))
    away, _ = streamed(model, 8, RuntimeConfig(cache_dtype=dtype, offload=True))
    assert torch.equal(near, away)
    recent = CausalWanModel(
        dataclasses.replace(model.config, cache=CachePolicy(6, dense_recent_frames=4))
    )
    recent.load_state_dict(model.state_dict())
    exact, _ = streamed(model, 8)
    covered, _ = streamed(recent, 8, RuntimeConfig(cache_dtype=dtype))
    torch.testing.assert_close(covered, exact, rtol=0, atol=1e-5)


# What it takes


@pytest.mark.parametrize("dtype", ["int8", "int3"])
@pytest.mark.parametrize(
    ("policy", "chunk_frames"), [(CachePolicy(6, 2), 2), (CachePolicy(4, 1), 1)]
)
def test_a_full_window_of_whole_chunks_takes_the_bytes_of_the_formula(
    dtype: CacheDtype, policy: CachePolicy, chunk_frames: int
) -> None:
    config = tiny_config(cache=policy, chunk_frames=chunk_frames)
    runtime = RuntimeConfig(cache_dtype=dtype)
    tokens = 2 * policy.window_frames * config.tokens_per_frame * TINY_GEOMETRY.num_layers
    expected = config.cache_bytes_per_token(runtime) * tokens
    for model in (tiny_model(config), tiny_model(config).bfloat16()):
        _, cache = streamed(model, policy.window_frames, runtime)
        assert cache.nbytes == pytest.approx(expected, abs=1e-6)
        assert model.cache_bytes(2, runtime) == cache.nbytes
        assert config.cache_bytes(policy.window_frames, 2, runtime) == cache.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_dense_caches_are_quantised(dtype: CacheDtype) -> None:
    for config in (tiny_config(mla=TINY_MLA), tiny_config(codec=CodecConfig(20, Sizes(20)))):
        with pytest.raises(ConfigError) as caught:
            CausalWanModel(config).new_cache(1, RuntimeConfig(cache_dtype=dtype))
        assert caught.value.hint
