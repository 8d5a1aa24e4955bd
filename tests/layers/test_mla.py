"""The MLA layer: its lossless limit, its formula, the size of its cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import (
    EITHER_LATENT,
    TINY_GEOMETRY,
    TINY_MLA,
    Latent,
    block_of,
    chunk_timesteps,
    noise,
    randomise,
    tiny_clip,
    tiny_config,
    tiny_mla,
    tiny_model,
)
from reference.attention import one_softmax
from reference.masks import token_masks
from torch import Tensor, nn

from vmla_convert.config import CachePolicy, MLAConfig
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.block import masked_attention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.masks import teacher_forcing_mask
from vmla_convert.maths.rope3d import Rotary, rotary_table, token_positions

DIM, HEADS, HEAD_DIM = TINY_GEOMETRY.dim, TINY_GEOMETRY.num_heads, TINY_GEOMETRY.head_dim
ALL_PAIRS = tuple(range(HEAD_DIM // 2)) * HEADS
either_latent = pytest.mark.parametrize("latent", EITHER_LATENT)
EVERY_SIZE = [*map(tiny_mla, EITHER_LATENT)]


def size_id(mla: MLAConfig) -> str:
    return mla.latent


def full_size(latent: Latent) -> MLAConfig:
    """The sizes at which nothing needs to be lost."""
    split, layers = latent == "split", TINY_GEOMETRY.num_layers
    return MLAConfig(
        kv_lora_rank=(2 * DIM if split else DIM,) * layers,
        rope_pairs=(ALL_PAIRS,) * layers,
        init="exact",
        latent=latent,
        key_ranks=(DIM,) * layers if split else (),
    )


@torch.no_grad()
def lossless(dense: DenseSelfAttention, kind: Latent) -> LatentSelfAttention:
    """The converted layer at full size; keys pass through the rope keys.

    Every part of the latent is x in a basis of its own, shifted.
    """
    latent = LatentSelfAttention(TINY_GEOMETRY, full_size(kind), 0)
    randomise(latent, seed=11)
    latent.load_state_dict(dense.state_dict(), strict=False)
    bases = latent.kv_a_proj.weight.unflatten(0, (-1, DIM))
    bases.copy_(torch.linalg.qr(bases).Q)  # any invertible ones would do
    value_basis, value_offset = bases[-1], latent.kv_a_proj.bias[-DIM:]

    raw_key, raw_bias, gain = dense.k.weight, dense.k.bias, dense.norm_k.weight
    key, key_bias = gain[:, None] * raw_key, gain * raw_bias
    value = dense.v.weight @ value_basis.mT
    fill(latent.kv_b_proj_v, value, dense.v.bias - value @ value_offset)
    latent.q_rope_map.zero_()
    fill(latent.k_rope_proj, key, key_bias)
    for head in range(HEADS):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        latent.q_rope_map[head, own] = torch.eye(HEAD_DIM)
    fill(latent.kv_b_proj_k, torch.zeros(DIM, len(bases[0])), torch.zeros(DIM))

    latent.k_norm_proj.load_state_dict(dense.k.state_dict())
    return latent


def fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def table(frames: Tensor) -> Rotary:
    return rotary_table(token_positions(frames, 2, 3), HEAD_DIM)


@pytest.fixture
def dense() -> DenseSelfAttention:
    attention = DenseSelfAttention(TINY_GEOMETRY)
    randomise(attention, seed=2)
    return attention


# At full size nothing is lost


@either_latent
@pytest.mark.parametrize("frames", [[0, 1, 2, 3], [5, 2, 90, 91]], ids=str)
@torch.no_grad()
def test_a_full_size_layer_is_the_dense_layer_wherever_the_frames_are(
    dense: DenseSelfAttention, latent: Latent, frames: list[int]
) -> None:
    x = noise(2, 48, DIM)
    attend = masked_attention(table(torch.tensor(2 * frames)), teacher_forcing_mask(4, 2, 6))
    y = attend(block_of(lossless(dense, latent)), x)
    torch.testing.assert_close(y, attend(block_of(dense), x), atol=1e-5, rtol=0)


@either_latent
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@torch.no_grad()
def test_a_full_size_model_rolls_out_like_its_source(latent: Latent, positions: str) -> None:
    """With window, sink, eviction and re-indexing on."""
    assert positions in ("absolute", "relative")
    config = tiny_config(cache=CachePolicy(6, 2, positions))
    source = tiny_model(config)
    model = CausalWanModel(dataclasses.replace(config, mla=full_size(latent)))
    model.load_state_dict(source.state_dict(), strict=False)
    for block, attention in zip(model.blocks, source.self_attentions(), strict=True):
        assert isinstance(attention, DenseSelfAttention)
        block.self_attn = lossless(attention, latent)
    latents, context = tiny_clip(config, 8)
    timestep = chunk_timesteps(config, 8)
    caches = source.new_cache(2), model.new_cache(2)
    for part, level in zip(latents.split(2, 1), timestep.split(2, 1), strict=True):
        velocities: list[Tensor] = []
        for which, cache in zip((source, model), caches, strict=True):
            cache.open_chunk(2)
            velocities.append(which.stream(part, level, which.project_prompt(context), cache))
        torch.testing.assert_close(*velocities, atol=2e-5, rtol=0)


# Truncated, a layer still is what its formula says


def random_layer(mla: MLAConfig, index: int = 1) -> LatentSelfAttention:
    attention = LatentSelfAttention(TINY_GEOMETRY, mla, index)
    randomise(attention, seed=4)
    return attention


@pytest.mark.parametrize("mla", EVERY_SIZE, ids=size_id)
@torch.no_grad()
def test_scores_are_those_of_the_formula_in_one_softmax(mla: MLAConfig) -> None:
    """With shared, repeated and few pairs."""
    attention, x = random_layer(mla), noise(1, 16, DIM)
    rotary = rotary_table(token_positions(torch.tensor([3, 8, 9, 11] * 2), 1, 2), HEAD_DIM)
    mask = teacher_forcing_mask(4, 2, 2)
    y = masked_attention(rotary, mask)(block_of(attention), x)[0]
    expected = one_softmax(attention, mla, 1, x[0], rotary, token_masks(mask)[0])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


# What is stored


@either_latent
@torch.no_grad()
def test_a_token_costs_what_its_config_says(latent: Latent) -> None:
    mla = tiny_mla(latent)
    for index, attention in enumerate(tiny_model(tiny_config(mla=mla)).self_attentions()):
        assert isinstance(attention, LatentSelfAttention)
        rank, rope = mla.kv_lora_rank[index], 2 * len(mla.rope_pairs[index])
        widths = [rank, rope, 1]
        assert isinstance(attention, LatentSelfAttention)
        assert list(attention.entry_widths.values()) == widths
        assert mla.cache_scalars(index) == sum(widths)
        entries = attention.project(noise(2, 6, DIM))
        assert [entry.shape for entry in entries] == [(2, 6, width) for width in widths]
        parts = mla.latent_parts(index)
        assert (sum(parts) == rank) if latent == "split" else (parts == (rank, rank))


def test_the_names_of_a_layers_parameters() -> None:
    linears = ("q", "o", "kv_a_proj", "kv_b_proj_k", "kv_b_proj_v", "k_rope_proj", "k_norm_proj")
    expected = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    names = set(LatentSelfAttention(TINY_GEOMETRY, TINY_MLA, 0).state_dict())
    assert names == expected | {"norm_q.weight", "q_rope_map"}
