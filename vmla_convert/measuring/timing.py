"""Time of a denoising step, and the ratio to the time of the dense model."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from vmla_convert.config import RuntimeConfig
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.measuring.rows import row_fields
from vmla_convert.results import Metric, Row

REPEATS = 9


def step_rows(
    dense: CausalWanModel,
    converted: CausalWanModel,
    runtime: RuntimeConfig | None = None,
    repeats: int = REPEATS,
) -> list[Row]:
    """Rows of the time of one denoising step of one clip at a full window: medians of repeats.

    The models take turns. Seconds change with the load and the heat of a machine, so only the ratio
    is reliable.

    Args:
        dense: The dense model.
        converted: Another model of the same geometry.
        runtime: Size, dtype and backend of the cache of `converted`.
        repeats: Timed steps of each model.
    """
    steps = [_step(dense), _step(converted, runtime)]
    seconds = [[_timed(step) for step in steps] for _ in range(repeats)]
    of_dense, of_converted = (median(times) for times in zip(*seconds, strict=True))
    ratio = median(ours / theirs for theirs, ours in seconds)
    fields = row_fields(converted.config, runtime=runtime)
    return [
        Row(Metric.STEP_SECONDS, of_dense, "s", **row_fields(dense.config)),
        Row(Metric.STEP_SECONDS, of_converted, "s", **fields),
        Row(Metric.SECONDS_RATIO, ratio, "converted / dense", **fields),
    ]


@torch.no_grad()
def _step(model: CausalWanModel, runtime: RuntimeConfig | None = None) -> Callable[[], object]:
    """Return one step of a chunk that attends to a full window; the step has run once."""
    config, weight = model.config, model.patch_embedding.weight
    geometry, frames = config.geometry, config.chunk_frames
    prompt = model.project_prompt(weight.new_zeros(1, geometry.text_len, geometry.text_dim))
    chunk = weight.new_zeros(1, frames, geometry.in_dim, *config.latent_size)
    cache, times = model.new_cache(1, runtime), weight.new_zeros(1, frames)
    for _ in range(-(-config.cache.window_frames // frames)):
        cache.open_chunk(frames)
        model.stream(chunk, times, prompt, cache)
    cache.open_chunk(frames)

    @torch.no_grad()
    def step() -> object:
        return model.stream(chunk, times, prompt, cache, keep=False)

    step()
    return step


def _timed(step: Callable[[], object]) -> float:
    _wait()
    started = perf_counter()
    step()
    _wait()
    return perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
