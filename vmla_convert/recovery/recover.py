"""Recover quality after a conversion, stage by stage (METHOD 9).

Layer by layer each converted layer learns its dense layer's output; then the whole student learns
the dense model's velocity, first on clips, then on what it rolled out itself. Stages need clips, or
prompts only, and the dense model. No stage ends worse than it began: the weights that measured best
on held-out clips are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.checkpoint.layouts import CODEC, NATIVE
from vmla_convert.checkpoint.output import partial_folder, refuse_taken
from vmla_convert.checkpoint.settings import converted_config
from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import (
    DENSE_ITEMSIZE,
    CacheSize,
    EvaluateConfig,
    MediaConfig,
    ModelConfig,
    RecoverConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, OutputError, VmlaError
from vmla_convert.fitting.calibrate import check_clips
from vmla_convert.generating.make_clips import check_makeable, prepare_clips
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.card import model_card
from vmla_convert.loading.load import (
    CONVERSION_NAME,
    Source,
    build,
    build_shell,
    compute_device,
    is_codec,
    locate,
    open_named,
    read_block,
    read_provenance,
    teacher_of,
)
from vmla_convert.measuring.evaluate import HeldOut, check_held_out, dense_rows, measuring_bar
from vmla_convert.measuring.rows import Errors, cache_rows, error_rows, row_fields
from vmla_convert.media.clips import open_clips, recorded, source_kind
from vmla_convert.media.models import Media, open_media
from vmla_convert.progress import Progress, Silent
from vmla_convert.recovery.stages import (
    LAYERWISE,
    Folders,
    Recovered,
    fit_layers,
    later_steps,
    recover_model,
    stage_steps,
)
from vmla_convert.recovery.trained import add_adapters, check_adapters, unfreeze
from vmla_convert.results import Metric, Row, append_rows, read_rows
from vmla_convert.tables import first_difference, to_dict
from vmla_convert.training.loop import check_tracker
from vmla_convert.training.processes import check_shares, processes
from vmla_convert.training.sharding import gathered, shard

SETTINGS = "settings.json"
_MADE = ("self", "videos")
"""Clips that a model is needed for."""


def recover(
    converted: str | Path,
    teacher: Source | None,
    out: Path,
    config: RecoverConfig | None = None,
    evaluation: EvaluateConfig | None = None,
    progress: Progress | None = None,
    world: int | None = None,
) -> list[Row]:
    """Recover a converted folder and write the result as a new one.

    An interrupted run leaves `<out>.state/` and goes on from there when it is started again. All
    processes that were started together do it together; only the first writes and draws.

    Args:
        converted: Folder from `convert`.
        teacher: The dense checkpoint that it came from; None for the base model of a codec.
        out: Folder to write; appears whole or not at all.
        config: Steps, learning rates and data.
        evaluation: Held-out clips that the curve is measured on.
        progress: Where to draw.
        world: Processes that must have been started; any number by default.

    Returns:
        The recovery curve as rows.

    Raises:
        CheckpointError: `converted` is not converted, `teacher` is, or they do not fit.
        ConfigError: Clips or batch do not fit.
        OutputError: `out` is taken, or an unfinished run there had other settings or inputs.
        VmlaError: Another number of processes was started.
    """
    config, evaluation = config or RecoverConfig(), evaluation or EvaluateConfig()
    processes = _processes(world)
    progress = progress if progress and processes.is_main_process else Silent()
    source, dense = _opened(converted, teacher, out)
    _check_scope(converted, source, config)
    check_recovery(dense, config, evaluation, processes.num_processes)
    run = _Run(converted, source, dense, out, config, evaluation, progress, processes)
    rows = run.rows(read_provenance(converted))
    processes.wait_for_everyone()
    return rows


def plan_recovery(
    converted: str | Path,
    teacher: Source | None,
    out: Path,
    config: RecoverConfig,
    world: int | None = None,
) -> dict[str, Any]:
    """What `recover` would do with the same arguments, JSON-able; nothing is written.

    Raises:
        VmlaError: What `recover` would raise before any work.
    """
    processes = _processes(world)
    source, dense = _opened(converted, teacher, out)
    _check_scope(converted, source, config)
    check_recovery(dense, config, EvaluateConfig(data=config.data), processes.num_processes)
    kind, clips = source_kind(config.data.source), f"made into {_beside(out, 'clips')}"
    with torch.device("meta"):
        student = CausalWanModel(source.config).requires_grad_(False)
    unfreeze(student, config.train)
    if config.lora_rank:
        add_adapters(student, config.lora_rank, config.train)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {
        "teacher": str(dense.source.path),
        "steps": stage_steps(config),
        "trains": trained,
        "of": sum(p.numel() for p in student.parameters()),
        "processes": processes.num_processes,
        "clips": clips if kind in _MADE else open_clips(config.data).record(),
        "would write": str(out),
        "bytes": sum(spec.nbytes for spec in written_specs(converted, source).values()),
    }


def is_begun(out: Path) -> bool:
    """Whether an interrupted recovery left something to go on with."""
    clips = _beside(out, "clips")
    left = (_beside(out, "state"), clips, partial_folder(clips))
    return not out.exists() and any(path.exists() for path in left)


def check_pair(student: CausalWanModel, teacher: CausalWanModel) -> None:
    """Refuse a teacher that cannot be the student's source.

    Raises:
        CheckpointError: The teacher is converted, or of another geometry.
    """
    check_configs(student.config, teacher.config)


def check_configs(student: ModelConfig, teacher: ModelConfig) -> None:
    """As `check_pair`, before anything is read.

    Raises:
        CheckpointError: See there.
    """
    if not teacher.is_dense:
        raise CheckpointError(
            "the teacher is a converted checkpoint", "give the dense one: --teacher CKPT"
        )
    if teacher.geometry != student.geometry:
        raise CheckpointError(
            "the teacher's geometry is not that of the converted checkpoint",
            "give the dense checkpoint that it was converted from: --teacher CKPT",
        )


class _Run:
    """A recovery of a folder."""

    def __init__(
        self,
        converted: str | Path,
        source: OpenCheckpoint,
        dense: OpenCheckpoint,
        out: Path,
        config: RecoverConfig,
        evaluation: EvaluateConfig,
        progress: Progress,
        processes: PartialState,
    ) -> None:
        self.source, self.dense, self.out = source, dense, out
        self.asked, self.config, self.evaluation = config, config, evaluation
        self.progress, self.processes, self.device = progress, processes, compute_device()
        self.is_codec = is_codec_folder(converted)
        self.folders = Folders(_beside(out, "state"), _beside(out, "logs"))
        self.clips = _beside(out, "clips")

    def rows(self, provenance: dict[str, Any]) -> list[Row]:
        """Recover, write, and return the curve."""
        started = perf_counter()
        with self.processes.main_process_first():
            self._claim_state(provenance)
        try:
            self._prepare_clips(provenance)
            rows, student, recovered = self._recovered()
        except (VmlaError, KeyboardInterrupt):
            self._leave_if_new()
            raise
        seconds, fields = perf_counter() - started, row_fields(student.config)
        rows.append(Row(Metric.RECOVER_SECONDS, seconds, "s", **fields))
        if recovered.learning_rate is not None:
            rows.append(Row(Metric.LEARNING_RATE, recovered.learning_rate, "per step", **fields))
        weights = gathered(student.state_dict())
        if not self.processes.is_main_process:
            return rows
        rows += _read_curve(self.folders.state)
        self._write(student.config, weights, provenance, recovered, rows)
        shutil.rmtree(self.folders.state)
        return rows

    def _recovered(self) -> tuple[list[Row], CausalWanModel, Recovered]:
        """All stages, with no more of both models in memory at a time than each needs."""
        config = self.config
        if config.layerwise_steps and (config.offload or config.shard):
            student = self._fitted()
            if config.offload and not later_steps(config):
                recovered = Recovered({LAYERWISE: config.layerwise_steps}, None)
                return cache_rows(student.config), student, recovered
            # What was fitted waits on its shelf; errors before it are still to be measured.
            del student
        # Full at step 0, after two passes of the dense model: later stages have their own bars.
        with closing(measuring_bar(self.progress, self.evaluation, passes=3)) as measuring:
            student, dense = self._models()
            held_out = HeldOut(dense, self.evaluation, progress=measuring)
            rows = [*dense_rows(dense, held_out), *cache_rows(student.config)]
            curve = _curve(self.folders.state)

            def on_step(step: int, errors: Errors) -> None:
                append_rows(curve, error_rows(errors, student.config, step))

            recovered = recover_model(
                student, dense, config, held_out, on_step, self.folders, self.progress
            )
        return rows, student, recovered

    def _fitted(self) -> CausalWanModel:
        """The student after the layer-wise stage, with one block of the dense model at a time."""
        student, shell = build(self.source, self.device), build_shell(self.dense, self.device)
        blocks = partial(read_block, self.dense, device=self.device)
        fit_layers(student, shell, blocks, self.config, self.folders, self.progress)
        return student

    def _models(self) -> tuple[CausalWanModel, CausalWanModel]:
        """Student and dense model; one is divided, if it is to be, before the next is read."""
        if not self.config.shard:
            student = build(self.source, self.device)
            return student, self._dense_beside(student)
        student = build(self.source)
        unfreeze(student, self.config.train)
        return shard(student), shard(build(self.dense))

    def _dense_beside(self, student: CausalWanModel) -> CausalWanModel:
        """The dense model; a codec's base has its weights already."""
        if not self.is_codec:
            return build(self.dense, self.device)
        with torch.device("meta"):
            dense = CausalWanModel(self.dense.config)
        shared = {name: t for name, t in student.state_dict().items() if ".codec." not in name}
        dense.load_state_dict(shared, assign=True)
        return dense.eval().requires_grad_(False)

    def _prepare_clips(self, provenance: dict[str, Any]) -> None:
        """From here on clips are latents, made now where they have to be."""
        data, evaluated = self.config.data, self.evaluation.data
        if source_kind(data.source) not in _MADE:
            return
        dense, origin = build(self.dense, self.device), provenance.get("source")
        media = _media_of(self.dense, self.config, self.device)
        with self.processes.main_process_first():
            made = prepare_clips(data, dense, self.clips, origin, self.progress, media)
        self.config = replace(self.config, data=made)
        if evaluated.source == data.source:
            held_out = replace(evaluated, source=made.source)
            self.evaluation = replace(self.evaluation, data=held_out)

    def _claim_state(self, provenance: dict[str, Any]) -> None:
        """Take a new folder for state, or one that a run of the same settings left unfinished."""
        state = self.folders.state
        settings = {
            "recover": to_dict(self.asked),
            "evaluation": to_dict(self.evaluation),
            "converted": provenance,
            "teacher": str(self.dense.source.path),
        }
        file = state / SETTINGS
        if file.exists() and (was := json.loads(file.read_text())) != settings:
            raise OutputError(
                f"{state} holds an unfinished recovery with {_other_settings(was, settings)}",
                f"remove it, or use the settings in {file}",
            )
        if self.processes.is_main_process:
            state.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings))

    def _leave_if_new(self) -> None:
        """Drop a state in which nothing was done, so that other settings can be tried."""
        state = self.folders.state
        held = [path.name for path in state.iterdir()] if state.is_dir() else []
        if self.processes.is_main_process and held == [SETTINGS]:
            shutil.rmtree(state)

    def _write(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        provenance: dict[str, Any],
        recovered: Recovered,
        rows: list[Row],
    ) -> None:
        specs, clips = self.source.specs(), open_clips(self.config.data)
        if self.is_codec:
            # A codec keeps its size: what trained is rounded as it was before.
            weights = {n: t.to("cpu", specs[n].dtype) for n, t in weights.items() if ".codec." in n}
        record = {
            "recover": to_dict(replace(self.asked, data=recorded(self.asked.data))),
            "recovered": {
                "kept_steps": recovered.kept,
                "learning_rate": recovered.learning_rate,
                "clips": clips.record(),
                **self._errors(rows),
            },
        }
        write_checkpoint(
            self.out,
            {name: _narrowed(t, specs[name].dtype) for name, t in weights.items()},
            {
                "config.json": converted_config(config),
                CONVERSION_NAME: provenance | record,
                "README.md": model_card(config, provenance | record),
            },
            layout=CODEC if self.is_codec else NATIVE,
        )

    def _errors(self, rows: list[Row]) -> dict[str, Any]:
        """What was measured of the whole model first and last; nothing where nothing was."""
        points: dict[int, dict[str, float]] = {}
        for row in rows:
            if row.step is not None:
                points.setdefault(row.step, {"step": row.step})[row.metric] = row.value
        dense = [row.value for row in rows if row.metric == Metric.FLOW_LOSS and row.step is None]
        if not points:
            return {}
        first, last = points[min(points)], points[max(points)]
        held_out = {"source": self.evaluation.data.source, "clips": self.evaluation.clips}
        return {"errors": {**held_out, "first": first, "last": last, "dense_flow_loss": dense[0]}}


