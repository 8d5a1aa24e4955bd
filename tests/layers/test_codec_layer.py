"""Models with a codec: lossless at full size, the same streamed and masked, within their bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import (
    TINY_GEOMETRY,
    chunk_timesteps,
    noise,
    randomise,
    rollout,
    tiny_clip,
    tiny_config,
    tiny_fit,
    tiny_model,
)
from reference.masks import block_causal_mask
from torch import Tensor

from vmla_convert.config import CachePolicy, CodecConfig, RuntimeConfig, Sizes
from vmla_convert.errors import ConfigError
from vmla_convert.layers.attention import AttendedTokens, AttentionMetadata, DenseSelfAttention
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.rates import Rate
from vmla_convert.maths.rope3d import rotary_table, token_positions

DIM, HEAD_DIM, HEADS = TINY_GEOMETRY.dim, TINY_GEOMETRY.head_dim, TINY_GEOMETRY.num_heads
WIDTH, LAYERS = TINY_GEOMETRY.dense_cache_scalars, TINY_GEOMETRY.num_layers
WHOLE = RuntimeConfig(Sizes(rank=WIDTH), "model")
POLICIES = [
    # policy, chunk; all evict
    (CachePolicy(6, 2, "relative"), 2),
    (CachePolicy(5, 0), 1),
    (CachePolicy(7, 2, "relative", dense_recent_frames=3), 2),
    (CachePolicy(6, 1, dense_recent_frames=1), 3),
]
policies = pytest.mark.parametrize(
    ("policy", "chunk"),
    POLICIES,
    ids=[f"{'-'.join(map(str, dataclasses.astuple(p)))}-{chunk}" for p, chunk in POLICIES],
)


def codec_model(
    policy: CachePolicy, size: Sizes | None = None, rank: int = WIDTH, **how: Any
) -> CausalWanModel:
    """A model whose codec has R channels, in float64: rounding there moves no code."""
    codec = CodecConfig(rank, size or Sizes(rank=rank))
    return tiny_model(tiny_config(cache=policy, codec=codec, **how)).double()


def dense_twin(model: CausalWanModel) -> CausalWanModel:
    """The dense model that a codec stands beside."""
    twin = CausalWanModel(dataclasses.replace(model.config, codec=None)).double()
    state = {n: t for n, t in model.state_dict().items() if ".codec." not in n}
    twin.load_state_dict(state)
    return twin


def clip_of(model: CausalWanModel, frames: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and context."""
    latents, context = tiny_clip(model.config, frames, batch)
    return latents.double(), chunk_timesteps(model.config, frames, batch), context.double()


