"""Whole models, streamed: under every policy and runtime, over long rollouts, through rewinds."""

from __future__ import annotations

import dataclasses
import gc
from functools import partial
from typing import Any

import pytest
import torch
from conftest import (
    EITHER_LATENT,
    TINY_GEOMETRY,
    chunk_timesteps,
    clip_of,
    noise,
    rollout,
    tiny_clip,
    tiny_config,
    tiny_mla,
    tiny_model,
)
from reference.masks import block_causal_mask
from torch import Tensor

from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    ModelConfig,
    RuntimeConfig,
    Sizes,
)
from vmla_convert.generating.sampler import sample_chunk
from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.dit import CausalWanModel

Kind = dict[str, Any]
KINDS_BY_NAME: dict[str, Kind] = {
    "dense model": {},
    **{latent: {"mla": tiny_mla(latent)} for latent in EITHER_LATENT},
    "codec": {"codec": CodecConfig(40, Sizes(rank=40))},
}
"""Settings of a kind of model in a config."""

# Rounding may move a code: between passes that differ by it, only codecs without codes compare.
IN_BITS: dict[str, Kind] = {"codec in bits": {"codec": CodecConfig(40, Sizes(12.5))}}
KINDS, EXACT_KINDS = (
    pytest.mark.parametrize(
        "kind",
        [
            pytest.param(kind, id=name, marks=[pytest.mark.slow] if name in slow else [])
            for name, kind in kinds.items()
        ],
    )
    for kinds, slow in (
        (KINDS_BY_NAME, ["split"]),
        (KINDS_BY_NAME | IN_BITS, ["dense model", "split", "codec"]),
    )
)


def model_of(config: ModelConfig) -> CausalWanModel:
    """A model; a codec whose size is a rank stores no codes."""
    model = tiny_model(config)
    if config.codec is not None:
        model.resize(config.codec.size, quantised=config.codec.size.rank is None)
    return model


def one_layer(kind: Kind) -> dict[str, Any]:
    """Sizes of a model in which a held entry depends on its own frame only."""
    if mla := kind.get("mla"):
        first = {
            name: getattr(mla, name)[:1] for name in ("kv_lora_rank", "rope_pairs", "key_ranks")
        }
        kind = {"mla": dataclasses.replace(mla, **first)}
    return {"geometry": dataclasses.replace(TINY_GEOMETRY, num_layers=1), **kind}


def under(model: CausalWanModel, policy: CachePolicy) -> CausalWanModel:
    """The same weights under another policy."""
    other = CausalWanModel(dataclasses.replace(model.config, cache=policy))
    other.load_state_dict(model.state_dict())
    return other


