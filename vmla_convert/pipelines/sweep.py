"""A grid of conversions of one model, each measured at step 0 and along its recovery.

Calibration is done once and shared. Rows are the state: a point whose rows are complete is skipped,
so an interrupted sweep goes on where it stopped, and a point that another stage measured is reused.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter

from vmla_convert.config import ConvertConfig, RecoverConfig, SweepConfig
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import INITS, Evidence
from vmla_convert.pipelines.calibrate import calibrate
from vmla_convert.pipelines.convert import convert_model, layer_budget
from vmla_convert.pipelines.data import open_clips
from vmla_convert.pipelines.evaluate import HeldOut, dense_rows, spectrum_rows
from vmla_convert.pipelines.recover import recover_model
from vmla_convert.pipelines.rows import Errors, cache_rows, error_rows, row_fields
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import Row, append_rows, read_rows


def sweep(
    teacher: CausalWanModel,
    config: SweepConfig,
    convert_config: ConvertConfig,
    recover_config: RecoverConfig,
    held_out: HeldOut,
    rows_file: Path,
    progress: Progress | None = None,
) -> None:
    """Run every point of the grid and append its rows.

    Args:
        teacher: The dense model.
        config: The grid.
        convert_config: What the points share: calibration and data.
        recover_config: Their recovery.
        held_out: What to measure on.
        rows_file: JSONL to append to; its rows say which points are done.
        progress: Where to draw.

    Raises:
        ConfigError: An init or a size of the grid does not fit the model; before any work.
    """
    progress = progress or Silent()
    points = grid(config, convert_config)
    check_points(teacher, points)
    written = read_rows(rows_file) if rows_file.exists() else []
    evidence = _evidence(teacher, convert_config, progress)
    if not any(row.run == "dense" for row in written):
        append_rows(rows_file, dense_rows(teacher, held_out))
    if not any(row.metric == "effective_rank_99" for row in written):
        rank = points[0].kv_lora_rank or layer_budget(teacher.config.geometry, points[0])[0]
        append_rows(rows_file, spectrum_rows(teacher, evidence, rank))
    done = {
        (row.init, row.kv_lora_rank, row.qk_rope_head_dim, row.seed)
        for row in written
        if row.metric == "recover_seconds"
    }
    waiting = [
        point
        for point in points
        if (point.init, point.kv_lora_rank, point.qk_rope_head_dim, point.seed) not in done
    ]
    for point in progress.track(waiting, "sweep"):
        rows = measure_point(teacher, point, recover_config, held_out, evidence, progress)
        append_rows(rows_file, rows)


def grid(config: SweepConfig, shared: ConvertConfig) -> list[ConvertConfig]:
    """Every point as a conversion, smallest caches first."""
    axes = product(config.kv_lora_ranks, config.qk_rope_head_dims, config.inits, config.seeds)
    return [
        ConvertConfig(init, rank, rope, shared.calibration_clips, shared.data, seed)
        for rank, rope, init, seed in axes
    ]


def check_points(teacher: CausalWanModel, points: list[ConvertConfig]) -> None:
    """Refuse a grid with a point that cannot be converted."""
    for point in points:
        if point.init not in INITS:
            raise ConfigError(f"unknown init '{point.init}'", did_you_mean(point.init, INITS))
        layer_budget(teacher.config.geometry, point)


def measure_point(
    teacher: CausalWanModel,
    point: ConvertConfig,
    recover_config: RecoverConfig,
    held_out: HeldOut,
    evidence: list[Evidence],
    progress: Progress | None = None,
) -> list[Row]:
    """Convert in memory, recover, and return all rows of one point; its seed decides both."""
    started = perf_counter()
    student = convert_model(teacher, point, evidence)
    fields = row_fields(student.config, point.seed)
    rows = [
        Row("convert_seconds", perf_counter() - started, "s", **fields),
        *cache_rows(student.config, point.seed),
    ]

    def on_step(step: int, errors: Errors) -> None:
        rows.extend(error_rows(errors, student.config, step, point.seed))

    started = perf_counter()
    training = replace(recover_config.training, seed=point.seed)
    recover_config = replace(recover_config, training=training)
    recover_model(student, teacher, recover_config, held_out, on_step, progress=progress)
    rows.append(Row("recover_seconds", perf_counter() - started, "s", **fields))
    return rows


def _evidence(teacher: CausalWanModel, config: ConvertConfig, progress: Progress) -> list[Evidence]:
    clips = open_clips(config.data, teacher.config.cache.sink_frames)
    return calibrate(teacher, clips, config.calibration_clips, config.seed, progress)
