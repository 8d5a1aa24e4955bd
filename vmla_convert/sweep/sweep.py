"""A grid of conversions of one model, each measured at step 0 and along its recovery.

What points share is done once. Rows are the state: a point whose rows are there is skipped, so an
interrupted sweep goes on where it stopped, and a point that another stage measured is reused. One
that cannot be done is a row that says why.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from vmla_convert.checkpoint.tensor_store import FolderStore
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
from vmla_convert.fitting.calibrate import check_clips
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.fitting.conversion_steps import open_measured
from vmla_convert.fitting.rank_plan import check_sizes
from vmla_convert.layers.dit import CausalWanModel, check_size
from vmla_convert.measuring.evaluate import HeldOut, check_held_out, dense_rows, spectrum_rows
from vmla_convert.measuring.rows import (
    cache_rows,
    device_name,
    error_rows,
    memory_rows,
    run_name,
)
from vmla_convert.media.clips import open_clips
from vmla_convert.media.models import check_prompts, open_media
from vmla_convert.progress import Joint, Progress, Silent, Timed
from vmla_convert.recovery.trained import check_adapters
from vmla_convert.results import (
    Metric,
    Row,
    append_rows,
    bytes_at_error,
    drop_torn_line,
    read_rows,
    write_rows,
)
from vmla_convert.sweep.failures import FAILURES, is_full_disk, keeping
from vmla_convert.sweep.grid import SweepPoint, digest, grid, sweep_points
from vmla_convert.sweep.point import Bench, labelled, measure_point
from vmla_convert.sweep.rollout_scores import Rollout, roll_out, score
from vmla_convert.sweep.shared import Shared
from vmla_convert.sweep.team import Team, join_team
from vmla_convert.tables import to_dict
from vmla_convert.training.loop import check_tracker
from vmla_convert.training.processes import check_shares

__all__ = [
    "SweepPoint",
    "Team",
    "check_sweep",
    "grid",
    "join_team",
    "labelled",
    "sweep",
    "sweep_points",
]

SHELF_NAME = ".shared"
"""Metric: bytes at which a codec errs as much as a quantised dense cache."""


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
        convert_config: What the points share: calibration and data.
        recover_config: Their recovery.
        evaluate_config: What to measure on.
        rows_file: JSONL to append to; its rows say which points are done. Points that failed are
            tried again.
        progress: Where to draw.
        team: Processes that share the points; each has the same arguments.

    Raises:
        VmlaError: As `check_sweep`, before any work.
        OutputError: The disk is full, or a file that all points share is lost.
    """
    progress, team = progress or Silent(), team or Team()
    points = sweep_points(config, convert_config, recover_config)
    check_sweep(teacher.config, config, convert_config, recover_config, evaluate_config)
    work = _Sweep(teacher, config, convert_config, evaluate_config, rows_file, points)
    with keeping(rows_file):
        if team.leads:
            work.prepare(progress)
            team.announce("prepared")
        team.await_leader("prepared")
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
    """Refuse, before any work, what a sweep would fail on later; of each kind of clips one is read.

    Args:
        model: The dense model's.
        config: The grid.
        convert_config: As of `sweep`.
        recover_config: As of `sweep`.
        evaluate_config: As of `sweep`.

    Raises:
        CheckpointError: Points are rolled out, and the text encoder is not there.
        ConfigError: There is no point, an init or a size of the grid does not fit the model, a
            batch does not divide, or clips are not there or do not fit.
        MissingExtraError: There are to be adapters, and peft is not installed.
        VmlaError: The model's text encoder cannot read a prompt.
    """
    points = sweep_points(config, convert_config, recover_config)
    if not points:
        raise ConfigError("a list of the sweep is empty", "give each of them a value")
    for point in points:
        _check_point(model, point)
    # Calibration describes the model too, so that it is done whatever the points are.
    open_measured(model, convert_config)
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
    """Refuse sizes that do not fit the model, or what the codec of a point holds."""
    if point.conversion.product == "mla":
        check_sizes(model, point.conversion)
        return
    planned = plan_codec(model, point.conversion)
    for runtime in point.runtimes:
        assert runtime.size is not None
        check_size(planned, runtime.size, runtime.cache_dtype == "auto")


