"""A grid of conversions of one model, each measured at step 0 and along its recovery.

Work that points share is done once. The rows are the state: a point that has its rows is skipped,
so an interrupted sweep resumes, and a point that another stage measured is reused. A point that
fails becomes a row with the reason.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from torch import Tensor

from vmla_convert.config import (
    ConvertConfig,
    EvaluateConfig,
    ModelConfig,
    Product,
    RecoverConfig,
    RuntimeConfig,
    SweepConfig,
)
from vmla_convert.errors import ConfigError, first_line
from vmla_convert.fitting.calibrate import CALIBRATING, WEIGHING, Statistics
from vmla_convert.fitting.calibration_clips import check_clips, open_calibration
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.fitting.rank_plan import check_sizes
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.layers.runtime import check_size
from vmla_convert.measuring.evaluate import HeldOut, check_held_out, dense_rows, spectrum_rows
from vmla_convert.measuring.rows import cache_rows, device_name, error_rows, memory_rows, run_name
from vmla_convert.media.clips import open_clips
from vmla_convert.media.open import check_prompts, open_media
from vmla_convert.progress import Joint, Progress, Silent, Timed
from vmla_convert.recovery.trained import check_adapters
from vmla_convert.results import (
    Metric,
    Row,
    bytes_at_error,
    put_rows,
    read_rows,
    write_rows,
)
from vmla_convert.storage.tensor_store import FolderStore
from vmla_convert.sweep.failures import FAILURES, is_full_disk, stopping_failures
from vmla_convert.sweep.grid import SweepPoint, digest, sweep_points
from vmla_convert.sweep.point import Bench, labelled, measure_point, roll_out, score
from vmla_convert.sweep.shared import Shared
from vmla_convert.sweep.team import Team
from vmla_convert.tables import to_dict
from vmla_convert.training.loop import check_tracker
from vmla_convert.training.processes import check_shares

SHARED_NAME = ".shared"


def sweep(
    teacher: CausalWanModel,
    config: SweepConfig,
    convert_config: ConvertConfig,
    recover_config: RecoverConfig,
    evaluate_config: EvaluateConfig,
    rows_file: Path,
    progress: Progress | None = None,
    team: Team | None = None,
) -> None:
    """Run every point of the grid and append its rows.

    Args:
        teacher: The dense model.
        config: The grid.
        convert_config: Calibration and data that all points share.
        recover_config: Recovery of the points.
        evaluate_config: Held-out clips.
        rows_file: JSONL file to append to. Its rows say which points are done; failed points are
            tried again.
        progress: Receives the progress bars.
        team: Processes that share the points; each makes the same call.

    Raises:
        VmlaError: As `check_sweep` raises, before any work.
        OutputError: The disk is full, or a file that all points share cannot be used.
    """
    progress, team = progress or Silent(), team or Team()
    points = sweep_points(config, convert_config, recover_config)
    check_sweep(teacher.config, config, convert_config, recover_config, evaluate_config)
    work = _Sweep(teacher, config, convert_config, evaluate_config, rows_file, points)
    with stopping_failures(rows_file):
        if team.leads:
            work.prepare(progress)
        team.follow_leader("prepared")
        work.run(progress, team)
        if team.leads:
            work.conclude()


def check_sweep(
    model: ModelConfig,
    config: SweepConfig,
    convert_config: ConvertConfig,
    recover_config: RecoverConfig,
    evaluate_config: EvaluateConfig,
) -> None:
    """Check what a sweep would fail on later; one clip of each kind is read.

    Raises:
        CheckpointError: Points are rolled out, and the text encoder is missing.
        ConfigError: There is no point, an init or a size of the grid does not fit the model, a
            batch does not divide, or clips are missing or do not fit.
        MissingExtraError: Adapters are asked for, and peft is not installed.
        VmlaError: The text encoder cannot encode a prompt.
    """
    points = sweep_points(config, convert_config, recover_config)
    if not points:
        raise ConfigError("a list of the sweep is empty", "give each of them a value")
    for point in points:
        _check_point(model, point)
    # Calibration gives the spectra of the dense model too, so every grid needs its clips.
    open_calibration(model, convert_config)
    check_held_out(model, evaluate_config, streamed=bool(config.dense_dtypes))
    if config.recover:
        check_shares(recover_config.training, world=1)
        check_tracker(recover_config.training)
        check_adapters(recover_config.lora_rank)
        check_clips(model, open_clips(recover_config.data).batch(0, 1))
    if config.rollout_frames:
        check_prompts(model, config.rollout_prompts)
        open_media(model)


def _check_point(model: ModelConfig, point: SweepPoint) -> None:
    """Check that the sizes of a point fit the model and the point's codec."""
    if point.conversion.product == "mla":
        check_sizes(model, point.conversion)
        return
    planned = plan_codec(model, point.conversion)
    for runtime in point.runtimes:
        assert runtime.size is not None
        check_size(planned, runtime.size, runtime.cache_dtype == "auto")


