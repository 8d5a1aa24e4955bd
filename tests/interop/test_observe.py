"""Watching a program changes nothing, and gives a codec of what the program caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_GEOMETRY, tiny_config, tiny_model
from torch import nn

import vmla_convert as vmla
from evals import dictionary_host
from evals.dictionary_host import Pipeline
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import CachePolicy
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.interop.observe import Seen
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.loading.codec import Codec, open_codec
from vmla_convert.loading.metadata_files import wan_config

FRAMES, CLIPS, CHANNELS = 12, 4, 40
WIDTH, PER_FRAME = TINY_GEOMETRY.dense_cache_scalars, 6


SIX = CachePolicy(6, 1)


def pipeline(policy: CachePolicy = SIX, chunk: int = 2) -> Pipeline:
    return Pipeline(tiny_model(tiny_config(cache=policy, chunk_frames=chunk)))


def watched(program: Pipeline, clips: int = CLIPS, frames: int = FRAMES, batch: int = 1) -> Seen:
    with vmla.observe(program) as seen:
        for seed in range(clips):
            program.clip(frames, batch, seed=10 + seed)
    return seen


@pytest.fixture(scope="module")
def fitted() -> Codec:
    return vmla.fit(watched(pipeline()), channels=CHANNELS)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_watched_program_makes_the_same_clips(batch: int, gradients: bool) -> None:
    plain, program = pipeline(), pipeline()
    with vmla.observe(program, gradients=gradients):
        for seed in (0, 1):
            assert torch.equal(program.clip(FRAMES, batch, seed), plain.clip(FRAMES, batch, seed))
    assert torch.equal(program.clip(FRAMES, batch), plain.clip(FRAMES, batch))


def test_the_last_pass_over_each_chunk_counts() -> None:
    program = pipeline()
    kept = list[torch.Tensor]()

    value = program.generator.all_blocks()[1].self_attn.get_submodule("v")
    hook = value.register_forward_hook(lambda *call: kept.append(call[-1].double()))
    seen = watched(program, clips=2)
    hook.remove()
    values = torch.cat(kept[len(dictionary_host.STEPS) :: len(dictionary_host.STEPS) + 1])
    values = values.flatten(0, -2)
    record = seen.layers[1]
    assert record.tokens == len(values) == 2 * FRAMES * PER_FRAME
    moments = record.statistics().past[1]
    torch.testing.assert_close(moments.mean[WIDTH // 2 :], values.mean(0), atol=1e-6, rtol=1e-5)
    found = moments.covariance[WIDTH // 2 :, WIDTH // 2 :]
    torch.testing.assert_close(found, values.T.cov(correction=0), atol=1e-6, rtol=1e-4)


def error(program: Pipeline, codec: Codec | Path, size: float, frames: int = FRAMES) -> list[float]:
    """Relative squared error of each chunk over four clips."""
    chunk, program.kv_cache1 = program.config.chunk_frames, None
    dense = program.clip(frames, batch=4).split(chunk, 1)
    vmla.attach(program, codec, bytes_per_token=size)
    found = program.clip(frames, batch=4).split(chunk, 1)
    vmla.detach(program)
    pairs = zip(found, dense, strict=True)
    return [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]


def test_a_larger_cache_is_more_accurate(fitted: Codec) -> None:
    errors = [sum(error(pipeline(), fitted, size)) for size in (4, 12, 40)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.slow
def test_in_place_shifts_do_not_drift() -> None:
    program = pipeline(CachePolicy(6, 1), chunk=1)
    codec = vmla.fit(watched(program, clips=6, frames=30), channels=WIDTH)
    errors = error(program, codec, WIDTH, frames=30)  # 8 bits for each number
    assert 0 < errors[29] <= 1.2**2 * errors[2]


def test_a_saved_codec_is_the_same(fitted: Codec, tmp_path: Path) -> None:
    fitted.save(tmp_path / "kv")
    opened = open_codec(tmp_path / "kv")
    assert opened.config == fitted.config
    assert {name: opened.record[name] for name in fitted.record} == fitted.record
    for one, other in zip(opened.layers, fitted.layers, strict=True):
        assert isinstance(one, LayerCodec)
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert error(pipeline(), tmp_path / "kv", 12) == error(pipeline(), fitted, 12)


def test_a_wan_models_codec_loads_beside_its_checkpoint(tmp_path: Path) -> None:
    program = pipeline()
    vmla.fit(watched(program), channels=CHANNELS).save(tmp_path / "kv")
    files = {"config.json": wan_config(program.config)}
    write_checkpoint(tmp_path / "base", program.generator.state_dict(), files)
    model = vmla.load(tmp_path / "kv", base_model=tmp_path / "base", bytes_per_token=12)
    assert model.config.cache == program.config.cache and model.config.chunk_frames == 2
    write_checkpoint(tmp_path / "other", tiny_model(tiny_config(), 5).state_dict(), files)
    with pytest.raises(CheckpointError):
        vmla.load(tmp_path / "kv", base_model=tmp_path / "other")


def test_a_model_with_other_layers_keeps_its_codec(tmp_path: Path) -> None:
    program = pipeline()
    program.generator.camera = nn.Linear(3, 3)
    codec = vmla.fit(watched(program), channels=CHANNELS)
    codec.save(tmp_path / "kv")
    assert codec.config.family == "unknown"
    assert max(error(program, tmp_path / "kv", 40)) < 0.01


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_those_of_the_models_output(mode: Callable[[], Any]) -> None:
    program = pipeline()
    with vmla.observe(program, gradients=True) as seen, mode():
        for seed in range(CLIPS):
            program.clip(FRAMES, seed=seed)
    stats = [layer.statistics().past[0] for layer in seen.layers]
    assert all(int(s.queries) == CLIPS * 5 * 3 * PER_FRAME * 2 for s in stats)
    # A model whose output does not depend on its last layer gives no weight to that layer.
    program = pipeline()
    nn.init.zeros_(program.generator.head.head.weight)
    with vmla.observe(program, gradients=True) as seen:
        program.clip(FRAMES)
    assert not any(layer.statistics().past[0].value_square.any() for layer in seen.layers)


def test_a_model_without_gradients_is_refused() -> None:
    program = pipeline()
    program.generator.forward = torch.no_grad()(program.generator.forward)
    with pytest.raises(ConfigError, match="Generator"), vmla.observe(program, gradients=True):
        program.clip(FRAMES)
    program.generator.blocks = nn.ModuleList([nn.Sequential(b) for b in program.generator.blocks])
    with pytest.raises(ConfigError, match="blocks"), vmla.observe(program, gradients=True):
        pass


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=rf"{2 * 4 * PER_FRAME} .* 60"):
        vmla.fit(watched(pipeline(), clips=2, frames=4), channels=60)
    with pytest.raises(ConfigError, match="nothing"):
        vmla.fit(watched(pipeline(), clips=0))
    with pytest.raises(ConfigError, match="earlier chunk"):
        vmla.fit(watched(pipeline(), clips=2, frames=2, batch=4), channels=4)


def test_a_program_can_be_watched_again_after_an_error() -> None:
    program = pipeline()
    with pytest.raises(KeyError), vmla.observe(program):
        raise KeyError
    assert watched(program).layers[0].tokens == CLIPS * FRAMES * PER_FRAME


def test_keys_at_other_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = dictionary_host.turns
    monkeypatch.setattr(dictionary_host, "turns", lambda start, *how: turns(2 * start, *how))
    with pytest.raises(ConfigError, match="positions"):
        watched(pipeline())
