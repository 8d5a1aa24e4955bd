"""A grid of conversions of one model, each measured at step 0 and along its recovery.

Calibration is done once and shared. Rows are the state: a point whose rows are complete is skipped,
so an interrupted sweep goes on where it stopped, and a point that another stage measured is reused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from vmla_convert.config import ConvertConfig, RecoverConfig, SweepConfig
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import DATA_INITS, assume_evidence
from vmla_convert.maths.projections import Evidence, KVWeights
from vmla_convert.pipelines.calibrate import (
    LayerReads,
    calibrate,
    deployed_phases,
    model_blocks,
)
from vmla_convert.pipelines.data import open_clips
from vmla_convert.pipelines.evaluate import (
    HeldOut,
    dense_rows,
    learned_spectrum_rows,
    spectrum_rows,
)
from vmla_convert.pipelines.factoring import convert_model, layer_evidence, layer_weights
from vmla_convert.pipelines.plan import check_sizes, uniform_plan
from vmla_convert.pipelines.recovery.stages import recover_model
from vmla_convert.pipelines.rows import Errors, cache_rows, error_rows, row_fields, run_name
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
        ConfigError: An init or a size of the grid does not fit the model, or there are no clips to
            recover on; before any work.
    """
    progress = progress or Silent()
    points = grid(config, convert_config)
    for point in points:
        check_sizes(teacher.config, point)
    if config.recover:
        open_clips(recover_config.data)  # or say now why not
    written = read_rows(rows_file) if rows_file.exists() else []
    known = _measure(teacher, convert_config, progress)
    if not any(row.run == "dense" for row in written):
        append_rows(rows_file, dense_rows(teacher, held_out))
    if not any(row.metric == "effective_rank_99" for row in written):
        size = uniform_plan(teacher.config, points[0]).kv_lora_rank[0]
        append_rows(rows_file, spectrum_rows(teacher, known.measured, size))
    last = "recover_seconds" if config.recover else "velocity_error"
    done = {(row.run, row.seed) for row in written if row.metric == last}
    for point in progress.track(points, "sweep"):
        started = perf_counter()
        student = convert_model(teacher, point, known.evidence(point))
        seconds = perf_counter() - started
        if (run_name(student.config), point.seed) in done:
            continue
        recovery = recover_config if config.recover else None
        rows = measure_point(student, teacher, point, recovery, held_out, seconds, progress)
        append_rows(rows_file, rows)


def grid(config: SweepConfig, shared: ConvertConfig) -> list[ConvertConfig]:
    """Every point as a conversion, smallest caches first."""
    sizes: list[dict[str, Any]] = [{"cut": cut} for cut in sorted(config.cuts, reverse=True)]
    sizes += [{"kv_lora_rank": rank} for rank in sorted(config.kv_lora_ranks)]
    bare = replace(shared, cache_scalars=None, cut=None, plan=None)
    bare = replace(bare, kv_lora_rank=None, qk_rope_head_dim=None)
    points: list[ConvertConfig] = []
    for size, layer, init, seed in product(sizes, config.every_layer(), config.inits, config.seeds):
        ranks = shared.ranks if init == "calibrated" else None
        point = replace(bare, init=init, layer=layer, seed=seed, ranks=ranks, **size)
        if layer.positions == "reconstructed":
            points.append(replace(point, qk_nope_head_dim=None))
            continue
        ropes = config.qk_rope_head_dims if point.kv_lora_rank is not None else ()
        points += [replace(point, qk_rope_head_dim=rope) for rope in ropes] or [point]
    return points


@dataclass(frozen=True)
class _Known:
    """What calibration measured, made into evidence for each kind of layer."""

    weights: list[KVWeights]
    measured: list[LayerReads]
    phases: Tensor

    def evidence(self, point: ConvertConfig) -> list[Evidence] | None:
        if point.init not in DATA_INITS:
            return None
        if not point.calibrate:
            return [assume_evidence(weights, self.phases) for weights in self.weights]
        pairs = zip(self.measured, self.weights, strict=True)
        return [
            layer_evidence(reads, weights, point.layer, self.phases) for reads, weights in pairs
        ]


def measure_point(
    student: CausalWanModel,
    teacher: CausalWanModel,
    point: ConvertConfig,
    recover_config: RecoverConfig | None,
    held_out: HeldOut,
    convert_seconds: float,
    progress: Progress | None = None,
) -> list[Row]:
    """Recover a converted model, if wanted, and return all rows of its point.

    The point's seed decides its recovery too.
    """
    fields = row_fields(student.config, point.seed)
    rows = [
        Row("convert_seconds", convert_seconds, "s", **fields),
        *cache_rows(student.config, point.seed),
        *learned_spectrum_rows(student, point.seed),
    ]
    if recover_config is None:
        errors = held_out.measure(student)
        return rows + error_rows(errors, student.config, 0, point.seed)

    def on_step(step: int, errors: Errors) -> None:
        rows.extend(error_rows(errors, student.config, step, point.seed))

    started = perf_counter()
    training = replace(recover_config.training, seed=point.seed)
    recover_config = replace(recover_config, training=training)
    how = recover_model(student, teacher, recover_config, held_out, on_step, progress=progress)
    rows.append(Row("recover_seconds", perf_counter() - started, "s", **fields))
    if how.learning_rate is not None:
        rows.append(Row("learning_rate", how.learning_rate, "per step", **fields))
    return rows


def _measure(teacher: CausalWanModel, config: ConvertConfig, progress: Progress) -> _Known:
    state, geometry = teacher.state_dict(), teacher.config.geometry
    reads = calibrate(
        teacher,
        model_blocks(teacher),
        open_clips(config.data, teacher.config.cache.sink_frames),
        config.calibration_clips,
        config.seed,
        progress,
    )
    weights = [
        layer_weights(state.__getitem__, layer, geometry.num_heads)
        for layer in range(geometry.num_layers)
    ]
    measured = [reads(layer) for layer in range(geometry.num_layers)]
    return _Known(weights, measured, deployed_phases(teacher.config))