def runtimes(kind: Kind) -> list[RuntimeConfig]:
    """Every backend of a model."""
    found = [RuntimeConfig(), RuntimeConfig(backend="materialised")]
    return found if "mla" not in kind else [*found, RuntimeConfig(backend="absorbed")]


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of a difference, of what the second is in size."""
    gap = (one.double() - other.double()).square().mean() / other.double().square().mean()
    return gap.sqrt().item()


# Streamed is masked


POLICIES = [
    # policy, chunk, batch; all evict
    (CachePolicy(7, 2), 2, 2),
    (CachePolicy(5, 1), 1, 1),
    (CachePolicy(6, 0, "relative"), 3, 1),
]


@KINDS
@pytest.mark.parametrize(
    ("policy", "chunk", "batch"),
    POLICIES,
    ids=[f"{p.window_frames}-{p.sink_frames}-{chunk}" for p, chunk, _ in POLICIES],
)
@torch.no_grad()
def test_streaming_equals_the_masked_pass(
    kind: Kind, policy: CachePolicy, chunk: int, batch: int
) -> None:
    """Without a sink relative positions are those of the clip, up to a shift."""
    config = tiny_config(cache=policy, **kind, chunk_frames=chunk)
    model = model_of(config)
    frames = {1: 7, 2: 8, 3: 9}[chunk]
    latents, timestep, context = clip_of(config, frames, batch)
    mask = block_causal_mask(frames, chunk, config.tokens_per_frame, policy)
    masked = model(latents, timestep, context, torch.arange(frames), mask)
    for runtime in runtimes(kind):
        streamed = rollout(model, latents, timestep, context, runtime)
        torch.testing.assert_close(streamed, masked, atol=2e-5, rtol=0)


@KINDS
@torch.no_grad()
def test_behind_a_sink_relative_positions_are_those_of_a_clip_of_the_held_frames(
    kind: Kind,
) -> None:
    policy = CachePolicy(6, 2, "relative")
    config = tiny_config(cache=policy, **one_layer(kind))
    model = model_of(config)
    latents, timestep, context = clip_of(config, 10)
    held = [0, 1, 6, 7, 8, 9]
    mask = block_causal_mask(6, 2, config.tokens_per_frame, policy)
    again = model(latents[:, held], timestep[:, held], context, torch.arange(6), mask)
    for runtime in runtimes(kind):
        streamed = rollout(model, latents, timestep, context, runtime)
        torch.testing.assert_close(streamed[:, -2:], again[:, -2:], atol=2e-5, rtol=0)


# Denoising steps


@EXACT_KINDS
@pytest.mark.parametrize("kept", [False, True])
@torch.no_grad()
def test_earlier_passes_over_a_chunk_leave_no_trace(kind: Kind, kept: bool) -> None:
    """Passes that are not kept, and kept ones that the next pass overwrites."""
    config = tiny_config(cache=CachePolicy(6, 1), **kind)
    model = model_of(config)
    clip = clip_of(config, 6)
    again = rollout(model, *clip, between=1, keep_between=kept)
    assert torch.equal(again, rollout(model, *clip))


@EXACT_KINDS
@torch.no_grad()
def test_a_sampled_chunk_leaves_what_a_pass_over_its_clean_latents_leaves(
    kind: Kind,
) -> None:
    config = tiny_config(cache=CachePolicy(6, 1), **kind)
    model = model_of(config)
    latents, timestep, context = clip_of(config, 2)
    prompt, generator = model.project_prompt(context), torch.Generator().manual_seed(0)
    sampled, clean = model.new_cache(2), model.new_cache(2)
    for seed in range(2):
        start = noise(*latents.shape, seed=seed)
        for cache in (sampled, clean):
            cache.open_chunk(2)
        draw = partial(torch.randn, start.shape, generator=generator)
        x = sample_chunk(model, start, prompt, sampled, draw)
        model.stream(x, torch.zeros_like(timestep), prompt, clean)
    following = [rollout(model, latents, timestep, context, cache) for cache in (sampled, clean)]
    assert torch.equal(*following)


# Long rollouts


def started_after(model: CausalWanModel, frames: int, batch: int) -> KVCache:
    """An empty cache that has seen many frames, and forgot them."""
    cache = model.new_cache(batch)
    for _ in range(frames):
        cache.open_chunk(1)
    cache.rewind(0, keep_sink=False)
    assert cache.window.next_frame == frames
    return cache


@KINDS
@torch.no_grad()
def test_the_start_of_a_clip_does_not_matter(kind: Kind) -> None:
    """Relative positions are the same; absolute ones differ by rounding alone."""
    frames = 3_000
    model = model_of(tiny_config(cache=CachePolicy(6, 2), **kind))
    relative = under(model, CachePolicy(6, 2, "relative"))
    clip = clip_of(model.config, 10)
    here = rollout(relative, *clip)
    assert torch.equal(rollout(relative, *clip, started_after(relative, frames, 2)), here)
    far = rollout(model, *clip, started_after(model, frames, 2))
    torch.testing.assert_close(far, rollout(model, *clip), atol=1e-4, rtol=0)


def live_bytes() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    return sum(held.nbytes for held in gc.get_objects() if type(held) is Tensor)


@pytest.mark.slow
@EXACT_KINDS
@torch.no_grad()
def test_sixty_frames_take_no_more_than_the_first_ones(kind: Kind) -> None:
    policy = CachePolicy(6, 1, "relative")
    model = model_of(tiny_config(cache=policy, **kind, latent_size=(2, 2)))
    latents, timestep, context = clip_of(model.config, 2, batch=1)
    cache, prompt = model.new_cache(1), model.project_prompt(context)
    sizes: list[tuple[int, int]] = []
    for chunk in range(30):
        cache.open_chunk(2)
        velocity = model.stream(latents, timestep, prompt, cache, keep=False)
        model.stream(latents - 0.1 * velocity, 0 * timestep, prompt, cache)
        assert velocity.isfinite().all()
        if chunk in (5, 29):
            sizes.append((cache.nbytes, live_bytes()))
    assert cache.window.next_frame == 60
    assert len({*sizes}) == 1


# Rewinding


def future(model: CausalWanModel, cache: KVCache, batch: int = 2) -> Tensor:
    """Velocities of the four frames that come next."""
    config = model.config
    latents, context = tiny_clip(config, 4, batch, seed=30)
    return rollout(model, latents, chunk_timesteps(config, 4, batch), context, cache)


@KINDS
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@torch.no_grad()
def test_frames_written_again_behind_the_sink_are_as_if_they_had_never_gone(
    kind: Kind, positions: Any
) -> None:
    """After evictions, where entries depend on their own frame only."""
    policy = CachePolicy(6, 2, positions)
    model = model_of(tiny_config(cache=policy, **one_layer(kind)))
    latents, timestep, context = clip_of(model.config, 10)
    caches = [model.new_cache(2) for _ in range(3)]
    for cache in caches:
        rollout(model, latents, timestep, context, cache)
    rewritten, other = caches[1:]
    for cache, clip in ((rewritten, latents[:, 6:]), (other, latents[:, 6:].flip(1))):
        cache.rewind(4)
        rollout(model, clip, timestep[:, 6:], context, cache)
    uninterrupted = future(model, caches[0])
    torch.testing.assert_close(future(model, rewritten), uninterrupted, atol=1e-5, rtol=0)
    assert (future(model, other) - uninterrupted).abs().max() > 1e-2


@EXACT_KINDS
@torch.no_grad()
def test_without_the_sink_the_first_frames_written_again_become_it(kind: Kind) -> None:
    """The old content leaves no trace: a new cache gives the same."""
    model = model_of(tiny_config(cache=CachePolicy(6, 2, "relative"), **kind))
    latents, timestep, context = clip_of(model.config, 10)
    cache, new, kept = (model.new_cache(2) for _ in range(3))
    for old in (cache, kept):
        rollout(model, latents, timestep, context, old)
    cache.rewind(8, keep_sink=False)
    kept.rewind(8, keep_sink=True)
    parts = latents[:, 2:], timestep[:, 2:], context
    again = rollout(model, *parts, cache)
    assert torch.equal(again, rollout(model, *parts, new))
    assert torch.equal(future(model, cache), future(model, new))
    assert (again - rollout(model, *parts, kept)).abs().max() > 1e-2


# Precision and place


@KINDS
@torch.no_grad()
def test_a_bf16_model_streams_with_a_cache_in_any_place(kind: Kind) -> None:
    model = model_of(tiny_config(cache=CachePolicy(6, 2), **kind))
    latents, timestep, context = clip_of(model.config, 10)
    exact = rollout(model, latents, timestep, context)
    clip = latents.bfloat16(), timestep, context.bfloat16()
    low = model.bfloat16()
    velocity = rollout(low, *clip)
    assert velocity.dtype == torch.bfloat16
    assert distance(velocity, exact) < 0.03
    assert torch.equal(rollout(low, *clip, RuntimeConfig(offload=True)), velocity)
