"""Everything that is measured of one point.

Shapes: B batch, F frames, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from vmla_convert.config import DataConfig, EvaluateConfig, ModelConfig, RuntimeConfig, SweepConfig
from vmla_convert.errors import VmlaError
from vmla_convert.generating.film import comparison_rows
from vmla_convert.generating.generate import generate
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.measuring.evaluate import HeldOut, drift_rows, learned_spectrum_rows, rollout_rows
from vmla_convert.measuring.rows import (
    Errors,
    cache_rows,
    error_rows,
    layer_rows,
    memory_rows,
    row_fields,
)
from vmla_convert.measuring.timing import step_rows
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.video import contact_sheet
from vmla_convert.progress import Progress
from vmla_convert.recovery.stages import recover_model
from vmla_convert.results import Metric, Row
from vmla_convert.sweep.grid import SweepPoint

STRIP_COLUMNS = 9
STRIP_PROMPTS = 2


@dataclass(frozen=True)
class Bench:
    """The measurements of every point, and the dense model to compare with.

    Points recover on clips of `training`. The folder `strips` holds pictures of rollouts.
    """

    teacher: CausalWanModel
    evaluate: EvaluateConfig
    config: SweepConfig
    training: DataConfig
    strips: Path

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out clips, each in one pass."""
        return HeldOut(self.teacher, self.evaluate)


def measure_point(
    student: CausalWanModel,
    point: SweepPoint,
    bench: Bench,
    seconds: float,
    dense_rollout: Callable[[], Tensor] | None,
    progress: Progress,
) -> list[Row]:
    """Recover a converted model, if the point asks for that, and return all rows of the point.

    Args:
        student: The converted model.
        point: The point.
        bench: What to measure.
        seconds: Duration of the conversion without the calibration, which points share.
        dense_rollout: Returns the dense model's rollout (B, F, C, height, width), if there is one.
        progress: Receives the progress bars.
    """
    config, seed = student.config, point.seed
    rows = [Row(Metric.CONVERT_SECONDS, seconds, "s", **row_fields(config, seed))]
    for runtime in point.runtimes or (None,):
        rows += [*cache_rows(config, seed, runtime), *memory_rows(config, seed, runtime)]
    rows += layer_rows(config, seed)
    last, measured = _errors(student, point, bench, progress)
    rows += measured
    if config.mla is not None and last:
        rows += learned_spectrum_rows(student, last, seed)
    if bench.config.timed:
        rows += step_rows(bench.teacher, student)
    if dense_rollout is not None:
        rollout = roll_out(student, bench.config, progress)
        rows += score(rollout, config, bench.config, seed)
        path = bench.strips / f"{point.key}-{seed}.png"
        try:
            draw_strip(path, dense_rollout(), rollout, config, bench.config)
        except VmlaError as error:  # the point keeps its rows without a picture
            progress.note(error.message)
    return [labelled(row, point) for row in rows]


def labelled(row: Row, point: SweepPoint) -> Row:
    """Add a point's key and settings to a row, unless the row is about the dense model."""
    if row.run == "dense":
        return row
    steps = point.recovery.training.steps if point.recovery else None
    return replace(row, point=point.key, seed=point.seed, recovery_steps=steps)


def roll_out(model: CausalWanModel, config: SweepConfig, progress: Progress) -> Tensor:
    """Clean latents (B, F, C, height, width), one clip per prompt, from noise of seed 0."""
    frames, prompts = config.rollout_frames, list(config.rollout_prompts)
    chunks = -(-frames // model.config.chunk_frames)
    made = progress.track(generate(model, prompts, frames), "rolling out", chunks)
    return torch.cat([chunk.float().cpu() for chunk in made], dim=1)


def score(latents: Tensor, model: ModelConfig, config: SweepConfig, seed: int) -> list[Row]:
    """Rows of a rollout: its drift, and the judge's scores in the demo world."""
    rows = drift_rows(latents, model, seed)
    if model.media == "demo":
        rows += rollout_rows(_pixels(latents), list(config.rollout_prompts), model, seed)
    return rows


def draw_strip(
    path: Path, dense: Tensor, converted: Tensor, model: ModelConfig, config: SweepConfig
) -> None:
    """Draw frames of the dense and the converted model and their difference, demo world only.

    Raises:
        MissingExtraError: Pillow is not installed.
        OutputError: The file cannot be written.
    """
    if model.media != "demo":
        return
    clips = {"dense": _pixels(dense), "converted": _pixels(converted)}
    rows = comparison_rows(clips, config.rollout_prompts[:STRIP_PROMPTS], difference=True)
    contact_sheet(path, rows, STRIP_COLUMNS, group=3)


def _pixels(latents: Tensor) -> Tensor:
    return DemoMedia().decode(latents).clamp(-1, 1)


def _errors(
    student: CausalWanModel, point: SweepPoint, bench: Bench, progress: Progress
) -> tuple[int, list[Row]]:
    """Recover a student; return its last step, and rows of errors.

    A codec is measured along the recovery at its own size, and at other sizes before and after.
    """
    config, seed, rows = student.config, point.seed, list[Row]()
    own = None if config.codec is None else RuntimeConfig(size=config.codec.size)
    others = [runtime for runtime in point.runtimes if runtime != own]

    def on_step(step: int, errors: Errors) -> None:
        rows.extend(error_rows(errors, config, step, seed, own))

    if config.mla is not None:
        rows += learned_spectrum_rows(student, 0, seed)
    rows += _resized(student, others, bench.held_out, 0, seed)
    if point.recovery is None:
        on_step(0, bench.held_out.measure(student))
        return 0, rows
    started, fields = perf_counter(), row_fields(config, seed)
    recovery = replace(point.recovery, data=bench.training)
    how = recover_model(
        student, bench.teacher, recovery, bench.held_out, on_step, progress=progress
    )
    rows.append(Row(Metric.RECOVER_SECONDS, perf_counter() - started, "s", **fields))
    if how.learning_rate is not None:
        rows.append(Row(Metric.LEARNING_RATE, how.learning_rate, "per step", **fields))
    last = max(row.step or 0 for row in rows)
    return last, rows + _resized(student, others, bench.held_out, last, seed)


def _resized(
    student: CausalWanModel,
    runtimes: Iterable[RuntimeConfig],
    held_out: HeldOut,
    step: int,
    seed: int,
) -> list[Row]:
    """Rows of a codec's errors at some sizes; afterwards the codec has its own size again."""
    config, rows = student.config, list[Row]()
    for runtime in runtimes:
        assert runtime.size is not None
        student.resize(runtime.size, runtime.cache_dtype == "auto")
        rows += error_rows(held_out.measure(student), config, step, seed, runtime)
    if config.codec is not None:
        student.resize(config.codec.size)
    return rows
