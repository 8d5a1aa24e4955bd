"""Recover quality after a conversion: layer-wise regression, then velocity distillation.

METHOD 9, but at the noise levels of pretraining, not at the sampler's few. Both stages only need
clips and the dense model. Only what the conversion made is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from vmla_convert.checkpoint.families import converted_config
from vmla_convert.checkpoint.writer import write_checkpoint
from vmla_convert.config import EvaluateConfig, RecoverConfig, TrainingConfig
from vmla_convert.errors import CheckpointError, OutputError
from vmla_convert.layers.attention import DenseSelfAttention
from vmla_convert.layers.dit import Attend, Block, CausalWanModel
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.maths.masks import Visibility
from vmla_convert.pipelines.data import ClipSource, open_clips, open_openings, seeded
from vmla_convert.pipelines.evaluate import HeldOut, dense_rows
from vmla_convert.pipelines.load import (
    CONVERSION_NAME,
    Source,
    as_teacher,
    build,
    compute_device,
    load,
    open_named,
    read_provenance,
)
from vmla_convert.pipelines.losses import (
    Example,
    make_example,
    teacher_forcing_inputs,
    velocity_distillation,
)
from vmla_convert.pipelines.publish import model_card
from vmla_convert.pipelines.rows import Errors, cache_rows, error_rows, row_fields
from vmla_convert.pipelines.training import clip_examples, learning_rate_factor, train
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import Row, append_rows, read_rows
from vmla_convert.tables import to_dict

LAYERWISE_CLIPS = 32

OnStep = Callable[[int, Errors], None]
"""Told of every held-out measurement: steps taken so far, and the errors."""


def recover(
    converted: str | Path,
    teacher: Source,
    out: Path,
    config: RecoverConfig | None = None,
    evaluation: EvaluateConfig | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Recover a converted folder and write the result as a new one.

    An interrupted run leaves `<out>.state/` and goes on from there when it is started again.

    Args:
        converted: Folder from `convert`.
        teacher: The dense checkpoint that it came from.
        out: Folder to write; appears whole or not at all.
        config: Steps, learning rates and data.
        evaluation: Held-out clips that the curve is measured on.
        progress: Where to draw.

    Returns:
        The recovery curve as rows.

    Raises:
        CheckpointError: `converted` is not converted, `teacher` is, or they do not fit.
        OutputError: `out` is taken, or an unfinished run there had other settings or inputs.
    """
    config, progress = config or RecoverConfig(), progress or Silent()
    if out.exists():
        raise OutputError(f"{out} exists already", "choose another -o, or remove it")
    source = open_named(converted)
    if source.config.mla is None:
        raise CheckpointError(
            f"{converted} is not a converted checkpoint", "make one first: vmla convert CKPT -o OUT"
        )
    device, specs = compute_device(), source.specs()
    student, dense = build(source, device), load(as_teacher(teacher, str(converted)), device)
    check_pair(student, dense)
    held_out = HeldOut(dense, evaluation or EvaluateConfig())
    rows = [*dense_rows(dense, held_out), *cache_rows(student.config)]
    started = perf_counter()
    state = out.with_name(out.name + ".state")
    provenance = read_provenance(converted)
    _claim_state(state, {"recover": to_dict(config), "converted": provenance})
    curve = state / "curve.jsonl"

    def on_step(step: int, errors: Errors) -> None:
        append_rows(curve, error_rows(errors, student.config, step))

    recover_model(student, dense, config, held_out, on_step, state, progress)
    seconds = perf_counter() - started
    rows.append(Row("recover_seconds", seconds, "s", **row_fields(student.config)))
    provenance |= {"recover": to_dict(config)}
    write_checkpoint(
        out,
        # Untouched tensors go back to their source's dtype, which is exact.
        {name: t.to("cpu", specs[name].dtype) for name, t in student.state_dict().items()},
        {
            "config.json": converted_config(student.config),
            CONVERSION_NAME: provenance,
            "README.md": model_card(student.config, provenance.get("source", {})),
        },
    )
    return rows + _finish_state(state, curve)


def check_pair(student: CausalWanModel, teacher: CausalWanModel) -> None:
    """Refuse a teacher that cannot be the student's source.

    Raises:
        CheckpointError: The teacher is converted, or of another geometry.
    """
    if teacher.config.mla is not None:
        raise CheckpointError(
            "the teacher is a converted checkpoint", "give the dense one: --teacher CKPT"
        )
    if teacher.config.geometry != student.config.geometry:
        raise CheckpointError(
            "the teacher's geometry is not that of the converted checkpoint",
            "give the dense checkpoint that it was converted from: --teacher CKPT",
        )


