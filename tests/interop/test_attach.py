"""A codec in a program of Self-Forcing's type: without loss it changes nothing."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_GEOMETRY, noise, tiny_config, tiny_model
from torch import Tensor, nn

import vmla_convert as vmla
from evals import dictionary_host
from evals.dictionary_host import Pipeline
from vmla_convert.checkpoint.base import PRECISION, tensor_hash
from vmla_convert.config import CachePolicy, CodecConfig, Sizes
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.interop.attach import base_tensors_of, find_host
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.codec import Codec

WIDTH, LAYERS = TINY_GEOMETRY.dense_cache_scalars, TINY_GEOMETRY.num_layers
POLICIES = [
    # policy, frames of a chunk; 14 frames are more than any window
    (CachePolicy(6, 2), 2),
    (CachePolicy(5), 1),
    (CachePolicy(7, 1), 2),
    (CachePolicy(4), 2),
    (CachePolicy(2), 2),  # a window of one chunk, which attends to nothing else
    (CachePolicy(14), 7),
]
policies = pytest.mark.parametrize(("policy", "chunk"), POLICIES)


SIX = CachePolicy(6, 2)


def network(policy: CachePolicy = SIX, chunk: int = 2, seed: int = 0) -> CausalWanModel:
    return tiny_model(tiny_config(cache=policy, chunk_frames=chunk), seed)


def codec(rank: int = WIDTH, seed: int = 0) -> Codec:
    """A codec of the tiny model, fitted to random tokens."""
    config = tiny_config(codec=CodecConfig(rank, Sizes(rank=rank)))
    blocks = tiny_model(config, seed).all_blocks()
    tensors = base_tensors_of(find_host(Pipeline(network(seed=seed))))
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    record = {"base": {"precision": PRECISION, "tensors": hashes}}
    return Codec(config, tuple(b.codec for b in blocks if b.codec), record)


WHOLE: dict[str, Any] = {"cache_dtype": "model"}


def near(one: Tensor, other: Tensor, least: float = 1e-5) -> bool:
    return bool((one - other).abs().max() < least)


@policies
@pytest.mark.parametrize("batch", [1, 2])
def test_a_codec_without_loss_is_the_dense_cache(
    policy: CachePolicy, chunk: int, batch: int
) -> None:
    pipeline = Pipeline(network(policy, chunk))
    dense = pipeline.clip(14, batch)
    vmla.attach(pipeline, codec(), **WHOLE)
    assert near(pipeline.clip(14, batch), dense)


def test_a_smaller_codec_changes_the_past_alone() -> None:
    pipeline = Pipeline(network())
    dense = pipeline.clip(14)
    vmla.attach(pipeline, codec(), bytes_per_token=24)
    found = pipeline.clip(14)
    assert torch.equal(found[:, :2], dense[:, :2])
    assert not near(found[:, 2:4], dense[:, 2:4], 1e-4)


def test_detach_gives_the_dense_cache_back_and_attach_works_again() -> None:
    pipeline = Pipeline(network())
    dense = pipeline.clip(14)
    for _ in range(2):
        vmla.attach(pipeline, codec(), bytes_per_token=24)
        assert not near(pipeline.clip(14), dense, 1e-4)
        vmla.detach(pipeline)
        assert pipeline.kv_cache1 and isinstance(pipeline.kv_cache1[0]["k"], Tensor)
        assert torch.equal(pipeline.clip(14), dense)
    fresh = Pipeline(network())
    vmla.attach(fresh, codec())
    vmla.detach(fresh)
    assert torch.equal(fresh.clip(14), dense)


def test_detach_keeps_what_is_cached() -> None:
    pipeline = Pipeline(network())
    pipeline.clip(14)
    before = [(c["k"].clone(), c["v"].clone()) for c in pipeline.kv_cache1 or []]
    vmla.attach(pipeline, codec(), **WHOLE)
    pipeline.clip(14)
    vmla.detach(pipeline)
    for old, new in zip(before, pipeline.kv_cache1 or [], strict=True):
        assert near(old[0], new["k"]) and near(old[1], new["v"])


def test_two_pipelines_at_once() -> None:
    one, other = Pipeline(network()), Pipeline(network(CachePolicy(5, 1)))
    expected = one.clip(14, seed=1), other.clip(12, seed=2)
    vmla.attach(one, codec(), **WHOLE)
    vmla.attach(other, codec(), bytes_per_token=30)
    assert near(one.clip(14, seed=1), expected[0])
    assert not near(other.clip(12, seed=2), expected[1], 1e-4)
    vmla.detach(other)
    assert torch.equal(other.clip(12, seed=2), expected[1])
    assert near(one.clip(14, seed=1), expected[0])


def test_clips_follow_each_other_and_prompts_change() -> None:
    plain, pipeline = Pipeline(network()), Pipeline(network())
    vmla.attach(pipeline, codec(), **WHOLE)
    later = noise(1, TINY_GEOMETRY.text_len, TINY_GEOMETRY.text_dim, seed=9)
    for frames, prompt in ((14, None), (4, None), (10, later), (14, None)):
        found, expected = (p.clip(frames, 1, frames, prompt) for p in (pipeline, plain))
        assert near(found, expected)


def test_half_precision() -> None:
    pipeline = Pipeline(network().to(torch.bfloat16))
    dense = pipeline.clip(14)
    attached = vmla.attach(pipeline, codec(), **WHOLE)
    found = pipeline.clip(14)
    assert found.dtype == torch.bfloat16
    # Two bfloat16 rollouts that round differently are as far apart.
    assert (found - dense).norm() / dense.norm() < 0.03
    assert attached.nbytes == attached.dense_bytes


def test_inference_mode() -> None:
    pipeline = Pipeline(network())
    dense = pipeline.clip(14)
    vmla.attach(pipeline, codec(), **WHOLE)
    with torch.inference_mode():
        assert near(pipeline.clip(14), dense)
    vmla.detach(pipeline)
    assert torch.equal(pipeline.clip(14), dense)


@pytest.mark.parametrize("what", ["forward", "module"])
def test_a_compiled_attention(what: str) -> None:
    pipeline = Pipeline(network())
    dense = pipeline.clip(8)
    for block in pipeline.generator.all_blocks():
        layer: Any = block.self_attn
        if what == "forward":
            layer.forward = torch.compile(layer.forward, backend="eager")
        else:
            compiled: Any = torch.compile(layer, backend="eager")
            block.self_attn = compiled
    vmla.attach(pipeline, codec(), **WHOLE)
    assert near(pipeline.clip(8), dense)
    vmla.detach(pipeline)
    assert near(pipeline.clip(8), dense)


def test_only_some_layers() -> None:
    pipeline = Pipeline(network())
    dense = pipeline.clip(14)
    attached = vmla.attach(pipeline, codec(), bytes_per_token=24, layers=[1])
    found = pipeline.clip(14)
    assert not near(found, dense, 1e-4)
    first, second = pipeline.kv_cache1 or []
    assert isinstance(first["k"], Tensor) and not isinstance(second["k"], Tensor)
    assert attached.nbytes == second["k"].shape[1] * 24


def test_layers_that_do_not_exist_are_refused() -> None:
    for layers in ([], [2], [-1, 0]):
        with pytest.raises(ConfigError, match="0 to 1"):
            vmla.attach(Pipeline(network()), codec(), layers=layers)


def test_bytes_are_the_formula_and_dense_tensors_are_never_made() -> None:
    pipeline = Pipeline(network())
    made = list[str]()
    initialise = pipeline._initialize_kv_cache

    def watched(batch_size: int, dtype: torch.dtype, device: Any) -> None:
        made.append(str(device))
        initialise(batch_size, dtype, device)

    pipeline._initialize_kv_cache = watched
    attached = vmla.attach(pipeline, codec(), bytes_per_token=32)
    pipeline.clip(14, batch=2)
    slots = 6 * pipeline.config.tokens_per_frame
    assert attached.nbytes == 2 * LAYERS * slots * 32
    assert attached.dense_bytes == 2 * LAYERS * slots * WIDTH * 4
    assert made == ["meta"]


def test_an_unknown_program_is_refused_by_what_was_looked_for() -> None:
    for program in (nn.Linear(2, 2), object.__new__(Pipeline)):
        with pytest.raises(ConfigError) as caught:
            vmla.attach(program, codec())
        for name in ("norm_k", "kv_cache", type(program).__name__):
            assert name in caught.value.message
        assert "Write a host" in caught.value.hint


def test_another_model_is_refused(tmp_path: Path) -> None:
    other = Pipeline(network(seed=7))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.k"):
        vmla.attach(other, codec())
    vmla.attach(other, codec(), check_base=False)
    geometry = dataclasses.replace(TINY_GEOMETRY, num_layers=3)
    with pytest.raises(CheckpointError, match="3"):
        vmla.attach(Pipeline(tiny_model(tiny_config(geometry))), codec())
    with pytest.raises(CheckpointError):
        vmla.attach(other, tmp_path)


def test_a_copy_of_the_model_in_half_precision_is_the_same_model() -> None:
    vmla.attach(Pipeline(network().to(torch.bfloat16)), codec())


def test_attaching_twice_and_detaching_nothing_are_refused() -> None:
    pipeline = Pipeline(network())
    with pytest.raises(ConfigError):
        vmla.detach(pipeline)
    vmla.attach(pipeline, codec())
    with pytest.raises(ConfigError):
        vmla.attach(pipeline, codec())
    with pytest.raises(ConfigError), vmla.observe(pipeline):
        pass
    vmla.detach(pipeline)
    with pytest.raises(ConfigError, match="1000"):
        vmla.attach(pipeline, codec(), bytes_per_token=1000)


def test_attaching_within_a_clip_is_refused() -> None:
    pipeline = Pipeline(network())
    pipeline.clip(4)
    vmla.attach(pipeline, codec())
    x, context = noise(1, 2, 4, 4, 6), noise(1, 3, 5)
    with pytest.raises(ConfigError, match="slots 0 to"):
        pipeline.generator(x, 0, context, pipeline.kv_cache1 or [], 4 * 6)


@pytest.mark.parametrize("name", ["current_start", "grid_sizes"])
def test_a_layer_that_does_not_say_where_its_chunk_stands_is_refused(name: str) -> None:
    pipeline = Pipeline(network())

    known = {"current_start": "grid_sizes", "grid_sizes": "current_start"}[name]

    def forward(**given: Any) -> Any:
        return given

    vars(forward)["__signature__"] = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("kv_cache", known)]
    )
    layer: Any = pipeline.generator.all_blocks()[0].self_attn
    layer.forward = forward
    with pytest.raises(ConfigError, match=f"no {name}"):
        vmla.attach(pipeline, codec())


def test_keys_at_other_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:

    turns = dictionary_host.turns
    monkeypatch.setattr(dictionary_host, "turns", lambda start, *how: turns(start + 1, *how))
    pipeline = Pipeline(network())
    vmla.attach(pipeline, codec())
    with pytest.raises(ConfigError, match="positions"):
        pipeline.clip(4)
