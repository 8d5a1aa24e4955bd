"""All that is measured of one point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter

from vmla_convert.config import EvaluateConfig, RuntimeConfig, SweepConfig
from vmla_convert.errors import VmlaError
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.measuring.evaluate import HeldOut, learned_spectrum_rows
from vmla_convert.measuring.rows import (
    Errors,
    branch_rows,
    cache_rows,
    error_rows,
    memory_rows,
    row_fields,
)
from vmla_convert.measuring.timing import step_rows
from vmla_convert.progress import Progress
from vmla_convert.recovery.stages import recover_model
from vmla_convert.results import Metric, Row
from vmla_convert.sweep.grid import SweepPoint
from vmla_convert.sweep.rollout_scores import Rollout, draw_strip, roll_out, score


@dataclass(frozen=True)
class Bench:
    """What every point is measured against.

    Attributes:
        teacher: The dense model.
        evaluate: Held-out clips.
        config: What to measure.
        dense_rollout: Gives the dense model's rollout; asked only where points are rolled out.
        strips: Folder of pictures of rollouts.
    """

    teacher: CausalWanModel
    evaluate: EvaluateConfig
    config: SweepConfig
    dense_rollout: Callable[[], Rollout]
    strips: Path

    @cached_property
    def held_out(self) -> HeldOut:
        """Clips in one pass."""
        return HeldOut(self.teacher, self.evaluate)


def measure_point(
    student: CausalWanModel, point: SweepPoint, bench: Bench, seconds: float, progress: Progress
) -> list[Row]:
    """Recover a converted model, if wanted, and return all rows of its point.

    Args:
        student: As converted; it is trained in place.
        point: Its settings.
        bench: What it is measured against.
        seconds: What its conversion took; `sweep_seconds` has the calibration that points share.
        progress: Where to draw.
    """
    config, seed = student.config, point.seed
    rows = [Row(Metric.CONVERT_SECONDS, seconds, "s", **row_fields(config, seed))]
    for runtime in point.runtimes or (None,):
        rows += [*cache_rows(config, seed, runtime), *memory_rows(config, seed, runtime)]
    rows += branch_rows(config, seed)
    last, measured = _errors(student, point, bench, progress)
    rows += measured
    if config.mla is not None and last:
        rows += learned_spectrum_rows(student, last, seed)
    if bench.config.timed:
        rows += step_rows(bench.teacher, student)
    if bench.config.rollout_frames:
        rollout = roll_out(student, bench.config, progress)
        rows += score(rollout, bench.config, seed)
        path = bench.strips / f"{point.key}-{seed}.png"
        try:
            draw_strip(path, bench.dense_rollout(), rollout, bench.config)
        except VmlaError as error:  # a picture is not worth a recovered point
            progress.note(error.message)
    return [labelled(row, point) for row in rows]


def labelled(row: Row, point: SweepPoint) -> Row:
    """A row that says which point it belongs to, unless it is about the dense model."""
    if row.run == "dense":
        return row
    steps = point.recovery.training.steps if point.recovery else None
    return replace(row, point=point.key, seed=point.seed, recovery_steps=steps)


def _errors(
    student: CausalWanModel, point: SweepPoint, bench: Bench, progress: Progress
) -> tuple[int, list[Row]]:
    """The last step of a recovery, and rows of errors: along it at one size, of others at its ends.

    The one size is that which the student has by default.
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
    how = recover_model(
        student, bench.teacher, point.recovery, bench.held_out, on_step, progress=progress
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
    """Rows of a codec's errors at other sizes than its own, which it has again in the end."""
    config, rows = student.config, list[Row]()
    for runtime in runtimes:
        assert runtime.size is not None
        student.resize(runtime.size, runtime.cache_dtype == "auto")
        rows += error_rows(held_out.measure(student), config, step, seed, runtime)
    if config.codec is not None:
        student.resize(config.codec.size)
    return rows