def recover_model(
    student: CausalWanModel,
    teacher: CausalWanModel,
    config: RecoverConfig,
    held_out: HeldOut,
    on_step: OnStep,
    state: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Run both stages on a model in memory.

    Args:
        student: Converted; trained in place.
        teacher: Its dense source.
        config: Steps, learning rates and data.
        held_out: What to measure on.
        on_step: Called at step 0, after the layer-wise stage and during distillation; a layer-wise
            step counts as one, because it updates every layer once.
        state: Folder for resumable checkpoints of the distillation.
        progress: Where to draw.
    """
    progress = progress or Silent()
    chunk_frames = teacher.config.chunk_frames
    clips = open_clips(config.data, teacher.config.cache.sink_frames)
    openings = open_openings(config.data, chunk_frames)
    resumed = state is not None and any(state.glob("step-*[0-9]"))
    if not resumed:
        on_step(0, held_out.measure(student))
        recover_layerwise(student, teacher, clips, config, progress)
    for layer in _latent_layers(student):
        for parameter in new_parameters(layer):
            parameter.requires_grad_(True)

    def measure(model: nn.Module, step: int) -> float:
        errors = held_out.measure(model)
        if step or config.layerwise_steps:
            on_step(config.layerwise_steps + step, errors)
        return errors.velocity_error

    train(
        student,
        velocity_distillation(teacher),
        clip_examples(clips, chunk_frames, config.training, openings),
        config.training,
        measure,
        state,
        progress,
        "distilling",
    )
    student.requires_grad_(False)


def recover_layerwise(
    student: CausalWanModel,
    teacher: CausalWanModel,
    clips: ClipSource,
    config: RecoverConfig,
    progress: Progress | None = None,
) -> None:
    """Fit each converted layer to its dense layer's output on the dense model's own inputs.

    One block at a time, as the clips walk through the dense model; nothing else is in memory.
    """
    if not config.layerwise_steps:
        return
    progress = progress or Silent()
    seed = config.training.seed
    example = make_example(
        clips.batch(0, LAYERWISE_CLIPS), teacher.config.chunk_frames, seeded(seed, 0, "layerwise")
    ).to(teacher.patch_embedding.weight.device)
    positions, mask = teacher_forcing_inputs(teacher.config, example)
    layers = _latent_layers(student)
    steps = _walk(teacher, example, positions, mask)
    for layer, (block, x, attend) in zip(
        layers, progress.track(steps, "layer by layer", len(layers)), strict=True
    ):
        assert isinstance(block.self_attn, DenseSelfAttention)
        with torch.no_grad():
            target = torch.cat([attend(block.self_attn, part) for part in x.split(8)])
        _fit_layer(layer, x, target, attend, config)


def new_parameters(layer: LatentSelfAttention) -> list[nn.Parameter]:
    """What a conversion made and recovery trains; query, output and norms stay the source's."""
    parts = [layer.kv_a_proj, layer.kv_b_proj_k, layer.kv_b_proj_v]
    parameters = [p for part in parts for p in part.parameters()]
    if layer.rope_pairs:
        parameters += [*layer.k_rope_proj.parameters(), layer.q_rope_map]
    if layer.q_nope_map is not None:
        parameters.append(layer.q_nope_map)
    if layer.k_norm == "latent":
        parameters += layer.k_norm_latent.parameters()
    return parameters


def _walk(
    teacher: CausalWanModel, example: Example, positions: Tensor, mask: Visibility
) -> Iterator[tuple[Block, Tensor, Attend]]:
    """The teacher's walk with gradients off in its own steps only, so that layers can be fitted."""
    steps = teacher.walk(example.latents, example.timestep, example.context, positions, mask)
    while True:
        with torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step


def _fit_layer(
    layer: LatentSelfAttention, x: Tensor, target: Tensor, attend: Attend, config: RecoverConfig
) -> None:
    """Regress one layer's output on (x, target), both (clips, 2L, d)."""
    parameters = [p.requires_grad_(True) for p in new_parameters(layer)]
    optimiser = torch.optim.Adam(parameters, lr=config.layerwise_lr)
    schedule = TrainingConfig(steps=config.layerwise_steps, warmup_steps=5)
    scale = target.square().mean()
    for step in range(config.layerwise_steps):
        for group in optimiser.param_groups:
            group["lr"] = config.layerwise_lr * learning_rate_factor(step, schedule)
        generator = seeded(config.training.seed, step, "layerwise batch")
        picks = torch.randint(len(x), (config.training.batch_size,), generator=generator)
        loss = (attend(layer, x[picks]) - target[picks]).square().mean() / scale
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def _latent_layers(student: CausalWanModel) -> list[LatentSelfAttention]:
    return [a for a in student.self_attentions() if isinstance(a, LatentSelfAttention)]


def _claim_state(state: Path, settings: dict[str, object]) -> None:
    """Take a new folder for state, or one that a run of the same settings left unfinished."""
    file = state / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise OutputError(
            f"{state} holds an unfinished recovery with other settings",
            f"remove it, or use the settings in {file}",
        )
    state.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


def _finish_state(state: Path, curve: Path) -> list[Row]:
    """Read the curve, then drop the state: the run is complete."""
    # A resumed run measures again what came after its last checkpoint; it finds the same.
    rows = {(row.metric, row.step): row for row in read_rows(curve)}
    shutil.rmtree(state)
    return list(rows.values())
