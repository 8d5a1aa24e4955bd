"""The latent layer: its lossless limit (METHOD 2), its scale and norm, its cache's size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import (
    TINY_GEOMETRY,
    TINY_MLA,
    chunk_timesteps,
    noise,
    randomise,
    tiny_clip,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn

from vmla_convert.config import CachePolicy, MLAConfig
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.masks import block_causal_mask
from vmla_convert.maths.rope3d import Rotary, rotary_table, token_positions

DIM, HEADS, HEAD_DIM = TINY_GEOMETRY.dim, TINY_GEOMETRY.num_heads, TINY_GEOMETRY.head_dim
LAYERS = TINY_GEOMETRY.num_layers
ALL_PAIRS = tuple(range(HEAD_DIM // 2)) * HEADS
LOSSLESS = MLAConfig(kv_lora_rank=(DIM,) * LAYERS, rope_pairs=(ALL_PAIRS,) * LAYERS, init="exact")


def fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


@torch.no_grad()
def lossless(dense: DenseSelfAttention, keys_in: str = "rope") -> LatentSelfAttention:
    """The converted layer at full rank; its keys pass through the rope branch or the latent."""
    latent = LatentSelfAttention(TINY_GEOMETRY, LOSSLESS, 0)
    randomise(latent, seed=11)
    basis = torch.linalg.qr(latent.kv_a_proj.weight).Q  # any invertible one would do
    latent.kv_a_proj.weight.copy_(basis)
    for name in ("q", "o", "norm_q"):
        getattr(latent, name).load_state_dict(getattr(dense, name).state_dict())
    latent.k_norm_proj.load_state_dict(dense.k.state_dict())

    gain = dense.norm_k.weight
    key_weight, key_bias = gain[:, None] * dense.k.weight, gain * dense.k.bias
    back, offset = basis.T, latent.kv_a_proj.bias
    value = dense.v.weight @ back
    fill(latent.kv_b_proj_v, value, dense.v.bias - value @ offset)
    latent.q_rope_map.zero_()
    if keys_in == "rope":
        fill(latent.kv_b_proj_k, torch.zeros(DIM, DIM), torch.zeros(DIM))
        fill(latent.k_rope_proj, key_weight, key_bias)
        for head in range(HEADS):
            own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            latent.q_rope_map[head, own] = torch.eye(HEAD_DIM)
    else:
        key = key_weight @ back
        fill(latent.kv_b_proj_k, key, key_bias - key @ offset)
    return latent


def table(frames: Tensor) -> Rotary:
    return rotary_table(token_positions(frames, 2, 3), HEAD_DIM)


@pytest.fixture
def dense() -> DenseSelfAttention:
    attention = DenseSelfAttention(TINY_GEOMETRY)
    randomise(attention, seed=2)
    return attention


@torch.no_grad()
def test_full_rank_and_all_pairs_equal_the_dense_layer(dense: DenseSelfAttention) -> None:
    latent, x = lossless(dense), noise(2, 24, DIM)
    mask = block_causal_mask(4, 2, 6)
    for frames in (torch.arange(4), torch.tensor([5, 2, 90, 91])):
        rotary = table(frames)
        expected = dense(x, dense.project(x), rotary, rotary, mask)
        y = latent(x, latent.project(x), rotary, rotary, mask)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_full_rank_reads_more_keys_than_queries_at_other_places(dense: DenseSelfAttention) -> None:
    latent, past, x = lossless(dense), noise(2, 18, DIM, seed=1), noise(2, 12, DIM)
    tokens = torch.cat([past, x], dim=1)
    query_rotary, key_rotary = table(torch.tensor([9, 10])), table(torch.tensor([4, 0, 1, 9, 10]))
    expected = dense(x, dense.project(tokens), query_rotary, key_rotary)
    y = latent(x, latent.project(tokens), query_rotary, key_rotary)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_keys_in_the_latent_equal_the_dense_layer_without_positions(
    dense: DenseSelfAttention,
) -> None:
    latent, x = lossless(dense, keys_in="latent"), noise(2, 12, DIM)
    nowhere = rotary_table(torch.zeros(12, 3, dtype=torch.long), HEAD_DIM)
    somewhere = table(torch.arange(2))
    entries = latent.project(x)
    expected = dense(x, dense.project(x), nowhere, nowhere)
    torch.testing.assert_close(latent(x, entries, nowhere, nowhere), expected, atol=1e-5, rtol=0)
    # … wherever the tokens are: the content branch has no positions.
    assert torch.equal(
        latent(x, entries, somewhere, somewhere), latent(x, entries, nowhere, nowhere)
    )


@torch.no_grad()
def test_scores_are_those_of_the_formula() -> None:
    """METHOD 1, one query and one key at a time, with shared, repeated and few pairs."""
    latent = LatentSelfAttention(TINY_GEOMETRY, TINY_MLA, 1)
    randomise(latent, seed=4)
    x, rotary = noise(1, 12, DIM), table(torch.tensor([3, 8]))
    pairs = TINY_MLA.rope_pairs[1]
    raw = latent.k_norm_proj(x)[0]
    rho = (raw.square().mean(-1) + TINY_GEOMETRY.eps).sqrt()
    c, r = latent.kv_a_proj(x)[0], latent.k_rope_proj(x)[0]
    queries = latent.norm_q(latent.q(x))[0].unflatten(-1, (HEADS, HEAD_DIM))
    keys = latent.kv_b_proj_k(c).unflatten(-1, (HEADS, HEAD_DIM))
    values = latent.kv_b_proj_v(c).unflatten(-1, (HEADS, HEAD_DIM))

    def turn(channels: Tensor, token: int) -> Tensor:
        z = torch.view_as_complex(channels.unflatten(-1, (-1, 2)).contiguous())
        angle = torch.complex(rotary.cos[token], rotary.sin[token])[list(pairs)]
        return torch.view_as_real(z * angle).flatten()

    heads: list[Tensor] = []
    for head in range(HEADS):
        scores = torch.zeros(12, 12)
        for i in range(12):
            for j in range(12):
                q = queries[i, head]
                rope = turn(latent.q_rope_map[head] @ q, i) @ turn(r[j], j)
                scores[i, j] = (q @ keys[j, head] + rope) / (rho[j] * HEAD_DIM**0.5)
        heads.append(scores.softmax(-1) @ values[:, head])
    expected = latent.o(torch.cat(heads, dim=-1))
    y = latent(x, latent.project(x), rotary, rotary)[0]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@torch.no_grad()
def test_a_lossless_model_rolls_out_like_its_source(positions: str) -> None:
    """With window, sink, eviction and re-indexing on."""
    assert positions in ("absolute", "relative")
    config = tiny_config(cache=CachePolicy(6, 2, positions))
    source = tiny_model(config)
    model = CausalWanModel(dataclasses.replace(config, mla=LOSSLESS))
    model.load_state_dict(source.state_dict(), strict=False)
    for block, attention in zip(model.blocks, source.self_attentions(), strict=True):
        assert isinstance(attention, DenseSelfAttention)
        block.self_attn = lossless(attention)
    latents, context = tiny_clip(config, 10)
    timestep = chunk_timesteps(config, 10)
    caches = source.new_cache(2), model.new_cache(2)
    for part, level in zip(latents.split(2, 1), timestep.split(2, 1), strict=True):
        velocities: list[Tensor] = []
        for which, cache in zip((source, model), caches, strict=True):
            cache.open_chunk(2)
            velocities.append(which.stream(part, level, context, cache))
        torch.testing.assert_close(*velocities, atol=2e-5, rtol=0)


def test_a_token_costs_its_latent_its_rope_key_and_one_norm() -> None:
    attentions = tiny_model(tiny_config(mla=TINY_MLA)).self_attentions()
    x = noise(1, 6, DIM)
    for layer, attention in enumerate(attentions):
        rank, pairs = TINY_MLA.kv_lora_rank[layer], TINY_MLA.rope_pairs[layer]
        assert TINY_MLA.cache_scalars(layer) == rank + 2 * len(pairs) + 1
        assert sum(attention.entry_widths) == TINY_MLA.cache_scalars(layer)
        assert tuple(e.shape[-1] for e in attention.project(x)) == attention.entry_widths
    assert TINY_MLA.cache_scalars(0) == 16 + 8 + 1
    assert TINY_MLA.cache_scalars(1) == 10 + 10 + 1


@pytest.mark.parametrize(("mla", "scalars"), [(None, 2 * 96), (TINY_MLA, 25 + 21)])
def test_the_cache_is_as_large_as_the_config_says(mla: MLAConfig | None, scalars: int) -> None:
    config = tiny_config(cache=CachePolicy(7, 2), mla=mla)
    cache = tiny_model(config).new_cache(batch=3)
    assert cache.nbytes == config.cache_bytes(frames=7, batch=3, bytes_per_scalar=4)
    assert cache.nbytes == scalars * 7 * 6 * 3 * 4
    assert config.cache_scalars_per_token() == scalars / 2
    assert config.cache_cut() == pytest.approx(1 - scalars / (2 * 96))
