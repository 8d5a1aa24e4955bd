"""Measure a checkpoint against its dense model on held-out clips."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import torch

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import EvaluateConfig, MediaConfig, RuntimeConfig, SourceConfig
from vmla_convert.errors import ConfigError
from vmla_convert.generating.clip_cost import (
    PlannedWork,
    passing_flops,
    plan_work,
    sampling_flops,
)
from vmla_convert.generating.make_clips import check_needs, ready_clips
from vmla_convert.generating.memory import generation_memory
from vmla_convert.generating.own_samples import split_prompts
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.loading.load import build, compute_device, is_codec, locate, open_named
from vmla_convert.loading.teacher import check_pair, check_same, teacher_of
from vmla_convert.measuring.evaluate import HeldOut, dense_rows, held_out_needs, measuring_bar
from vmla_convert.measuring.rollouts import rollout_agreement
from vmla_convert.measuring.rows import cache_rows, error_rows
from vmla_convert.media.open import check_prompts, default_prompts, open_media
from vmla_convert.media.prompts import EncodedPrompts
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import Row

DENSE_PASSES = 2
ROLLOUTS = 3
"""The dense model's, the conversion's, and the conversion along the dense model's."""


def measure_against_dense(
    checkpoint: SourceConfig,
    teacher: SourceConfig | None = None,
    config: EvaluateConfig | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
    media: MediaConfig | None = None,
) -> list[Row]:
    """Rows of a dense model and of a conversion on held-out clips.

    Clips are streamed through caches where a size, a dtype or other settings of the cache are
    given; else each clip is one masked pass.

    Args:
        checkpoint: The conversion; or the dense model itself, whose cache may be quantised.
        teacher: The dense model; None for a codec's base model.
        config: Held-out clips.
        runtime: Size, dtypes and backend.
        progress: Receives the progress bar.
        media: Text encoder and VAE for clips that have to be made, and the folder of these clips.

    Raises:
        CheckpointError: A checkpoint cannot be found, or the two do not fit.
        ConfigError: The clips do not fit, or the model cannot have the runtime.
    """
    config, runtime = config or EvaluateConfig(), runtime or RuntimeConfig()
    converted, source = _open_both(checkpoint, teacher, runtime)
    cached = replace(runtime, dtype=None) != RuntimeConfig()
    measured = cached or not converted.config.is_dense
    prompts = _rollout_prompts(source, config, measured)
    [data] = ready_clips(source, held_out_needs(config), media, progress)
    config, device = replace(config, data=data), compute_device()
    own = open_media(source.config, media, source.source.path, device) if prompts else None
    text = EncodedPrompts(own, prompts, progress) if own else None
    dtype = getattr(torch, runtime.dtype or "float32")
    dense, model = build(source, device, dtype), build(converted, device, dtype)
    dense.config = replace(dense.config, cache=model.config.cache)
    # The dense model, the dense model with another clip's past, then the conversion.
    passes = DENSE_PASSES + 1 if measured else DENSE_PASSES
    with measuring_bar(progress or Silent(), config, passes) as bar:
        held_out = HeldOut(dense, config, cached or bool(checkpoint.overrides), bar)
        rows = dense_rows(dense, held_out)
        if measured:
            errors = held_out.measure(model, runtime if cached else None)
            rows += error_rows(errors, model.config, None, runtime=runtime)
            rows += cache_rows(model.config, runtime=runtime)
    if own and text:
        context, frames = text.encode_prompts(prompts), config.rollout_frames
        progress = progress or Silent()
        rows += rollout_agreement(
            dense,
            model,
            context,
            frames,
            own,
            progress,
            runtime,
            prompts=prompts,
            features=config.features,
        )
    return rows


def _rollout_prompts(source: OpenCheckpoint, config: EvaluateConfig, measured: bool) -> list[str]:
    """The held-out prompts of the videos to compare, which take turns.

    Raises:
        ConfigError: There is nothing to compare the dense model with, or too few prompts.
    """
    if not config.rollout_frames:
        return []
    if not measured:
        raise ConfigError(
            "a rollout is compared with the dense model's, and this is the dense model",
            "name a conversion, or quantise the cache: --cache-dtype int4",
        )
    prompts = config.data.prompts or default_prompts(source.config)
    check_prompts(source.config, prompts)
    return list(islice(cycle(split_prompts(prompts, "held_out")), config.rollout_clips))


def plan_against_dense(
    checkpoint: SourceConfig,
    teacher: SourceConfig | None,
    config: EvaluateConfig,
    runtime: RuntimeConfig,
    media: MediaConfig,
) -> PlannedWork:
    """Check a measurement as `measure_against_dense` does, and predict its work."""
    converted, source = _open_both(checkpoint, teacher, runtime)
    works, item = check_needs(source, held_out_needs(config), media), 4
    memory = generation_memory(converted.config, runtime, item, media)
    passes = float((DENSE_PASSES + 1) * config.clips)
    if config.rollout_frames:
        video = sampling_flops(source.config, config.rollout_frames)
        videos = ROLLOUTS * config.rollout_clips * video
        passes += videos / passing_flops(source.config, works[0])
    return plan_work(source, works, [passes], media, memory)


def _open_both(
    checkpoint: SourceConfig, teacher: SourceConfig | None, runtime: RuntimeConfig
) -> tuple[OpenCheckpoint, OpenCheckpoint]:
    """Open a conversion and its dense model, and check that they fit."""
    if teacher is not None and checkpoint.checkpoint == teacher.checkpoint:
        checkpoint = replace(checkpoint, file=teacher.file, key=teacher.key)
    if teacher is not None and is_codec(locate(checkpoint)[0]):
        checkpoint = replace(checkpoint, base_model=teacher.checkpoint)
    origin = teacher_of(replace(checkpoint, overrides={}), teacher)
    source, converted = open_named(origin), open_named(checkpoint)
    check_pair(converted.config, source.config)
    if converted.config.is_dense:
        check_same(replace(checkpoint, overrides={}), origin)
    check_runtime(converted.config, runtime)
    return converted, source