def _opened(
    converted: str | Path, teacher: Source | None, out: Path
) -> tuple[OpenCheckpoint, OpenCheckpoint]:
    """Student and teacher, if they fit and `out` is free."""
    refuse_taken(out)  # what would be refused at the end, after all the training
    source, dense = open_named(converted), open_named(teacher_of(str(converted), teacher))
    if source.config.is_dense:
        raise CheckpointError(
            f"{converted} is not a converted checkpoint", "make one first: vmla convert CKPT -o OUT"
        )
    check_configs(source.config, dense.config)
    return source, dense


def written_specs(converted: str | Path, source: OpenCheckpoint) -> dict[str, TensorSpec]:
    """The tensors that a recovery writes: all, or those of a codec beside its base model."""
    specs = source.specs()
    if not is_codec_folder(converted):
        return specs
    return {name: spec for name, spec in specs.items() if ".codec." in name}


def is_codec_folder(converted: str | Path) -> bool:
    """Whether a conversion is a codec beside its base model."""
    return is_codec(locate(str(converted))[0])


def _check_scope(converted: str | Path, source: OpenCheckpoint, config: RecoverConfig) -> None:
    """Refuse to train what is not written.

    Raises:
        ConfigError: A codec's base model was to be trained, or sizes are nested without a codec.
    """
    if config.nested:
        _check_nested(source.config, config.nested)
    if is_codec_folder(converted) and (config.train != "new" or config.lora_rank):
        what = "lora_rank" if config.lora_rank else f"train '{config.train}'"
        raise ConfigError(
            f"{what} would change the base model, which {converted} leaves as it is",
            f"make a whole checkpoint first: vmla export {converted} -o whole",
        )


