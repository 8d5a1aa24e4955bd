"""Formulas of peak memory are those of the tensors of true models."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from peak_bytes import counted_bytes, fake_model
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from evals.scale import SIZES
from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    MLAConfig,
    ModelConfig,
    RuntimeConfig,
    SamplerConfig,
    Sizes,
    TrainingConfig,
)
from vmla_convert.layers.memory import (
    ClipShape,
    Memory,
    parameter_count,
    streaming_memory,
    training_pass_bytes,
)
from vmla_convert.maths.rates import Rate
from vmla_convert.recovery.trained import Scope, unfreeze
from vmla_convert.training import losses
from vmla_convert.training.losses import Example, predicted_velocity, teacher_forcing_inputs
from vmla_convert.training.processes import precision

LAYERS, CHANNELS, ROPE = 3, 256, 16
FRAME = (60, 104)  # of 480p video


def true_width(size: str, product: str, window: int = 21) -> ModelConfig:
    """A model of true width with two layers."""
    geometry = replace(SIZES[size], num_layers=LAYERS)
    config = ModelConfig(geometry, FRAME, 3, CachePolicy(window), SamplerConfig())
    if product == "codec":
        return replace(config, codec=CodecConfig(CHANNELS, Sizes(cut=0.95)))
    mla = MLAConfig((192,) * LAYERS, (tuple(range(ROPE)),) * LAYERS, "spectral")
    return replace(config, mla=mla) if product == "mla" else config


def choose_rates(model: nn.Module) -> None:
    """Give every codec a rate; fake energies would have none."""
    for block in model.get_submodule("blocks").children():
        if (codec := getattr(block, "codec", None)) is not None:
            codec.rate = Rate((8,) * CHANNELS, quantised=True)


STREAMS = [
    ("1.3b", "dense", torch.bfloat16, 64),
    ("1.3b", "codec", torch.bfloat16, 64),
    ("1.3b", "codec", torch.bfloat16, 1024),
    *[
        pytest.param(*row, marks=pytest.mark.slow)
        for row in (
            ("1.3b", "dense", torch.float32, 64),
            ("1.3b", "codec", torch.float32, 1024),
            ("1.3b", "int8", torch.bfloat16, 64),
            ("1.3b", "mla", torch.bfloat16, 1024),
            ("1.3b", "mla", torch.float32, 1024),
            ("14b", "dense", torch.bfloat16, 1024),
            ("14b", "codec", torch.bfloat16, 1024),
        )
    ],
]


@pytest.mark.parametrize(("size", "product", "dtype", "tile_mib"), STREAMS)
def test_streaming_takes_the_memory_of_the_formula(
    size: str, product: str, dtype: torch.dtype, tile_mib: int
) -> None:
    config = true_width(size, product)
    cache_dtype = "int8" if product == "int8" else "auto"
    runtime = RuntimeConfig(tile_mib=tile_mib, backend="materialised", cache_dtype=cache_dtype)
    with torch.no_grad(), counted_bytes() as counted:
        model = fake_model(config, dtype)
        choose_rates(model)
        cache = model.new_cache(1, runtime)
        prompt = model.project_prompt(torch.zeros(1, 512, 4096, dtype=dtype))
        for _ in range(8):
            cache.open_chunk(3)
            chunk = torch.zeros(1, 3, 16, *FRAME, dtype=dtype)
            model.stream(chunk, torch.zeros(1, 3), prompt, cache)
    formula = streaming_memory(config, runtime, dtype.itemsize, on_gpu=False)
    assert formula.device == pytest.approx(counted.peak, rel=0.1)


def test_an_offloaded_cache_lies_in_host_memory() -> None:
    config = true_width("1.3b", "dense")
    here, there = (streaming_memory(config, RuntimeConfig(offload=off), 2) for off in (False, True))
    assert there.host == config.cache_bytes(21)
    assert here.device - there.device == config.cache_bytes(21) * (LAYERS - 1) // LAYERS


PASSES = [
    ("1.3b", "codec", 9, "bf16", True, "new"),
    *[
        pytest.param(*row, marks=pytest.mark.slow)
        for row in (
            ("1.3b", "codec", 21, "bf16", True, "new"),
            ("1.3b", "codec", 9, "no", True, "new"),
            ("1.3b", "codec", 9, "bf16", False, "new"),
            ("1.3b", "codec", 9, "bf16", True, "attention"),
            ("1.3b", "codec", 9, "bf16", True, "all"),
            ("1.3b", "mla", 21, "bf16", True, "new"),
            ("1.3b", "mla", 9, "no", True, "new"),
            ("14b", "codec", 21, "bf16", True, "new"),
        )
    ],
]


@pytest.mark.parametrize(("size", "product", "frames", "mixed", "checkpointed", "scope"), PASSES)
def test_a_training_pass_takes_the_memory_of_the_formula(
    size: str,
    product: str,
    frames: int,
    mixed: Literal["no", "bf16"],
    checkpointed: bool,
    scope: Scope,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = true_width(size, product)

    def real_inputs(config: ModelConfig, _: Example) -> object:
        with unset_fake_temporarily():
            return teacher_forcing_inputs(config, Example(*map(torch.zeros_like, meta)))

    shapes = [(1, 2 * frames, 16, *FRAME), (1, 2 * frames), (1, frames, 16, *FRAME), (1, 512, 4096)]
    meta = [torch.zeros(shape, device="meta") for shape in shapes]
    monkeypatch.setattr(losses, "teacher_forcing_inputs", real_inputs)
    with counted_bytes() as counted:
        model = fake_model(config, torch.float32)
        choose_rates(model)
        unfreeze(model, scope)
        if checkpointed:
            model.checkpoint_blocks()
        example, before = Example(*map(torch.zeros, shapes)), counted.live
        with precision(TrainingConfig(mixed_precision=mixed)):
            velocity = predicted_velocity(model, config, example)
        velocity.square().mean().backward()
    clip = ClipShape(frames, *FRAME)
    formula = training_pass_bytes(config, clip, 1, mixed == "bf16", checkpointed, scope)
    assert formula == pytest.approx(counted.peak - before, rel=0.1)


def test_the_count_of_parameters_is_that_of_the_released_model() -> None:
    config = replace(true_width("1.3b", "dense"), geometry=SIZES["1.3b"])
    assert parameter_count(config) == 1_418_996_800


def test_the_peak_of_two_phases_is_the_larger_of_each_part() -> None:
    assert Memory(3, 1, 2).peak(Memory(2, 4, 0)) == Memory(3, 4, 2, together=6)
    assert Memory(3, 4, 2).without_gpu == 7
