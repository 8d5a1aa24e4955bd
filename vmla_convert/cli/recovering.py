"""Quality after a conversion, won back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vmla_convert.cli.options import Base, Json, OutFolder, Teacher, TeacherFile
from vmla_convert.config import (
    NESTED_CUTS,
    DataConfig,
    DMDConfig,
    EvaluateConfig,
    RecoverConfig,
    TrainingConfig,
)
from vmla_convert.console import out
from vmla_convert.results import Metric
from vmla_convert.show import show_kept
from vmla_convert.tables import from_dict, override


def recover(
    converted: Annotated[Path, typer.Argument(help="Folder from 'vmla convert'.")],
    folder: OutFolder,
    teacher: Teacher = None,
    file: TeacherFile = None,
    steps: Annotated[
        int,
        typer.Option(min=0, help="Of velocity distillation on clips.", rich_help_panel="Stages"),
    ] = TrainingConfig.steps,
    layerwise_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Of the layer-wise stage before, for each layer.", rich_help_panel="Stages"
        ),
    ] = RecoverConfig.layerwise_steps,
    on_policy_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of distillation on the student's own rollouts, after.",
            rich_help_panel="Stages",
        ),
    ] = RecoverConfig.on_policy_steps,
    dmd_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of distribution matching, last: a third model, for clusters.",
            rich_help_panel="Stages",
        ),
    ] = DMDConfig.steps,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default: what a probe of the start finds.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.lr,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Clips per step, over all processes.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.batch_size,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Parts a process divides its clips into; less memory.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.accumulate,
    data: Annotated[
        str,
        typer.Option(
            help="Clips: 'demo'; a safetensors file of latents and context, or a folder of them; "
            "'self', samples of the dense model's own; a video file, or a folder of them.",
            rich_help_panel="Clips",
        ),
    ] = DataConfig.source,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of 'self', one a line; or the one of all videos.",
            metavar="FILE",
            rich_help_panel="Clips",
        ),
    ] = None,
    clips: Annotated[
        int, typer.Option(min=2, help="How many 'self' samples, once.", rich_help_panel="Clips")
    ] = DataConfig.clips,
    frames: Annotated[
        int, typer.Option(min=1, help="Latent frames of a clip.", rich_help_panel="Clips")
    ] = (DataConfig.frames),
    base: Base = None,
    train: Annotated[
        str,
        typer.Option(
            help="new (a codec's encoder and decoder, or MLA's new weights), attention (queries "
            "and output too), all; the last two need a whole checkpoint, not a codec beside one.",
            rich_help_panel="What trains, and how",
        ),
    ] = RecoverConfig.train,
    nested: Annotated[
        bool,
        typer.Option(
            "--nested",
            help="Train a codec at a size drawn each step, so that one file serves all sizes. "
            "Other sizes: --set nested=[0.98,0.95].",
            rich_help_panel="What trains, and how",
        ),
    ] = False,
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of adapters on what stays frozen; merged at the end.",
            rich_help_panel="What trains, and how",
        ),
    ] = RecoverConfig.lora_rank,
    levels: Annotated[
        str,
        typer.Option(
            help="Noise levels: of the sampler, of training, or both.", rich_help_panel="Stages"
        ),
    ] = RecoverConfig.levels,
    mixed_precision: Annotated[
        str,
        typer.Option(
            help="no, bf16 or fp16; what trains stays float32.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.mixed_precision,
    tracker: Annotated[
        str,
        typer.Option(
            help="tensorboard (in OUT.logs), wandb or trackio.", rich_help_panel="Running"
        ),
    ] = TrainingConfig.tracker,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Layer-wise stage with one block of the dense model in memory at a time; with "
            "--steps 0 the whole dense model is never there.",
            rich_help_panel="Running",
        ),
    ] = RecoverConfig.offload,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Divide student and teacher over the processes: less memory for each.",
            rich_help_panel="Running",
        ),
    ] = RecoverConfig.shard,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Refuse to run with another number of processes.", rich_help_panel="Running"
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of all noise in training.",
            rich_help_panel="What trains, and how",
        ),
    ] = TrainingConfig.seed,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting: --set training.ema=0.99, training.patience=4, "
            "training.gradient_checkpointing=true, flow_weight=0.1, rest_lr=0.05.",
            rich_help_panel="What trains, and how",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Check everything, say what would train and be written, stop.",
            rich_help_panel="Running",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Recover quality with a short fine-tune against the dense model; resumes if interrupted.

    A codec learns from its base model. Example:

        vmla recover kv -o kv-recovered --nested

    On several GPUs: torchrun --standalone --nproc_per_node 8 -m vmla_convert recover …
    """
    from vmla_convert.loading.load import read_provenance, teacher_of
    from vmla_convert.media.prompts import read_prompts
    from vmla_convert.recovery import recover as pipeline
    from vmla_convert.recovery.run_state import is_begun
    from vmla_convert.training.processes import processes as started

    out.json = json
    table: dict[str, Any] = {
        "layerwise_steps": layerwise_steps,
        "on_policy_steps": on_policy_steps,
        "train": train,
        "nested": list(NESTED_CUTS) if nested else [],
        "lora_rank": lora_rank,
        "levels": levels,
        "offload": offload,
        "shard": shard,
        "dmd": {"steps": dmd_steps},
        "training": {
            "steps": steps,
            "lr": lr,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "mixed_precision": mixed_precision,
            "tracker": tracker,
            "seed": seed,
        },
        "data": {
            "source": data,
            "frames": frames,
            "clips": clips,
            "prompts": list(read_prompts(prompts)) if prompts else [],
            "base": base,
        },
    }
    for change in settings or ():
        override(table, change)
    config = from_dict(RecoverConfig, table, "recover")
    dense = teacher_of(str(converted), teacher, file)
    if dry_run:
        planned = pipeline.plan_recovery(converted, dense, folder, config, processes)
        if started().is_main_process:
            out.data(planned)
        return
    evaluation = EvaluateConfig(data=replace(config.data, seed=1))
    try:
        with out.progress() as progress:
            rows = pipeline.recover(
                converted, dense, folder, config, evaluation, progress, processes
            )
    except KeyboardInterrupt:
        if started().is_main_process and is_begun(folder):
            out.say("what is done is kept; to go on: the same command")
        raise
    if not started().is_main_process:
        return
    curve = [row for row in rows if row.metric == Metric.VELOCITY_ERROR]
    out.table("Recovery", ["step", "velocity_error"], [[row.step, row.value] for row in curve])
    show_kept(read_provenance(folder)["recovered"])
    out.path("wrote", folder)