def _check_nested(config: ModelConfig, cuts: Sequence[float]) -> None:
    if config.codec is None:
        raise ConfigError("only a codec has nested sizes", "leave --nested out")
    most = config.codec.rank * DENSE_ITEMSIZE
    for cut in cuts:
        asked = CacheSize(cut=cut).token_bytes(config.geometry)
        if not 1 <= asked <= most:
            raise ConfigError(
                f"nested size {cut:g} makes {asked:g} bytes per token, which are not between 1 and "
                f"{most}, all that this codec holds",
                "give sizes that it holds: --set nested=[0.98,0.95]",
            )


def check_recovery(
    dense: OpenCheckpoint, config: RecoverConfig, evaluation: EvaluateConfig, world: int
) -> None:
    """Refuse, before anything is written, what a stage would fail on later; a clip or two is read.

    Args:
        dense: The dense model.
        config: Steps and data.
        evaluation: Held-out clips.
        world: Processes that recover together.

    Raises:
        CheckpointError: Clips have to be made, and the text encoder and VAE are not there.
        ConfigError: The batch or the models do not divide, or clips are not there, too short, or
            cannot be made.
        MissingExtraError: Adapters are asked for, and peft is not installed.
        VmlaError: The model's text encoder cannot read a prompt of clips that have to be made.
    """
    check_shares(config.training, world)
    check_tracker(config.training)
    check_adapters(config.lora_rank)
    if config.shard and world == 1:
        raise ConfigError(
            "shard divides models over processes, and there is one",
            "torchrun --standalone --nproc_per_node 2 -m vmla_convert recover …",
        )
    if not any(stage_steps(config).values()):
        raise ConfigError("no stage has any steps", "give some: --steps 100")
    if config.data.frames < 2 * dense.config.chunk_frames:
        raise ConfigError(
            f"clips of {config.data.frames} frames have no chunk with a past",
            f"use at least {2 * dense.config.chunk_frames} frames",
        )
    made = source_kind(config.data.source) in _MADE
    if made:
        media = _media_of(dense, config, torch.device("cpu"))
        check_makeable(config.data, dense.config, media)
    else:
        check_clips(dense.config, open_clips(config.data).batch(0, 1))
    measured = not config.offload or later_steps(config)
    if measured and not (made and evaluation.data.source == config.data.source):
        check_held_out(dense.config, evaluation)