class _Sweep:
    """A sweep in one process."""

    def __init__(
        self,
        teacher: CausalWanModel,
        config: SweepConfig,
        convert_config: ConvertConfig,
        evaluate_config: EvaluateConfig,
        rows_file: Path,
        points: Sequence[SweepPoint],
    ) -> None:
        self.teacher, self.config, self.points = teacher, config, points
        self.evaluate, self.rows_file, folder = evaluate_config, rows_file, rows_file.parent
        common = [to_dict(convert_config), to_dict(teacher.config), to_dict(evaluate_config)]
        identity = {"common": digest(common), "rollout": config.rollout_frames}
        self.folder = folder / SHARED_NAME
        stores: dict[Product, FolderStore] = {
            product: FolderStore(self.folder / product, identity) for product in config.products
        }
        self.rollouts = FolderStore(self.folder / "rollout", identity)
        self.shared = Shared(teacher, convert_config, stores)
        self.bench = Bench(teacher, evaluate_config, config, self._dense_rollout, folder / "strips")

    def prepare(self, progress: Progress) -> None:
        """Do the work that is done once: the dense model's rows, and all calibration."""
        written = self._drop_unfinished()
        if {(point.key, point.seed) for point in self.points} - self._done(written):
            put_rows(self.rows_file, self._shared_rows(written, progress))
        runs, dense = {row.run for row in written}, self.teacher.config
        asked = [RuntimeConfig(cache_dtype=dtype) for dtype in self.config.dense_dtypes]
        left = [runtime for runtime in asked if run_name(dense, runtime) not in runs]
        if not left:
            return
        streamed = HeldOut(self.teacher, self.evaluate, streamed=True, progress=progress)
        for runtime in left:
            errors = streamed.measure(self.teacher, runtime)
            rows = error_rows(errors, dense, None, runtime=runtime)
            rows += cache_rows(dense, runtime=runtime) + memory_rows(dense, runtime=runtime)
            put_rows(self.rows_file, rows)

    def run(self, progress: Progress, team: Team) -> None:
        """Measure this process's points; the leader waits for the other processes."""
        done = self._done(read_rows(self.rows_file))
        # Nobody sees the bars of the other processes, so only the leader asks for the count.
        count = team.finished if team.leads else int
        with Joint(progress, "sweep", len(self.points), count) as joint:
            for point in team.share(self.points):
                joint.look()
                if (point.key, point.seed) not in done:
                    put_rows(self.rows_file, self._measured(point, joint))
            joint.look()
            if team.leads:
                team.await_all(joint.look)
                joint.look()

    def conclude(self) -> None:
        """Compare sizes at equal errors, and remove the files that points shared."""
        written = read_rows(self.rows_file)
        rows = [row for row in written if row.metric != Metric.BYTES_AT_ERROR]
        rows += _equal_errors(rows, self.config, self.points, self.teacher.config)
        if rows != written:
            write_rows(self.rows_file, rows)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shared_rows(self, written: Sequence[Row], progress: Progress) -> list[Row]:
        """Calibrate for every product; return rows of the dense model that are not written yet."""
        teacher, held_out = self.teacher, self.bench.held_out
        metrics = {row.metric for row in written if row.run == "dense"}
        reads = self._calibrate(written, progress)
        rows = [] if Metric.FLOW_LOSS in metrics else dense_rows(teacher, held_out)
        if Metric.CACHE_BYTES not in metrics:
            rows += memory_rows(teacher.config)
        if self.config.rollout_frames:
            if not self.rollouts.has("rollout"):
                latents = roll_out(teacher, self.config, progress)
                self.rollouts.put("rollout", {"latents": latents})
            if Metric.DRIFT not in metrics:
                rows += score(self._dense_rollout(), teacher.config, self.config, 0)
        if not any(row.metric == Metric.EFFECTIVE_RANK_99 for row in written):
            geometry = teacher.config.geometry
            layers = map(reads[0], range(geometry.num_layers))
            rows += spectrum_rows(teacher, layers, geometry.dim // 8)
        return rows

    def _calibrate(self, written: Sequence[Row], progress: Progress) -> list[Statistics]:
        """Calibrate for every product, and add rows of the seconds since the last start."""
        timed = Timed(progress)
        reads = [self.shared.statistics(product, timed) for product in self.config.products]
        rows = [
            Row(Metric.SWEEP_SECONDS, seconds, "s", "sweep", device=device_name(), note=stage)
            for stage in (CALIBRATING, WEIGHING)
            # A run that was killed here before has done all of a stage.
            for seconds in [timed.seconds.get(stage, 0.0)]
        ]
        known = {row.figure for row in written}
        put_rows(self.rows_file, (row for row in rows if row.figure not in known))
        return reads

    def _dense_rollout(self) -> Tensor:
        return self.rollouts.get("rollout")["latents"]

    def _measured(self, point: SweepPoint, progress: Progress) -> list[Row]:
        """Rows of a point; a failure is a row too, unless it stops the sweep."""
        try:
            started = perf_counter()
            student = self.shared.student(point.conversion)
            seconds = perf_counter() - started
            return measure_point(student, point, self.bench, seconds, progress)
        except FAILURES as error:
            if is_full_disk(error):
                raise
            product, init, note = point.conversion.product, point.conversion.init, first_line(error)
            name = f"{product} {init} {point.key}"
            progress.note(f"{name} failed: {note}")
            row = Row(Metric.FAILED, 1.0, "point", name, product=product, init=init, note=note)
            return [labelled(row, point)]

    def _done(self, rows: Sequence[Row]) -> set[tuple[str | None, int]]:
        """Keys and seeds of the points that have all rows asked for."""
        wanted = {Metric.VELOCITY_ERROR}
        wanted |= {Metric.SECONDS_RATIO} if self.config.timed else set()
        wanted |= {Metric.DRIFT} if self.config.rollout_frames else set()
        metrics = defaultdict[tuple[str | None, int], set[str]](set)
        for row in rows:
            metrics[row.point, row.seed].add(row.metric)
        return {point for point, found in metrics.items() if wanted <= found}

    def _drop_unfinished(self) -> list[Row]:
        """Drop rows of points that failed or lack some rows; return the others."""
        written = read_rows(self.rows_file) if self.rows_file.exists() else []
        again = {(point.key, point.seed) for point in self.points} - self._done(written)
        rows = [row for row in written if (row.point, row.seed) not in again]
        if len(rows) < len(written):
            write_rows(self.rows_file, rows)
        return rows


def _equal_errors(
    rows: Sequence[Row], config: SweepConfig, points: Sequence[SweepPoint], dense: ModelConfig
) -> list[Row]:
    """Rows of the bytes at which an untrained codec errs as much as a quantised dense cache."""
    codec = next((point for point in points if point.runtimes), None)
    if codec is None:
        return []
    errors = [row for row in rows if row.metric == Metric.VELOCITY_ERROR]
    start = (codec.key, codec.seed, 0, "auto")
    curve = [
        (row.bytes_per_token, row.value)
        for row in errors
        if row.bytes_per_token is not None
        and (row.point, row.seed, row.step, row.cache_dtype) == start
    ]
    unit, found = "bytes per token and layer", list[Row]()
    for dtype in config.dense_dtypes:
        run = run_name(dense, RuntimeConfig(cache_dtype=dtype))
        error = next(row.value for row in errors if row.run == run)
        if (nbytes := bytes_at_error(curve, error)) is not None:
            row = Row(Metric.BYTES_AT_ERROR, nbytes, unit, "codec", cache_dtype=dtype)
            row = replace(row, product="codec", device=device_name())
            found.append(labelled(row, codec))
    return found