@torch.no_grad()
def masked(model: CausalWanModel, clip: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Velocities of a clip in one pass."""
    config, frames = model.config, clip[0].shape[1]
    mask = block_causal_mask(frames, config.chunk_frames, config.tokens_per_frame, config.cache)
    return model(*clip, torch.arange(frames), mask)


# At full size nothing is lost


@policies
def test_a_full_size_codec_that_rounds_nothing_is_the_dense_model(
    policy: CachePolicy, chunk: int
) -> None:
    """In host memory too."""
    model = codec_model(policy, chunk_frames=chunk)
    clip = clip_of(model, 9 if chunk == 3 else 8)
    expected = rollout(dense_twin(model), *clip)
    offloaded = dataclasses.replace(WHOLE, offload=True)
    torch.testing.assert_close(rollout(model, *clip, offloaded), expected, rtol=0, atol=1e-6)


def test_dense_frames_as_many_as_the_window_has_room_for_are_the_dense_model() -> None:
    """However small the codec is: nothing is left for it."""
    model = codec_model(CachePolicy(6, dense_recent_frames=4), Sizes(bytes_per_token=1))
    clip = clip_of(model, 10)
    torch.testing.assert_close(
        rollout(model, *clip), rollout(dense_twin(model), *clip), rtol=0, atol=1e-10
    )
    fewer = codec_model(CachePolicy(6, dense_recent_frames=3), Sizes(bytes_per_token=1))
    assert (rollout(fewer, *clip) - rollout(model, *clip)).abs().max() > 1e-2


@pytest.mark.parametrize("quantised", [True, False])
def test_larger_sizes_are_nearer_to_the_dense_model(quantised: bool) -> None:
    model = codec_model(CachePolicy(6, 1))
    clip = clip_of(model, 8)
    exact = rollout(dense_twin(model), *clip)
    errors = [
        (rollout(model, *clip, RuntimeConfig(Sizes(size), "auto" if quantised else "model"))
         - exact).square().mean().item()
        for size in (3, 96, 192)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]
    # The first chunk attends to itself alone.
    small = rollout(model, *clip, RuntimeConfig(Sizes(2)))
    torch.testing.assert_close(small[:, :2], exact[:, :2], rtol=0, atol=1e-10)


# Streamed is masked


@pytest.mark.parametrize(("nbytes", "quantised"), [(1.5, True), (9.5, True), (9.5, False)])
@pytest.mark.parametrize(
    ("policy", "chunk", "batch"),
    [
        (CachePolicy(5, 2), 2, 2),
        (CachePolicy(7, 1, dense_recent_frames=2), 3, 1),
    ],
)
def test_streaming_equals_the_masked_pass_at_every_size(
    policy: CachePolicy, chunk: int, batch: int, nbytes: float, quantised: bool
) -> None:
    size = Sizes(nbytes)
    model = codec_model(policy, chunk_frames=chunk)
    model.resize(size, quantised)
    clip = clip_of(model, 4 * chunk, batch)
    expected = masked(model, clip)
    runtimes = RuntimeConfig(), RuntimeConfig(size, "auto" if quantised else "model")
    for runtime in runtimes:
        torch.testing.assert_close(rollout(model, *clip, runtime), expected, rtol=0, atol=1e-7)


@torch.no_grad()
def test_a_chunk_is_kept_once_where_frames_stay_dense() -> None:
    """The chunk's frames took the place of the frames that it attends to."""
    model = codec_model(CachePolicy(6, 1, dense_recent_frames=2), Sizes(20))
    latents, timestep, context = clip_of(model, 2)
    prompt, cache = model.project_prompt(context), model.new_cache(2)
    cache.open_chunk(2)
    for _ in range(2):
        model.stream(latents, timestep, prompt, cache)
    cache.open_chunk(2)
    model.stream(latents, timestep, prompt, cache)
    for keep in (True, False):
        with pytest.raises(ValueError, match="kept already"):
            model.stream(latents, timestep, prompt, cache, keep)
    cache.open_chunk(2)
    model.stream(latents, timestep, prompt, cache)


# Bytes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("nbytes", "dense"), [(1, 0), (9.6, 2), (131.5, 0), (192, 2)])
def test_a_cache_takes_the_bytes_of_its_formula_and_no_more_than_asked(
    nbytes: float, batch: int, dense: int
) -> None:
    policy = CachePolicy(7, 2, dense_recent_frames=dense)
    model = codec_model(policy).float()
    tokens = batch * model.config.tokens_per_frame
    recent = tokens * LAYERS * dense * WIDTH
    for narrow in (model, codec_model(policy).bfloat16()):
        itemsize = narrow.patch_embedding.weight.dtype.itemsize
        runtime = RuntimeConfig(Sizes(nbytes))
        cache = narrow.new_cache(batch, runtime)
        assert cache.nbytes == narrow.cache_bytes(batch, runtime)
        stored = (cache.nbytes - itemsize * recent) / (tokens * 7)
        # All layers together get what they ask for, in whole bytes.
        assert int(nbytes * LAYERS) == stored
        if nbytes >= 2:
            whole = RuntimeConfig(Sizes(nbytes), "model")
            cache = narrow.new_cache(batch, whole)
            assert cache.nbytes == narrow.cache_bytes(batch, whole)
            stored = (cache.nbytes - itemsize * recent) / (tokens * 7 * itemsize)
            assert int(nbytes * LAYERS) // 2 == stored


@pytest.mark.parametrize("quantised", [True, False])
def test_sizes_that_a_codec_cannot_have_are_refused(quantised: bool) -> None:
    model = codec_model(CachePolicy(6), rank=20)
    least, dtype = (1, "auto") if quantised else (2, "model")
    for fitting in (least, least + 0.4, 40):
        rates = model.rates(Sizes(fitting), quantised)
        assert sum(rate.token_bytes(2) for rate in rates) <= fitting * LAYERS
    for bad in (Sizes(least - 0.01), Sizes(40.5), Sizes(rank=21), Sizes(cut=0.5)):
        with pytest.raises(ConfigError) as caught:
            model.rates(bad, quantised)
        assert caught.value.hint
        with pytest.raises(ConfigError):
            model.new_cache(1, RuntimeConfig(bad, dtype))


# The layer alone


@pytest.fixture
def dense() -> DenseSelfAttention:
    attention = DenseSelfAttention(TINY_GEOMETRY)
    randomise(attention, seed=2)
    return attention.double()


def layer_codec(attention: DenseSelfAttention, rank: int, rate: Rate | None = None) -> LayerCodec:
    """A codec that is fitted to a layer."""
    codec = LayerCodec(DIM, HEADS, rank)
    codec.load_state_dict(tiny_fit(attention.float(), rank)._asdict())
    attention.double()
    if rate is not None:
        codec.rate = rate
    return codec.double()


def entries_of(attention: DenseSelfAttention, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return attention.project(noise(1, tokens, DIM, seed=seed).double())


MIXED = Rate((16, 16, 8, 7, 5, 5, 3, 2, 2, 1, 1))


@torch.no_grad()
def test_a_pass_without_a_cache_decodes_what_a_cache_would_hold(dense: DenseSelfAttention) -> None:
    for rate in (MIXED, Rate((16,) * 13, quantised=False)):
        codec = layer_codec(dense, 40, rate)
        key, value = entries_of(dense, 60)
        kept = codec.fetch(codec.store(codec.channels(key, value, rate), rate), rate)
        assert torch.equal(codec.past(key, value).channels, kept)
        assert kept.shape == (1, 60, len(rate.widths))


@torch.no_grad()
def test_heads_are_decoded_alike_together_and_apart(dense: DenseSelfAttention) -> None:
    codec = layer_codec(dense, 40)
    channels = noise(2, 7, 40).double()
    keys, values = codec.decode_heads(channels, slice(0, HEADS))
    for head in range(HEADS):
        key, value = codec.decode_heads(channels, slice(head, head + 1))
        torch.testing.assert_close(key, keys[:, :, head : head + 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(value, values[:, :, head : head + 1], rtol=0, atol=1e-12)
    whole = torch.cat([keys.flatten(2), values.flatten(2)], -1)
    torch.testing.assert_close(whole, channels @ codec.decode.mT + codec.mean, rtol=0, atol=1e-12)


@torch.no_grad()
def test_tiles_of_heads_attend_as_all_heads_do(
    dense: DenseSelfAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A past of 3,000 tokens, of which a head takes 0.7 MiB."""
    codec, x = layer_codec(dense, 40, MIXED), noise(1, 3_006, DIM).double()
    rotary = rotary_table(token_positions(torch.arange(1_503), 1, 2), HEAD_DIM)
    tokens = torch.arange(3_006)
    key, value = dense.project(x)
    past = codec.past(key[:, :3_000], value[:, :3_000])
    attended = AttendedTokens((key[:, 3_000:], value[:, 3_000:]), past)
    own, older, tiles = rotary.at(tokens[3_000:]), rotary.at(tokens[:3_000]), list[int]()
    write = LayerCodec.write_heads

    def noted(codec: LayerCodec, channels: Tensor, heads: slice, *places: Any) -> None:
        tiles.append(heads.stop - heads.start)
        write(codec, channels, heads, *places)

    monkeypatch.setattr(LayerCodec, "write_heads", noted)
    outputs: list[Tensor] = []
    for tile_mib in (1, 2, 64, None):
        metadata = AttentionMetadata(own, own, older, runtime=RuntimeConfig(tile_mib=tile_mib))
        outputs.append(dense(x[:, 3_000:], attended, metadata))
    # The last tile ends with the last head.
    assert tiles == [1, 1, 1, 2, 1, 3, 3]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-10)
    # The same as one softmax over keys and values that are decoded beforehand.
    whole = tuple(part.flatten(2) for part in past.heads(slice(0, HEADS)))
    joined = tuple(torch.cat(parts, 1) for parts in zip(whole, attended.entries, strict=True))
    expected = dense(x[:, 3_000:], AttendedTokens(joined), AttentionMetadata(own, rotary))
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-10)


# Gradients


def test_gradients_pass_the_rounding_as_if_it_were_not_there(dense: DenseSelfAttention) -> None:
    pull, rank = noise(1, 40, len(MIXED.widths)).double(), len(MIXED.widths)
    gradients: list[Tensor] = []
    for rate in (MIXED, Rate((16,) * rank, quantised=False)):
        codec = layer_codec(dense, 40, rate)
        channels = codec.past(*entries_of(dense, 40)).channels
        gradients += torch.autograd.grad((channels * pull).sum(), codec.encode)
    assert torch.equal(*gradients)
    assert gradients[0][:rank].any(1).all()
    assert not gradients[0][rank:].any()


@pytest.mark.parametrize("size", [Sizes(4), Sizes(192)])
def test_training_reaches_encoders_and_decoders_and_nothing_else(size: Sizes) -> None:
    model = codec_model(CachePolicy(4, 1), size).requires_grad_(False)
    names = {n for n, _ in model.named_parameters() if n.endswith(("codec.encode", "codec.decode"))}
    assert len(names) == 2 * LAYERS
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    latents, timestep, context = clip_of(model, 8)
    mask = block_causal_mask(8, 2, model.config.tokens_per_frame, model.config.cache)
    model(latents, timestep, context, torch.arange(8), mask).square().mean().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached == names
    for block in model.all_blocks():
        assert block.codec is not None
        used = len(block.codec.rate.widths)
        encode, decode = block.codec.encode.grad, block.codec.decode.grad
        assert encode is not None and decode is not None
        assert encode.isfinite().all() and decode.isfinite().all()
        assert encode[:used].any(1).all() and decode[:, :used].any(0).all()
        assert not encode[used:].any() and not decode[:, used:].any()
    assert before and all(torch.equal(model.get_buffer(n), b) for n, b in before.items())
    assert not any(buffer.requires_grad for buffer in model.buffers())