def _media_of(dense: OpenCheckpoint, config: RecoverConfig, device: torch.device) -> Media:
    """The media that makes clips."""
    return open_media(dense.config, MediaConfig(config.data.base), dense.source.path, device)


def _processes(world: int | None) -> PartialState:
    """The processes that were started together.

    Raises:
        VmlaError: They are not as many as they should be.
    """
    state = processes()
    if world is not None and state.num_processes != world:
        raise VmlaError(
            f"{world} processes were asked for, and {state.num_processes} started",
            f"torchrun --standalone --nproc_per_node {world} -m vmla_convert recover …",
        )
    return state


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, in its source's dtype where that is exact: where it did not train."""
    narrow = tensor.to("cpu", dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor.cpu()) else tensor.cpu()


def _other_settings(was: dict[str, Any], settings: dict[str, Any]) -> str:
    """Words for settings that are not as they were; the first that differs is named."""
    found = first_difference(was, settings)
    if found is None:
        return "other settings"
    name, *values = found
    there, here = ("not set" if v is None else json.dumps(v, ensure_ascii=False) for v in values)
    return f"other settings: {name} is {there} there and {here} here"


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f"{out.name}.{kind}")


def _curve(state: Path) -> Path:
    return state / "curve.jsonl"


def _read_curve(state: Path) -> list[Row]:
    curve, rows = _curve(state), dict[tuple[str, int | None], Row]()
    if curve.is_file():
        # A resumed run measures again what came after its last checkpoint; it finds the same.
        rows = {(row.metric, row.step): row for row in read_rows(curve)}
    return list(rows.values())
