"""The DiT against diffusers' models, and streamed generation against one masked pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    EITHER_LATENT,
    TINY_GEOMETRY,
    chunk_timesteps,
    noise,
    randomise,
    rollout,
    tiny_clip,
    tiny_config,
    tiny_mla,
    tiny_model,
)
from reference.masks import block_causal_mask
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vmla_convert.checkpoint.keymap import DIFFUSERS_RULES, to_native
from vmla_convert.config import CachePolicy, MLAConfig, ModelConfig
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.masks import teacher_forcing_mask

KINDS_BY_NAME = {"dense model": None, **{latent: tiny_mla(latent) for latent in EITHER_LATENT}}
KINDS = pytest.mark.parametrize("mla", list(KINDS_BY_NAME.values()), ids=list(KINDS_BY_NAME))

# (window, sink, chunk, frames); most evict, some in the middle of a chunk.
WINDOWS = [(6, 2, 2, 8), (5, 2, 3, 6), (4, 0, 2, 6)]
KINDS_IN_WINDOWS = pytest.mark.parametrize(
    ("mla", "window", "sink", "chunk", "frames"),
    [
        pytest.param(mla, *window, id=f"{name}-{'-'.join(map(str, window))}")
        for name, mla in KINDS_BY_NAME.items()
        for window in WINDOWS
    ],
)


# Parity with diffusers


def diffusers_twin(config: ModelConfig, twin: nn.Module) -> CausalWanModel:
    """Our model with the randomised weights of a diffusers model."""
    randomise(twin, seed=3)
    theirs = twin.state_dict()
    ours = CausalWanModel(config)
    names = to_native(theirs, DIFFUSERS_RULES)
    ours.load_state_dict({native: theirs[name] for native, name in names.items()})
    return ours


def diffusers_geometry() -> dict[str, Any]:
    geometry = TINY_GEOMETRY
    return {
        "num_attention_heads": geometry.num_heads,
        "attention_head_dim": geometry.head_dim,
        "in_channels": geometry.in_dim,
        "out_channels": geometry.out_dim,
        "text_dim": geometry.text_dim,
        "freq_dim": geometry.freq_dim,
        "ffn_dim": geometry.ffn_dim,
        "num_layers": geometry.num_layers,
    }


@pytest.mark.parametrize("per_frame", [False, True], ids=["one timestep", "timestep per frame"])
@torch.no_grad()
def test_dense_model_is_diffusers_wan(per_frame: bool) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config, frames = tiny_config(), 4
    twin = WanTransformer3DModel(**diffusers_geometry())
    model = diffusers_twin(config, twin)
    latents, context = tiny_clip(config, frames)
    if per_frame:
        timestep = chunk_timesteps(config, frames)
        theirs = timestep.repeat_interleave(config.tokens_per_frame, dim=1)
    else:
        theirs = torch.tensor([700.0, 12.0])
        timestep = theirs[:, None].expand(2, frames)
    expected = twin(latents.transpose(1, 2), theirs, context, return_dict=False)[0]
    velocity = model(latents, timestep, context, torch.arange(frames))
    torch.testing.assert_close(velocity, expected.transpose(1, 2), atol=2e-5, rtol=0)


@torch.no_grad()
def test_block_causal_model_is_diffusers_skyreels() -> None:
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel

    config, frames = tiny_config(), 6
    twin = SkyReelsV2Transformer3DModel(**diffusers_geometry(), num_frame_per_block=2)
    model = diffusers_twin(config, twin)
    latents, context = tiny_clip(config, frames)
    timestep = torch.tensor([[0, 0, 400, 400, 999, 999], [7, 7, 800, 800, 30, 30]])
    expected = twin(
        latents.transpose(1, 2), timestep, context, enable_diffusion_forcing=True, return_dict=False
    )[0]
    mask = block_causal_mask(frames, 2, config.tokens_per_frame)
    velocity = model(latents, timestep, context, torch.arange(frames), mask)
    torch.testing.assert_close(velocity, expected.transpose(1, 2), atol=2e-5, rtol=0)


# Streaming


@KINDS_IN_WINDOWS
@torch.no_grad()
def test_teacher_forcing_is_streamed_denoising_with_a_clean_past(
    mla: MLAConfig | None, window: int, sink: int, chunk: int, frames: int
) -> None:
    policy = CachePolicy(window, sink)
    config = tiny_config(cache=policy, mla=mla, chunk_frames=chunk)
    model = tiny_model(config)
    clean, context = tiny_clip(config, frames)
    noisy = clean + noise(*clean.shape, seed=5)
    timestep = chunk_timesteps(config, frames)
    mask = teacher_forcing_mask(frames, chunk, config.tokens_per_frame, policy)
    forced = model(
        torch.cat([clean, noisy], dim=1),
        torch.cat([torch.zeros_like(timestep), timestep], dim=1),
        context,
        torch.arange(frames).repeat(2),
        mask,
    )
    cache, prompt = model.new_cache(len(clean)), model.project_prompt(context)
    denoised: list[Tensor] = []
    written: list[Tensor] = []
    for start in range(0, frames, chunk):
        part = slice(start, start + chunk)
        cache.open_chunk(chunk)
        denoised.append(model.stream(noisy[:, part], timestep[:, part], prompt, cache, keep=False))
        zero = torch.zeros_like(timestep[:, part])
        written.append(model.stream(clean[:, part], zero, prompt, cache))
    streamed = torch.cat(written + denoised, dim=1)
    torch.testing.assert_close(forced, streamed, atol=1e-5, rtol=0)


@KINDS
@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(mla: MLAConfig | None) -> None:
    config = tiny_config(cache=CachePolicy(4, 1), mla=mla)
    model = tiny_model(config)
    latents, context = tiny_clip(config, 6, batch=3)
    timestep = chunk_timesteps(config, 6, batch=3)
    together = rollout(model, latents, timestep, context)
    for i in range(3):
        one = slice(i, i + 1)
        alone = rollout(model, latents[one], timestep[one], context[one])
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=0)


# Training


@KINDS
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_gradient_reaches_every_parameter(mla: MLAConfig | None, bf16: bool) -> None:
    config = tiny_config(mla=mla)
    model = tiny_model(config)
    latents, context = tiny_clip(config, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        mask = block_causal_mask(4, 2, config.tokens_per_frame, config.cache)
        timestep = chunk_timesteps(config, 4)
        velocity = model(latents, timestep, context, torch.arange(4), mask)
    velocity.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or parameter.grad.abs().max() < 1e-7
    ]
    assert idle == []


# Compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@torch.no_grad()
def test_compiled_blocks_compute_the_same() -> None:
    """With layers of different sizes; one compilation serves both."""
    config = tiny_config(cache=CachePolicy(4, 1), mla=tiny_mla())
    model = tiny_model(config)
    latents, context = tiny_clip(config, 6)
    timestep = chunk_timesteps(config, 6)
    expected = rollout(model, latents, timestep, context)
    model.compile_blocks()
    counters.clear()
    compiled = rollout(model, latents, timestep, context)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
