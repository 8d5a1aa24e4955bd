"""Peak memory of a recovery, by formula."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from vmla_convert.config import ModelConfig, RecoverConfig
from vmla_convert.fitting.calibration_clips import clips_at_once
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.memory import (
    FLOAT32,
    ClipShape,
    Memory,
    block_bytes,
    parameter_count,
    training_pass_bytes,
)
from vmla_convert.recovery.layerwise import drawn_clips
from vmla_convert.recovery.stages import later_steps
from vmla_convert.recovery.trained import Scope, unfreeze


def recovery_memory(
    config: ModelConfig, recover: RecoverConfig, clip: ClipShape, processes: int = 1
) -> Memory:
    """Peak of a recovery for each process: the layer-wise stage, then distillation.

    Not counted are rollouts of the on-policy stage, adapters, and the critic of `dmd`.

    Args:
        config: The converted model.
        recover: Steps, batch and savings.
        clip: Shape of a clip.
        processes: Processes that train together, one to a GPU.
    """
    peak = Memory(0)
    if recover.layerwise_steps:
        peak = peak.peak(_layerwise(config, recover, clip))
    if later_steps(recover):
        peak = peak.peak(_distillation(config, recover, clip, processes))
    return peak


def _layerwise(config: ModelConfig, recover: RecoverConfig, clip: ClipShape) -> Memory:
    """Peak of fitting one layer.

    Counted are the whole student in float32; one dense block or, without `offload` and `shard`,
    the dense model of MLA layers; for all clips the block's input and output and the layer's input
    and output, twice; and one pass of the layer with gradients.
    """
    geometry = config.geometry
    per_frame = geometry.tokens_per_frame((clip.height, clip.width))
    trained, held = drawn_clips(geometry, clip.frames, (clip.height, clip.width))
    tokens = 2 * clip.frames * per_frame
    latents = torch.empty((1, clip.frames, 1, clip.height, clip.width), device="meta")
    together = min(clips_at_once(geometry, latents), recover.training.batch_size)
    stream = FLOAT32 * tokens * geometry.dim
    # Autograd keeps no feed-forward here.
    layer = block_bytes(config, clip.frames, together * tokens, FLOAT32)
    layer -= FLOAT32 * together * tokens * geometry.ffn_dim
    one = replace(config, geometry=replace(geometry, num_layers=1), mla=None, codec=None)
    dense = parameter_count(one)
    if config.mla is not None and not (recover.offload or recover.shard):
        dense = parameter_count(replace(config, mla=None))
    weights = FLOAT32 * (parameter_count(config) + dense)
    return Memory(weights + 5 * stream * (trained + held) + layer)


def _distillation(
    config: ModelConfig, recover: RecoverConfig, clip: ClipShape, processes: int
) -> Memory:
    """Peak of a step: both models, state of the optimiser, and one pass with gradients.

    A codec and its dense model share their weights unless they are sharded. A trained number has a
    gradient, two moments (one with Muon), its best and its first value, and an average if asked
    for. A sharded model is first built whole, by each process in host memory.
    """
    training = recover.training
    clips = max(1, training.batch_size // (processes * training.accumulate))
    activations = training_pass_bytes(
        config,
        clip,
        clips,
        training.mixed_precision != "no",
        training.gradient_checkpointing,
        recover.train,
    )
    numbers, trained = parameter_count(config), _trained_count(config, recover.train)
    copies = (4 if training.optimizer == "muon" else 5) + bool(training.ema)
    two_models = config.mla is not None or recover.shard
    dense = parameter_count(replace(config, mla=None, codec=None)) if two_models else 0
    state = FLOAT32 * (numbers + dense + copies * trained)
    if not recover.shard:
        return Memory(state + activations)
    geometry = config.geometry
    block = FLOAT32 * numbers // geometry.num_layers
    return Memory(state // processes + 2 * block + activations, staging=FLOAT32 * numbers)


@cache
def _trained_count(config: ModelConfig, train: Scope) -> int:
    """Numbers that train."""
    with torch.device("meta"):
        student = CausalWanModel(config).requires_grad_(False)
    unfreeze(student, train)
    return sum(p.numel() for p in student.parameters() if p.requires_grad)
