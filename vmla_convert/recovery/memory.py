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

    Counted are the student and, for MLA layers, the dense model; with `offload` or `shard` only the
    new weights, one block of each model and the tensors outside the dense blocks; for all clips the
    block's input and the layer's input and output; and one pass of the layer with gradients.
    """
    geometry, item = config.geometry, _frozen_itemsize(recover)
    per_frame = geometry.tokens_per_frame((clip.height, clip.width))
    trained, held = drawn_clips(geometry, clip.frames, (clip.height, clip.width))
    tokens = 2 * clip.frames * per_frame
    latents = torch.empty((1, clip.frames, 1, clip.height, clip.width), device="meta")
    together = min(clips_at_once(geometry, latents), recover.training.batch_size)
    product = 2 if recover.training.mixed_precision != "no" else FLOAT32
    # Autograd keeps no feed-forward here.
    one_by_one = recover.offload or recover.shard
    layer = block_bytes(config, clip.frames, together * tokens, product, casts=one_by_one)
    layer -= product * together * tokens * geometry.ffn_dim
    new = _trained_count(config, "new")
    dense = replace(config, mla=None, codec=None)
    if one_by_one:
        shell = parameter_count(replace(dense, geometry=replace(geometry, num_layers=0)))
        both = parameter_count(config) + parameter_count(dense) - 2 * shell
        weights = FLOAT32 * (new + shell + both // geometry.num_layers)
    else:
        numbers = parameter_count(config) - new
        numbers += parameter_count(dense) if config.mla is not None else 0
        weights = item * numbers + FLOAT32 * new
    # The output of the layer has the dtype of products; the inputs of block and layer are float32.
    streams = (2 * FLOAT32 + product) * tokens * geometry.dim * (trained + held)
    return Memory(weights + streams + layer)


def _distillation(
    config: ModelConfig, recover: RecoverConfig, clip: ClipShape, processes: int
) -> Memory:
    """Peak of a step: both models, state of the optimiser, and one pass with gradients.

    A codec and its dense model share their weights unless they are sharded. A trained number has a
    gradient, two moments (one with Muon), its best and its first value, and an average if asked
    for. Frozen matrices have the dtype of mixed precision.
    """
    training, item = recover.training, _frozen_itemsize(recover)
    clips = max(1, training.batch_size // (processes * training.accumulate))
    activations = training_pass_bytes(
        config,
        clip,
        clips,
        training.mixed_precision != "no",
        training.gradient_checkpointing,
        recover.train,
        training.offload_activations,
        casts=item == FLOAT32,
    )
    numbers, trained = parameter_count(config), _trained_count(config, recover.train)
    copies = (4 if training.optimizer == "muon" else 5) + bool(training.ema)
    two_models = config.mla is not None or recover.shard
    dense = parameter_count(replace(config, mla=None, codec=None)) if two_models else 0
    state = item * (numbers - trained + dense) + FLOAT32 * (1 + copies) * trained
    host = _block_inputs(config, clip, clips) if training.offload_activations else 0
    if not recover.shard:
        return Memory(state + activations, host)
    # Two blocks are gathered at a time; each process reads one whole tensor after the other.
    geometry = config.geometry
    block = item * numbers // geometry.num_layers
    largest = FLOAT32 * geometry.dim * geometry.ffn_dim
    return Memory(state // processes + 2 * block + activations, host, staging=largest)


def _frozen_itemsize(recover: RecoverConfig) -> int:
    """Bytes of a number of frozen matrices."""
    exact = recover.lora_rank or recover.dmd.steps
    return FLOAT32 if recover.training.mixed_precision == "no" or exact else 2


def _block_inputs(config: ModelConfig, clip: ClipShape, clips: int) -> int:
    """Bytes of the inputs of all blocks of a pass."""
    geometry = config.geometry
    tokens = 2 * clips * clip.frames * geometry.tokens_per_frame((clip.height, clip.width))
    each = tokens + clips * (geometry.text_len + 2 * clip.frames * 6)
    return FLOAT32 * geometry.num_layers * each * geometry.dim


@cache
def _trained_count(config: ModelConfig, train: Scope) -> int:
    """Numbers that train."""
    with torch.device("meta"):
        student = CausalWanModel(config).requires_grad_(False)
    unfreeze(student, train)
    return sum(p.numel() for p in student.parameters() if p.requires_grad)
