"""Recover quality after a conversion, stage by stage (Method: recovery).

First each converted layer learns its dense layer's output. Then the whole student learns the dense
model's velocity: on clips, and on its own rollouts. The stages need the dense model and clips, or
prompts only. Each stage ends with the weights that measured best on held-out clips, so no stage
makes a model worse.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vmla_convert.checkpoint.layouts import CODEC, NATIVE
from vmla_convert.checkpoint.settings import converted_config
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import EvaluateConfig, MediaConfig, RecoverConfig
from vmla_convert.errors import VmlaError
from vmla_convert.generating.make_clips import ready_clips
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.card import model_card
from vmla_convert.loading.load import CONVERSION_NAME, Source, build, build_shell, read_block
from vmla_convert.measuring.evaluate import HeldOut, dense_rows, measuring_bar
from vmla_convert.measuring.rows import Errors, cache_rows, error_rows, row_fields
from vmla_convert.media.clips import open_clips
from vmla_convert.progress import Progress, Silent
from vmla_convert.recovery.checks import Pair, open_pair, recovery_needs
from vmla_convert.recovery.run_state import claim_state, curve_file, drop_if_new, read_curve
from vmla_convert.recovery.stages import (
    LAYERWISE,
    Folders,
    Recovered,
    fit_layers,
    later_steps,
    recover_model,
)
from vmla_convert.recovery.trained import unfreeze
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.storage.lock import sole_writer
from vmla_convert.tables import to_dict
from vmla_convert.training.processes import own_device, processes
from vmla_convert.training.sharding import shard, whole_state


def recover(
    converted: str | Path,
    teacher: Source | None,
    out: Path,
    config: RecoverConfig | None = None,
    evaluation: EvaluateConfig | None = None,
    progress: Progress | None = None,
    world: int | None = None,
    media: MediaConfig | None = None,
    keep_rows: Callable[[list[Row]], object] | None = None,
) -> list[Row]:
    """Recover a converted folder and write the result as a new one.

    An interrupted run leaves `<out>.state/`; the same call resumes from there. All processes that
    were started together must make the call; the main process writes and draws.

    Args:
        converted: Folder from `convert`.
        teacher: The dense checkpoint that it came from; None for the base model of a codec.
        out: Folder to write. It appears when it is complete.
        config: Steps, learning rates and data.
        evaluation: Held-out clips that the curve is measured on.
        progress: Receives the progress bars.
        world: Number of processes that must have been started; None for any.
        media: Text encoder and VAE for clips that have to be made, and the folder of these clips.
        keep_rows: Receives the rows, on the main process, before the folder appears.

    Returns:
        The recovery curve as rows.

    Raises:
        CheckpointError: `converted` is not converted, `teacher` is, or they do not fit.
        ConfigError: Clips or batch do not fit.
        OutputError: `out` exists, or an unfinished run there had other settings or inputs.
        VmlaError: Another number of processes was started.
    """
    config, evaluation = config or RecoverConfig(), evaluation or EvaluateConfig()
    pair = open_pair(converted, teacher, out, config, evaluation, world, media)
    state, media = processes(), media or MediaConfig()
    drawn = progress if progress and state.is_main_process else Silent()
    with sole_writer(out) if state.is_main_process else nullcontext():
        rows = _Run(pair, out, config, evaluation, media, drawn).rows(keep_rows)
        state.wait_for_everyone()
    return rows


class _Run:
    """A recovery of a folder.

    Attributes:
        asked: Settings as given.
        config: The same settings; once clips are ready, their source is where they are.
    """

    def __init__(
        self,
        pair: Pair,
        out: Path,
        config: RecoverConfig,
        evaluation: EvaluateConfig,
        media: MediaConfig,
        progress: Progress,
    ) -> None:
        self.pair, self.out, self.folders = pair, out, Folders.beside(out)
        self.asked, self.config, self.evaluation, self.media = config, config, evaluation, media
        self.progress, self.processes, self.device = progress, processes(), own_device()

    def rows(self, keep_rows: Callable[[list[Row]], object] | None) -> list[Row]:
        """Recover, write, and return the curve."""
        started, state = perf_counter(), self.folders.state
        settings = {
            "recover": to_dict(self.asked),
            "evaluation": to_dict(self.evaluation),
            "converted": self.pair.provenance,
            "teacher": str(self.pair.dense.source.path),
        }
        is_main = self.processes.is_main_process
        with self.processes.main_process_first():
            claim_state(state, settings, write=is_main)
        try:
            self._ready_clips()
            rows, student, recovered = self._recover()
        except (VmlaError, KeyboardInterrupt):
            if is_main:
                drop_if_new(state)
            raise
        seconds, fields = perf_counter() - started, row_fields(student.config)
        rows.append(Row(Metric.RECOVER_SECONDS, seconds, "s", **fields))
        if recovered.learning_rate is not None:
            rows.append(Row(Metric.LEARNING_RATE, recovered.learning_rate, "per step", **fields))
        weights = whole_state(student)
        if is_main:
            rows += read_curve(state)
            if keep_rows:
                keep_rows(rows)
            self._write(weights, recovered, rows)
            shutil.rmtree(state)
        return rows

    def _ready_clips(self) -> None:
        """Make the clips that are missing, and use them from here on."""
        needs = recovery_needs(self.config, self.evaluation)
        with self.processes.main_process_first():
            data, *held_out = ready_clips(self.pair.dense, needs, self.media, self.progress)
        self.config = replace(self.config, data=data)
        if held_out:
            self.evaluation = replace(self.evaluation, data=held_out[0])

    def _recover(self) -> tuple[list[Row], CausalWanModel, Recovered]:
        """Run all stages, with as little of both models in memory as each stage needs."""
        config, state = self.config, self.folders.state
        if config.layerwise_steps and (config.offload or config.shard):
            student = self._fitted()
            if config.offload and not later_steps(config):
                recovered = Recovered({LAYERWISE: config.layerwise_steps}, {}, None)
                return cache_rows(student.config), student, recovered
            # The state folder holds the fitted layers; the errors before the fit are still needed.
            del student
        # The bar is full at step 0, after two passes of the dense model and one of the student.
        with measuring_bar(self.progress, self.evaluation, passes=3) as measuring:
            student, dense = self._models()
            held_out = HeldOut(dense, self.evaluation, progress=measuring)
            rows = [*dense_rows(dense, held_out), *cache_rows(student.config)]

            def on_step(step: int, errors: Errors) -> None:
                put_rows(curve_file(state), error_rows(errors, student.config, step))

            recovered = recover_model(
                student, dense, config, held_out, on_step, self.folders, self.progress
            )
        return rows, student, recovered

    def _fitted(self) -> CausalWanModel:
        """The student after the layer-wise stage, with one dense block in memory at a time."""
        student = build(self.pair.source, self.device)
        shell = build_shell(self.pair.dense, self.device)
        blocks = partial(read_block, self.pair.dense, device=self.device)
        fit_layers(student, shell, blocks, self.config, self.folders.state, self.progress)
        return student

    def _models(self) -> tuple[CausalWanModel, CausalWanModel]:
        """Student and dense model; a sharded model is divided before the next one is read."""
        pair = self.pair
        if self.config.shard:
            student = build(pair.source)
            unfreeze(student, self.config.train)
            return shard(student), shard(build(pair.dense))
        student = build(pair.source, self.device)
        if not pair.is_codec:
            return student, build(pair.dense, self.device)
        # A codec leaves its base model's weights as they are, so the two models share them.
        with torch.device("meta"):
            dense = CausalWanModel(pair.dense.config)
        shared = {name: t for name, t in student.state_dict().items() if ".codec." not in name}
        dense.load_state_dict(shared, assign=True)
        return student, dense.eval().requires_grad_(False)

    def _write(self, weights: dict[str, Tensor], recovered: Recovered, rows: list[Row]) -> None:
        """Write the recovered checkpoint with its record and model card."""
        config, is_codec = self.pair.source.config, self.pair.is_codec
        record = self.pair.provenance | {
            "recover": to_dict(self.asked),
            "recovered": {
                "kept_steps": recovered.best_steps,
                "skipped_steps": recovered.skipped_steps,
                "learning_rate": recovered.learning_rate,
                "clips": open_clips(self.config.data).record(),
                **_recorded_errors(rows, self.evaluation),
            },
        }
        specs = self.pair.written_specs()
        tensors = {
            # A codec file keeps its dtypes, and so its size.
            name: weights[name].to(spec.dtype) if is_codec else _narrowed(weights[name], spec.dtype)
            for name, spec in specs.items()
        }
        files = {
            "config.json": converted_config(config),
            CONVERSION_NAME: record,
            "README.md": model_card(config, record),
        }
        write_checkpoint(self.out, tensors, files, layout=CODEC if is_codec else NATIVE)


def _recorded_errors(rows: list[Row], evaluation: EvaluateConfig) -> dict[str, Any]:
    """First and last errors of the whole model; nothing if it was never measured."""
    points: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.step is not None:
            points.setdefault(row.step, {"step": row.step})[row.metric] = row.value
    if not points:
        return {}
    dense = [row.value for row in rows if row.metric == Metric.FLOW_LOSS and row.step is None]
    errors = {"first": points[min(points)], "last": points[max(points)]}
    clips = open_clips(evaluation.data).record()
    source = clips.get("kind", evaluation.data.source)
    held_out = {"source": source, "clips": evaluation.clips, "held_out": clips}
    return {"errors": {**held_out, **errors, "dense_flow_loss": dense[0]}}


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in its source's dtype if no value changes, as for tensors that did not train."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
