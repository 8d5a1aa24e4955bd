"""Tiny models whose every parameter matters, shared by all tests: `from conftest import …`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    Geometry,
    MLAConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
)
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.block import Block, SelfAttention
from vmla_convert.layers.cache import KVCache
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.attention_stats import AttentionStats
from vmla_convert.maths.codec import CodecFit, fit_codec
from vmla_convert.maths.moments import measure_moments

WIDE_WINDOW = CachePolicy(window_frames=64)
TINY_GEOMETRY = Geometry(
    dim=48,
    ffn_dim=64,
    num_heads=3,  # of 8 RoPE pairs: 4 for time, 2 for height, 2 for width
    num_layers=2,
    in_dim=4,
    out_dim=4,
    freq_dim=16,
    text_dim=5,
    text_len=3,
)
# Ranks and pairs differ between layers; a pair repeats; all three axes take part.
TINY_MLA = MLAConfig(
    kv_lora_rank=(16, 10), rope_pairs=((0, 1, 4, 6), (2, 5, 7, 0, 0)), init="random"
)
Latent = Literal["joint", "split"]
EITHER_LATENT: tuple[Latent, ...] = ("joint", "split")


@pytest.fixture(scope="session", autouse=True)
def _clips_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep clips that tests make out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("clips")
        patch.setattr("vmla_convert.generating.clip_sets.DEFAULT_FOLDER", place)
        yield


def tiny_mla(latent: Latent = "joint") -> MLAConfig:
    """The sizes of TINY_MLA for either latent; parts of a split one differ."""
    return dataclasses.replace(
        TINY_MLA, latent=latent, key_ranks=(9, 4) if latent == "split" else ()
    )


def tiny_config(
    geometry: Geometry = TINY_GEOMETRY,
    cache: CachePolicy = WIDE_WINDOW,
    mla: MLAConfig | None = None,
    chunk_frames: int = 2,
    latent_size: tuple[int, int] = (4, 6),
    codec: CodecConfig | None = None,
) -> ModelConfig:
    """A model of two small layers over frames of 2 x 3 tokens."""
    return ModelConfig(
        geometry=geometry,
        latent_size=latent_size,
        chunk_frames=chunk_frames,
        cache=cache,
        sampler=SamplerConfig(),
        mla=mla,
        codec=codec,
    )


def tiny_model(config: ModelConfig, seed: int = 0) -> CausalWanModel:
    """A model with no parameter at zero or one, so that none can be ignored unnoticed.

    A codec is fitted to the keys and values of random tokens, and has the size of its config.
    """
    model = CausalWanModel(config)
    if config.codec is None:
        randomise(model, seed)
        return model
    model.load_state_dict(_codec_state(config.geometry, config.codec.rank, seed))
    model.resize(config.codec.size)
    return model


@cache
def _codec_state(geometry: Geometry, rank: int, seed: int) -> dict[str, Tensor]:
    """Parameters and buffers of `tiny_model`; fits take a while."""
    model = CausalWanModel(tiny_config(geometry, codec=CodecConfig(rank, Sizes(rank=rank))))
    randomise(model, seed)
    for block in model.all_blocks():
        assert isinstance(block.self_attn, DenseSelfAttention) and block.codec is not None
        block.codec.load_state_dict(tiny_fit(block.self_attn, rank)._asdict())
    return model.state_dict()


@torch.no_grad()
def tiny_fit(attention: DenseSelfAttention, rank: int) -> CodecFit:
    """A codec of a tiny layer, fitted to random tokens and a random metric."""
    dim, heads = attention.k.out_features, attention.num_heads
    entries = torch.cat(attention.project(noise(600, dim, seed=40)), -1)
    moments = measure_moments(entries)
    return fit_codec(random_stats(heads, dim // heads), moments, entries, rank)


def random_stats(heads: int, head_dim: int, seed: int = 41) -> AttentionStats:
    """Attention statistics with random squares of full rank."""

    def square(*batch: int, size: int) -> Tensor:
        root = noise(*batch, size, 2 * size, seed=seed + size).double()
        return root @ root.mT

    return AttentionStats(
        queries=torch.tensor(50.0, dtype=torch.float64),
        query_square=square(heads, size=head_dim),
        rotated_query_square=square(heads, size=head_dim),
        query_pairs=noise(heads, head_dim // 2, seed=seed).double().square(),
        phases=noise(heads, head_dim // 2, seed=seed).to(torch.complex128),
        value_square=square(size=heads * head_dim),
    )


@torch.no_grad()
def rollout(
    model: CausalWanModel,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor,
    cache: KVCache | RuntimeConfig | None = None,
    between: int = 0,
    keep_between: bool = False,
) -> Tensor:
    """Velocities of a clip, streamed into a cache, or into a new one of some runtime.

    Args:
        model: Dense or converted.
        latents: Clip.
        timestep: Timestep of each frame.
        context: Prompt.
        cache: The cache, or the runtime of a new one.
        between: Number of passes over other latents before each chunk's own.
        keep_between: Whether these passes are kept.
    """
    if not isinstance(cache, KVCache):
        cache = model.new_cache(len(latents), cache)
    prompt, chunk = model.project_prompt(context), model.config.chunk_frames
    velocities: list[Tensor] = []
    for part, level in zip(latents.split(chunk, 1), timestep.split(chunk, 1), strict=True):
        cache.open_chunk(part.shape[1])
        for step in range(between):
            other = noise(*part.shape, seed=50 + step).to(part)
            model.stream(other, level.flip(0), prompt, cache, keep=keep_between)
        velocities.append(model.stream(part, level, prompt, cache))
    return torch.cat(velocities, 1)


def clip_of(config: ModelConfig, frames: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and context."""
    latents, context = tiny_clip(config, frames, batch)
    return latents, chunk_timesteps(config, frames, batch), context


def block_of(attention: SelfAttention, codec: LayerCodec | None = None) -> Block:
    """A block whose self-attention is given; masked passes take blocks."""
    block = Block(tiny_config(), 0)
    block.self_attn, block.codec = attention, codec
    return block


def randomise(module: nn.Module, seed: int) -> None:
    """Fill all parameters; signals keep about their size, norm gains spread around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            vector_like = parameter.ndim in (1, 3)  # gains, biases; modulation, q_rope_map
            scale = 0.4 if vector_like else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_clip(
    config: ModelConfig, frames: int, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Latents (B, F, C, height, width) and contexts (B, text_len, text_dim)."""
    geometry = config.geometry
    latents = noise(batch, frames, geometry.in_dim, *config.latent_size, seed=seed)
    return latents, noise(batch, geometry.text_len, geometry.text_dim, seed=seed + 1)


def chunk_timesteps(config: ModelConfig, frames: int, batch: int = 2) -> Tensor:
    """Timesteps (B, F), one for each chunk, different in every chunk and clip."""
    chunks = frames // config.chunk_frames
    levels = torch.linspace(950, 30, batch * chunks).view(chunks, batch).T
    return levels.repeat_interleave(config.chunk_frames, dim=1)
