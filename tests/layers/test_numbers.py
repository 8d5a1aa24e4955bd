"""Numbers at the edge of a format or of a decomposition stay finite, and stay right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import (
    TINY_GEOMETRY,
    chunk_timesteps,
    random_stats,
    rollout,
    tiny_clip,
    tiny_config,
    tiny_mla,
    tiny_model,
)
from torch import Tensor

from vmla_convert.config import CodecConfig, ConvertConfig, ModelConfig, RuntimeConfig, Sizes
from vmla_convert.fitting.codec import fit_model
from vmla_convert.fitting.mla import convert_model
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.quantised import fit_grid, from_codes, to_codes
from vmla_convert.maths.codec import fit_codec
from vmla_convert.maths.moments import measure_moments

FRAMES = 6
MODELS: dict[str, ModelConfig] = {
    "dense": tiny_config(),
    "codec": tiny_config(codec=CodecConfig(40, Sizes(rank=20))),
    "mla": tiny_config(mla=tiny_mla("split")),
}


def stream(model: CausalWanModel, scale: float, runtime: RuntimeConfig | None = None) -> Tensor:
    """Velocities of a clip whose latents and prompt are multiplied by a number."""
    latents, context = tiny_clip(model.config, FRAMES)
    weight = model.patch_embedding.weight
    timestep = chunk_timesteps(model.config, FRAMES)
    return rollout(
        model, (scale * latents).to(weight), timestep, (scale * context).to(weight), runtime
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_zero_tokens_stay_finite(name: str, dtype: torch.dtype) -> None:
    assert stream(tiny_model(MODELS[name]).to(dtype), 0).isfinite().all()


@pytest.mark.parametrize(
    "runtime", [RuntimeConfig(cache_dtype="int8"), RuntimeConfig(cache_dtype="int2")]
)
def test_all_zero_tokens_stay_finite_in_a_quantised_cache(runtime: RuntimeConfig) -> None:
    assert stream(tiny_model(MODELS["dense"]), 0, runtime).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_beyond_half_precision_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Gains of 200 make logits of a head of 16 numbers up to 640,000; float16 ends at 65,504."""
    model = tiny_model(MODELS[name])
    for block in model.all_blocks():
        for part, parameter in block.self_attn.named_parameters():
            if "norm" in part:
                parameter.data.fill_(200.0)
    assert stream(model.to(dtype), 1).isfinite().all()


def test_constant_entries_are_stored_exactly() -> None:
    constant = torch.full((2, 6, 8), 0.375)
    for dim in (1, -1):
        grid = fit_grid(constant, dim, bits=2)
        assert torch.equal(from_codes(to_codes(constant, grid, 2), grid), constant)


def test_a_codec_of_constant_tokens_gives_them_back() -> None:
    heads, dim = TINY_GEOMETRY.num_heads, TINY_GEOMETRY.dim
    entries = torch.linspace(-1, 1, 2 * dim).expand(200, -1)
    stats = random_stats(heads, dim // heads)
    fit = fit_codec(stats, measure_moments(entries), entries, rank=8)
    assert all(part.isfinite().all() for part in fit)
    one = entries[:1].double()
    back = (one - fit.mean) @ fit.encode.mT @ fit.decode.mT + fit.mean
    assert torch.allclose(back, one, atol=1e-6)


def repeated(weight: Tensor) -> Tensor:
    """A matrix whose singular values are all 1."""
    return torch.linalg.qr(weight)[0]


def deficient(weight: Tensor) -> Tensor:
    """A matrix of rank 1."""
    return torch.outer(weight[:, 0], weight[0])


CONVERSIONS = {
    "codec": ConvertConfig(calibrate=False, channels=40),
    "mla": ConvertConfig(
        product="mla",
        init="spectral",
        calibrate=False,
        size=Sizes(kv_lora_rank=12, qk_rope_head_dim=4),
    ),
}


@pytest.mark.parametrize("change", [repeated, deficient, torch.zeros_like])
@pytest.mark.parametrize("product", CONVERSIONS)
@torch.no_grad()
def test_odd_spectra_of_weights_convert_to_finite_models(
    product: str, change: Callable[[Tensor], Tensor]
) -> None:
    dense = tiny_model(replace(MODELS["dense"], media="demo")).eval()
    for block in dense.all_blocks():
        assert isinstance(block.self_attn, DenseSelfAttention)
        for part in (block.self_attn.k, block.self_attn.v):
            part.weight.copy_(change(part.weight))
            part.bias.zero_()
    convert = fit_model if product == "codec" else convert_model
    made = convert(dense, CONVERSIONS[product], None)
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())
    assert stream(made, 1).isfinite().all()
