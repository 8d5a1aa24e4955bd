"""Mistakes that only a GPU shows, made on purpose: the pretend device must refuse each."""

from __future__ import annotations

import pytest
import torch
from conftest import noise, tiny_config, tiny_model

from vmla_convert.config import CachePolicy, ModelConfig
from vmla_convert.layers import attention, dit
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.maths.rope3d import Rotary

CONFIG = tiny_config(cache=CachePolicy(window_frames=6))


def stream(config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Two chunks of a dense model."""
    model = tiny_model(config).to("cuda", dtype)
    context = noise(1, 3, 5).to("cuda", dtype)
    with torch.no_grad():
        prompt, cache = model.project_prompt(context), model.new_cache(1)
        for _ in range(2):
            cache.open_chunk(2)
            latents = noise(1, 2, 4, 4, 6).to("cuda", dtype)
            model.stream(latents, torch.zeros(1, 2).to("cuda"), prompt, cache)


def nothing_wrong(_: object) -> None:
    """The same pass without a mistake, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        stream(CONFIG, dtype)


def table_of_the_host(_: object) -> None:
    """RoPE's table stays on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        made = dit.rotary_table
        patch.setattr(
            dit, "rotary_table", lambda positions, width, _: made(positions, width, "cpu")
        )
        stream(CONFIG)


def two_dtypes(_: object) -> None:
    """Inputs of a linear map in float32 where its weights are in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        project = DenseSelfAttention.project
        patch.setattr(DenseSelfAttention, "project", lambda self, x: project(self, x.float()))
        stream(CONFIG, torch.bfloat16)


def keys_of_another_dtype(_: object) -> None:
    """Keys in float32 beside queries in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        rotated = attention.rotated

        def wide(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
            return rotated(x, rotary).float()

        patch.setattr(attention, "rotated", wide)
        stream(CONFIG, torch.bfloat16)


def unaligned_value(_: object) -> None:
    """Values that start between two of a fused kernel's steps."""
    wide = torch.zeros(1, 2, 5, 17, dtype=torch.bfloat16).to("cuda")
    q = torch.zeros(1, 2, 5, 16, dtype=torch.bfloat16).to("cuda")
    torch.nn.functional.scaled_dot_product_attention(q, q, wide[..., 1:])