class _Sweep:
    """One process's view of a sweep."""

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
        self.folder = folder / SHELF_NAME
        shelves: dict[Product, FolderStore] = {
            product: FolderStore(self.folder / product, identity) for product in config.products
        }
        self.rollouts = FolderStore(self.folder / "rollout", identity)
        self.shared = Shared(teacher, convert_config, shelves)
        self.bench = Bench(teacher, evaluate_config, config, self._dense_rollout, folder / "strips")

    def prepare(self, progress: Progress) -> None:
        """What is done once, by one process: the dense model's rows, and all calibration."""
        drop_torn_line(self.rows_file)
        written = self._forget_unfinished()
        quantised = self._quantised(written)
        left = {(point.key, point.seed) for point in self.points} - self._done(written)
        if not left and not quantised:
            return
        rows: list[Row] = []
        if left:
            rows += self._shared_rows(written, progress)
        if quantised:
            streamed = HeldOut(self.teacher, self.evaluate, streamed=True, progress=progress)
            for runtime in quantised:
                errors, config = streamed.measure(self.teacher, runtime), self.teacher.config
                rows += error_rows(errors, config, None, runtime=runtime)
                rows += cache_rows(config, runtime=runtime) + memory_rows(config, runtime=runtime)
        append_rows(self.rows_file, rows)

    def _shared_rows(self, written: Sequence[Row], progress: Progress) -> list[Row]:
        """Calibrate for every product, and tell of the dense model what is not told."""
        held_out = self.bench.held_out  # before hours of work: its clips may not fit
        timed = Timed(progress)
        reads = [self.shared.reads(product, timed) for product in self.config.products]
        rollout = self._roll_dense_out(progress)
        told = {row.metric for row in written if row.run == "dense"}
        rows = self._dense_rows(told, held_out, rollout)
        if not any(row.metric == Metric.EFFECTIVE_RANK_99 for row in written):
            geometry = self.teacher.config.geometry
            layers = map(reads[0], range(geometry.num_layers))
            rows += spectrum_rows(self.teacher, layers, geometry.dim // 8)
        return rows + [
            Row(Metric.SWEEP_SECONDS, seconds, "s", "sweep", device=device_name(), note=stage)
            for stage, seconds in timed.seconds.items()
        ]

    def _quantised(self, written: Sequence[Row]) -> list[RuntimeConfig]:
        """Ways of quantising the dense model's cache that are still to be measured."""
        told, dense = {row.run for row in written}, self.teacher.config
        asked = [RuntimeConfig(cache_dtype=dtype) for dtype in self.config.dense_dtypes]
        return [runtime for runtime in asked if run_name(dense, runtime) not in told]

    def conclude(self) -> None:
        """Compare sizes at equal errors, and remove what points shared."""
        written = read_rows(self.rows_file)
        rows = [row for row in written if row.metric != Metric.BYTES_AT_ERROR]
        rows += _equal_errors(rows, self.config, self.points, self.teacher.config)
        if rows != written:
            write_rows(self.rows_file, rows)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, progress: Progress, team: Team) -> None:
        """The points that are this process's to do; the leader waits for the others'."""
        done = self._done(read_rows(self.rows_file))
        # What the others draw nobody sees, and need not ask for.
        count = team.finished if team.leads else int
        with closing(Joint(progress, "sweep", len(self.points), count)) as joint:
            for point in team.share(self.points):
                if (point.key, point.seed) not in done:
                    append_rows(self.rows_file, self._measured(point, joint))
                team.finish()
                joint.look()
            team.announce("done")
            if team.leads:
                team.await_all("done", joint.look)
                joint.look()

    def _measured(self, point: SweepPoint, progress: Progress) -> list[Row]:
        try:
            started = perf_counter()
            student = self.shared.student(point.conversion)
            seconds = perf_counter() - started
            return measure_point(student, point, self.bench, seconds, progress)
        except FAILURES as error:
            if is_full_disk(error):
                raise
            reason = first_line(error)
            conversion = point.conversion
            made, init = conversion.product, conversion.init
            name = f"{made} {init} {point.key}"
            progress.note(f"{name} failed: {reason}")
            row = Row(Metric.FAILED, 1.0, "point", name, product=made, init=init, note=reason)
            return [labelled(row, point)]

    def _done(self, rows: Sequence[Row]) -> set[tuple[str | None, int]]:
        """Keys and seeds of points of which all is told that is asked for, here or elsewhere."""
        config = self.config
        wanted = {Metric.VELOCITY_ERROR}
        wanted |= {Metric.SECONDS_RATIO} if config.timed else set()
        wanted |= {"drift"} if config.rollout_frames else set()
        told = defaultdict[tuple[str | None, int], set[str]](set)
        for row in rows:
            told[row.point, row.seed].add(row.metric)
        return {point for point, metrics in told.items() if wanted <= metrics}

    def _forget_unfinished(self) -> list[Row]:
        """Drop what is told of points of the grid that failed, or that lack what is asked for."""
        written = read_rows(self.rows_file) if self.rows_file.exists() else []
        again = {(point.key, point.seed) for point in self.points} - self._done(written)
        kept = [row for row in written if (row.point, row.seed) not in again]
        if len(kept) < len(written):
            write_rows(self.rows_file, kept)
        return kept

    def _dense_rows(self, told: set[str], held_out: HeldOut, rollout: list[Rollout]) -> list[Row]:
        """What is not told of the dense model: another stage tells its errors, but no rollout."""
        rows = [] if Metric.FLOW_LOSS in told else dense_rows(self.teacher, held_out)
        rows += [] if Metric.CACHE_BYTES in told else memory_rows(self.teacher.config)
        scored = [] if "drift" in told else rollout
        return rows + [row for each in scored for row in score(each, self.config, 0)]

    def _roll_dense_out(self, progress: Progress) -> list[Rollout]:
        """The dense model's rollout, where points are rolled out beside it."""
        if not self.config.rollout_frames:
            return []
        if not self.rollouts.has("rollout"):
            rollout = roll_out(self.teacher, self.config, progress)
            self.rollouts.put("rollout", {"latents": rollout.latents})
        return [self._dense_rollout()]

    def _dense_rollout(self) -> Rollout:
        return Rollout(self.teacher.config, self.rollouts.get("rollout")["latents"])


def _equal_errors(
    rows: Sequence[Row], config: SweepConfig, points: Sequence[SweepPoint], dense: ModelConfig
) -> list[Row]:
    """Rows of the bytes at which a codec errs as much, untrained, as each quantised dense cache."""
    codec = next((point for point in points if point.runtimes), None)
    if codec is None:
        return []
    errors = [row for row in rows if row.metric == Metric.VELOCITY_ERROR]
    curve = [
        (row.bytes_per_token, row.value)
        for row in errors
        if row.bytes_per_token is not None
        and (row.point, row.seed, row.step, row.cache_dtype) == (codec.key, codec.seed, 0, "auto")
    ]
    found: list[Row] = []
    for dtype in config.dense_dtypes:
        run = run_name(dense, RuntimeConfig(cache_dtype=dtype))
        error = next(row.value for row in errors if row.run == run)
        if (nbytes := bytes_at_error(curve, error)) is not None:
            told = Row(
                Metric.BYTES_AT_ERROR,
                nbytes,
                "bytes per token and layer",
                "codec",
                cache_dtype=dtype,
            )
            found.append(labelled(replace(told, product="codec", device=device_name()), codec))
    return found
