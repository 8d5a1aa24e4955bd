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

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.layouts import CODEC, NATIVE
from vmla_convert.checkpoint.settings import converted_config
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import EvaluateConfig, MediaConfig, RecoverConfig
from vmla_convert.errors import VmlaError
from vmla_convert.generating.make_clips import ready_clips
from vmla_convert.layers.block import Block
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.card import model_card
from vmla_convert.loading.load import (
    CONVERSION_NAME,
    Source,
    build,
    build_shell,
    empty_model,
    read_block,
)
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
from vmla_convert.recovery.trained import Scope, narrow_frozen, new_tensors, unfreeze
from vmla_convert.results import Metric, Row, put_rows
from vmla_convert.storage.lock import sole_writer
from vmla_convert.tables import to_dict
from vmla_convert.training.processes import DTYPES, own_device, own_share, processes
from vmla_convert.training.sharding import fill, shard, whole_state


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
            held_out = HeldOut(
                dense,
                self.evaluation,
                progress=measuring,
                mixed_precision=config.training.mixed_precision,
                share=own_share(),
            )
            rows = [*dense_rows(dense, held_out), *cache_rows(student.config)]

            def on_step(step: int, errors: Errors) -> None:
                put_rows(curve_file(state), error_rows(errors, student.config, step))

            recovered = recover_model(
                student, dense, config, held_out, on_step, self.folders, self.progress
            )
        return rows, student, recovered

    def _fitted(self) -> CausalWanModel:
        """The new weights after the layer-wise stage, one block of each model in memory at a time.

        The other weights of the student stay on the meta device.
        """
        pair, device = self.pair, self.device
        student = empty_model(pair.source)
        new = {
            f"blocks.{i}.{name}"
            for i, block in enumerate(student.all_blocks())
            for name in new_tensors(block)
        }
        made = {
            name: pair.source.read(name).to(device, torch.float32)
            for name in new | {name for name, _ in student.named_buffers()}
        }
        student.load_state_dict(made, strict=False, assign=True)
        student.requires_grad_(False)
        if pair.source.config.codec is not None:
            student.resize(pair.source.config.codec.size)

        def layer(index: int) -> Block:
            block = read_block(pair.source, index, device)
            # The sizes of nested recovery are those of the student's codecs.
            block.codec = student.all_blocks()[index].codec
            return block

        shell, blocks = build_shell(pair.dense, device), partial(read_block, pair.dense)
        fit_layers(
            student,
            shell,
            partial(blocks, device=device),
            self.config,
            self.folders.state,
            self.progress,
            layer,
        )
        return student

    def _models(self) -> tuple[CausalWanModel, CausalWanModel]:
        """Student and dense model, with frozen matrices in the dtype of mixed precision."""
        pair, config = self.pair, self.config
        if config.shard:
            return self._sharded(pair.source, config.train), self._sharded(pair.dense, None)
        student = build(pair.source, self.device)
        # Adapters are merged into the frozen weights; the critic of dmd begins as the dense model.
        if not (config.lora_rank or config.dmd.steps):
            unfreeze(student, config.train)
            self._narrow(student)
            student.requires_grad_(False)
        dense = self._dense(student)
        if not config.dmd.steps:
            self._narrow(dense)
        return student, dense

    def _sharded(self, checkpoint: OpenCheckpoint, train: Scope | None) -> CausalWanModel:
        """A model that is divided before its weights are read, with weights of a scope unfrozen."""
        model = empty_model(checkpoint).eval().requires_grad_(False)
        if train is not None:
            unfreeze(model, train)
        self._narrow(model)
        shard(model)
        fill(model, checkpoint.read)
        if model.config.codec is not None:
            model.resize(model.config.codec.size)
        return model

    def _narrow(self, model: CausalWanModel) -> None:
        if (dtype := DTYPES.get(self.config.training.mixed_precision)) is not None:
            narrow_frozen(model, dtype)

    def _dense(self, student: CausalWanModel) -> CausalWanModel:
        """The dense model of a student."""
        pair = self.pair
        if not pair.is_codec:
            return build(pair.dense, self.device)
        # A codec leaves its base model's weights as they are, so the two models share them.
        with torch.device("meta"):
            dense = CausalWanModel(pair.dense.config)
        shared = {name: t for name, t in student.state_dict().items() if ".codec." not in name}
        dense.load_state_dict(shared, assign=True)
        return dense.eval().requires_grad_(False)

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
        tensors = {name: self._written(name, weights, spec.dtype) for name, spec in specs.items()}
        files = {
            "config.json": converted_config(config),
            CONVERSION_NAME: record,
            "README.md": model_card(config, record),
        }
        write_checkpoint(self.out, tensors, files, layout=CODEC if is_codec else NATIVE)

    def _written(self, name: str, weights: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A weight as it is written; what mixed precision narrowed is read again."""
        tensor = weights[name]
        if self.pair.is_codec:
            return tensor.to(dtype)  # a codec file keeps its dtypes, and so its size
        is_exact = not tensor.is_meta and tensor.dtype == torch.float32
        return _narrowed(tensor if is_exact else self.pair.source.read(name).float(), dtype)


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
