"""Peak memory of a recovery: which settings save, and the sizes of released models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evals.scale import SIZES
from vmla_convert.config import (
    CachePolicy,
    CodecConfig,
    MLAConfig,
    ModelConfig,
    RecoverConfig,
    SamplerConfig,
    Sizes,
    TrainingConfig,
)
from vmla_convert.layers.memory import ClipShape, parameter_count
from vmla_convert.recovery.memory import recovery_memory

CLIP = ClipShape(21, 60, 104)
TRAINING = TrainingConfig(
    batch_size=8, accumulate=8, mixed_precision="bf16", gradient_checkpointing=True, ema=0.99
)
RECOVER = RecoverConfig(layerwise_steps=0, training=TRAINING)
GB = 1e9


def with_codec(size: str) -> ModelConfig:
    """A model of true size with a codec."""
    codec = CodecConfig(SIZES[size].dim // 6, Sizes(cut=0.95))
    policy, sampler = CachePolicy(21), SamplerConfig()
    return ModelConfig(SIZES[size], (60, 104), 3, policy, sampler, codec=codec)


@pytest.mark.parametrize(
    "more",
    [
        {"accumulate": 4},
        {"mixed_precision": "no"},
        {"gradient_checkpointing": False},
        {"optimizer": "adamw", "ema": 0.99},
    ],
)
def test_each_saving_of_the_loop_saves(more: dict[str, object]) -> None:
    config = with_codec("1.3b")
    least = replace(TRAINING, optimizer="muon", ema=0.0)
    saved = recovery_memory(config, replace(RECOVER, training=least), CLIP)
    training = replace(least, **more)
    assert recovery_memory(config, replace(RECOVER, training=training), CLIP).device > saved.device


def test_shards_divide_the_weights_and_not_the_activations() -> None:
    config = with_codec("14b")
    one, eight = (
        recovery_memory(config, replace(RECOVER, shard=True), CLIP, processes)
        for processes in (1, 8)
    )
    student, dense = parameter_count(config), parameter_count(replace(config, codec=None))
    # Frozen numbers take two bytes. A number of the codec has a gradient, two moments, best and
    # first values and an average.
    nbytes = 2 * 2 * dense + 4 * 7 * (student - dense)
    assert one.device - eight.device == pytest.approx(nbytes * 7 / 8, rel=0.02)
    # No process reads more than one tensor at a time.
    assert eight.staging < 3e8


def test_an_mla_student_needs_its_dense_model_too_and_reads_it_block_by_block_offloaded() -> None:
    codec = with_codec("1.3b")
    mla = MLAConfig((192,) * 30, (tuple(range(16)),) * 30, "spectral")
    config = replace(codec, codec=None, mla=mla)
    layerwise = replace(RECOVER, layerwise_steps=40, training=replace(TRAINING, steps=0))
    whole = recovery_memory(config, layerwise, CLIP)
    offloaded = recovery_memory(config, replace(layerwise, offload=True), CLIP)
    dense = parameter_count(replace(codec, codec=None))
    # Two models in 16 bits, but for two blocks in 32.
    assert 3.5 * dense < whole.device - offloaded.device < 4 * dense
    distilled = recovery_memory(config, RECOVER, CLIP).device
    assert distilled > recovery_memory(codec, RECOVER, CLIP).device + dense


def test_inputs_of_blocks_move_to_the_host() -> None:
    config = with_codec("1.3b")
    here, there = (
        recovery_memory(config, replace(RECOVER, training=replace(TRAINING, **more)), CLIP)
        for more in ({}, {"offload_activations": True})
    )
    # 28 of 30 inputs: one is computed with, and one is on its way.
    assert here.device - there.device == pytest.approx(there.host * 28 / 30, rel=0.02)
    assert here.host == 0


@pytest.mark.parametrize(
    ("size", "frames", "processes", "device", "host"),
    [("1.3b", 21, 1, 22, 40), ("14b", 6, 8, 76, 120)],
)
def test_released_models_recover_on_their_cards(
    size: str, frames: int, processes: int, device: int, host: int
) -> None:
    training = replace(
        TRAINING, accumulate=8 // processes, offload_activations=processes == 1, ema=0.99
    )
    recover = RecoverConfig(40, shard=processes > 1, training=training)
    config = replace(with_codec(size), cache=CachePolicy(frames))
    memory = recovery_memory(config, recover, ClipShape(frames, 60, 104), processes)
    assert memory.device < device * GB
    assert processes * (memory.host + memory.staging) < host * GB
