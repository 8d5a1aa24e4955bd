"""Measure a checkpoint against its dense model on held-out clips."""

from __future__ import annotations

from dataclasses import replace

import torch

from vmla_convert.config import EvaluateConfig, MediaConfig, RuntimeConfig, SourceConfig
from vmla_convert.generating.make_clips import ready_clips
from vmla_convert.layers.runtime import check_runtime
from vmla_convert.loading.load import build, compute_device, is_codec, load, locate, open_named
from vmla_convert.loading.teacher import check_pair, check_same, teacher_of
from vmla_convert.measuring.evaluate import HeldOut, dense_rows, held_out_needs, measuring_bar
from vmla_convert.measuring.rows import cache_rows, error_rows
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import Row


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
    device, dtype = compute_device(), getattr(torch, runtime.dtype or "float32")
    if teacher is not None and checkpoint.checkpoint == teacher.checkpoint:
        checkpoint = replace(checkpoint, file=teacher.file, key=teacher.key)
    if teacher is not None and is_codec(locate(checkpoint)[0]):
        checkpoint = replace(checkpoint, base_model=teacher.checkpoint)
    source = teacher_of(replace(checkpoint, overrides={}), teacher)
    opened = open_named(source)
    [data] = ready_clips(opened, held_out_needs(config), media, progress)
    config = replace(config, data=data)
    dense, model = build(opened, device, dtype), load(checkpoint, device, dtype)
    check_pair(model.config, dense.config)
    if model.config.is_dense:
        check_same(replace(checkpoint, overrides={}), source)
    check_runtime(model.config, runtime)
    cached = replace(runtime, dtype=None) != RuntimeConfig()
    dense.config = replace(dense.config, cache=model.config.cache)
    measured = cached or not model.config.is_dense
    # The dense model, the dense model with another clip's past, then the conversion.
    passes = 3 if measured else 2
    with measuring_bar(progress or Silent(), config, passes) as bar:
        held_out = HeldOut(dense, config, cached or bool(checkpoint.overrides), bar)
        rows = dense_rows(dense, held_out)
        if measured:
            errors = held_out.measure(model, runtime if cached else None)
            rows += error_rows(errors, model.config, None, runtime=runtime)
            rows += cache_rows(model.config, runtime=runtime)
    return rows
