"""The recover command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.cost import Yes, agree
from vmla_convert.cli.fit import FitIn, fitted, given_keys
from vmla_convert.cli.options import (
    OTHER,
    OUTPUT,
    RUNNING,
    ClipsDir,
    Data,
    Json,
    OutFolder,
    Prompts,
    Teacher,
    TeacherFile,
    named_teacher,
    option,
    read_prompt_file,
)
from vmla_convert.config import NESTED_CUTS, Recipe, RecoverConfig, SourceConfig, command_recipe
from vmla_convert.console import out
from vmla_convert.show import show_planned_recovery, show_recovery

TRAINING = "Training"
CHEAPER = "fewer steps (--steps 20), or shorter clips (--set recover.data.frames=9)"


Steps = Annotated[
    int | None,
    option("--steps", "N", "Steps of velocity distillation. Default: 100.", TRAINING, min=0),
]
Lr = Annotated[
    float | None, option("--lr", "RATE", "Peak learning rate. Default: a probe finds it.", TRAINING)
]
BatchSize = Annotated[
    int | None,
    option("--batch-size", "N", "Clips per step over all processes. Default: 4.", TRAINING, min=1),
]
Nested = Annotated[
    bool,
    option(
        "--nested",
        None,
        "Train a codec at sizes drawn step by step, so that one file serves them all.",
        TRAINING,
    ),
]
Offload = Annotated[
    bool,
    option(
        "--offload",
        None,
        "Layer-wise stage with one block of the dense model in memory at a time; "
        "with --steps 0 the dense model is never in memory as a whole.",
        RUNNING,
    ),
]
Shard = Annotated[
    bool,
    option(
        "--shard", None, "Divide both models over the processes, for less memory each.", RUNNING
    ),
]
Processes = Annotated[
    int | None,
    option("--processes", "N", "Refuse to run with another number of processes.", RUNNING, min=1),
]
DryRun = Annotated[
    bool, option("--dry-run", None, "Check everything, show the plan, and stop.", OUTPUT)
]
Changes = Annotated[
    list[str] | None,
    option(
        "--set",
        "KEY=VALUE",
        "Keys of source (the dense checkpoint), recover, evaluate and media: --set "
        "recover.training.ema=0.99",
        OTHER,
    ),
]


def recover(
    converted: Annotated[
        Path, typer.Argument(help="Folder from 'vmla convert'.", metavar="CONVERTED")
    ],
    folder: OutFolder,
    teacher: Teacher = None,
    file: TeacherFile = None,
    steps: Steps = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    nested: Nested = False,
    data: Data = None,
    prompts: Prompts = None,
    clips_dir: ClipsDir = None,
    offload: Offload = False,
    shard: Shard = False,
    processes: Processes = None,
    dry_run: DryRun = False,
    fit: FitIn = None,
    yes: Yes = False,
    json: Json = False,
    changes: Changes = None,
) -> None:
    """Recover quality with a short fine-tune against the dense model.

    An interrupted run resumes when the command is repeated. On several GPUs:
    torchrun --standalone --nproc_per_node 8 -m vmla_convert recover …
    """
    options = {
        "source.checkpoint": teacher,
        "source.file": file,
        "recover.training.steps": steps,
        "recover.training.lr": lr,
        "recover.training.batch_size": batch_size,
        "recover.nested": list(NESTED_CUTS) if nested else None,
        "recover.offload": offload or None,
        "recover.shard": shard or None,
        "recover.data.source": data,
        "recover.data.prompts": read_prompt_file(prompts),
        "media.clips_dir": clips_dir,
    }
    out.json = json

    def read(more: Sequence[str]) -> Recipe:
        tables = ("source", "recover", "evaluate", "media")
        asked = command_recipe(tables, options, [*(changes or ()), *more])
        return replace(asked, recover=asked.recover or RecoverConfig())

    recipe = read(())
    dense = named_teacher(recipe, teacher)
    if fit is not None or not dry_run:
        from vmla_convert.loading.load import open_named

        given = {key for key, value in options.items() if value is not None} | given_keys(changes)
        config = open_named(converted).config
        recipe = fitted(config, read, "recover", fit, folder, given)
    _recover(converted, dense, folder, recipe, processes, dry_run, yes)


def _recover(
    converted: Path,
    dense: SourceConfig | None,
    folder: Path,
    recipe: Recipe,
    world: int | None,
    dry_run: bool,
    yes: bool,
) -> None:
    from vmla_convert.recovery.plan import plan_recovery
    from vmla_convert.recovery.recover import recover
    from vmla_convert.recovery.run_state import is_begun
    from vmla_convert.training.processes import processes

    settings = recipe.recover or RecoverConfig(), recipe.evaluate
    if processes().is_main_process:
        planned = plan_recovery(converted, dense, folder, *settings, world, recipe.media)
        if dry_run:
            show_planned_recovery(planned)
        else:
            agree(planned.work, yes, CHEAPER)
    if dry_run:
        return
    try:
        with out.progress() as progress:
            rows = recover(converted, dense, folder, *settings, progress, world, recipe.media)
    except KeyboardInterrupt:
        if processes().is_main_process and is_begun(folder):
            out.say("finished steps are kept; to continue: the same command")
        raise
    if processes().is_main_process:
        show_recovery(rows, folder)
