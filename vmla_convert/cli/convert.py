"""The convert command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from vmla_convert.cli.cost import Yes, agree
from vmla_convert.cli.fit import FitIn, fitted, given_keys
from vmla_convert.cli.options import (
    CLIPS,
    OTHER,
    OUTPUT,
    SIZE,
    BytesPerToken,
    Checkpoint,
    ClipsDir,
    Cut,
    Data,
    File,
    Json,
    Loras,
    Model,
    OutFolder,
    Prompts,
    option,
    read_prompt_file,
)
from vmla_convert.config import ConvertConfig, Recipe, command_recipe
from vmla_convert.console import out
from vmla_convert.errors import ConfigError, did_you_mean
from vmla_convert.show import show_conversion, show_planned_output
from vmla_convert.tables import to_dict

CHEAPER = (
    "fewer clips (--set convert.calibration_clips=8), shorter ones (--set convert.data.frames=9), "
    "or --no-calibration"
)

Preset = Annotated[
    str | None,
    option(
        "--preset",
        "NAME",
        "videomla writes a whole checkpoint with the paper's MLA layers, not a codec.",
        OUTPUT,
    ),
]
Layout = Annotated[
    str,
    option(
        "--layout",
        "NAME",
        "Layout of an MLA checkpoint: native, or diffusers (a pipeline's folder).",
        OUTPUT,
    ),
]
Resume = Annotated[bool, option("--resume", None, "Continue an interrupted conversion.", OUTPUT)]
DryRun = Annotated[bool, option("--dry-run", None, "Show what would be written, and stop.", OUTPUT)]
Plan = Annotated[
    Path | None,
    option("--plan", "DIR", "MLA: reuse the sizes of an earlier conversion, layer by layer.", SIZE),
]
NoCalibration = Annotated[
    bool,
    option(
        "--no-calibration", None, "Assume white inputs instead of measuring activations.", CLIPS
    ),
]
Changes = Annotated[
    list[str] | None,
    option(
        "--set",
        "KEY=VALUE",
        "Keys of source, model, convert and media: --set convert.calibration_clips=12",
        OTHER,
    ),
]


def convert(
    checkpoint: Checkpoint,
    folder: OutFolder,
    preset: Preset = None,
    layout: Layout = "native",
    resume: Resume = False,
    dry_run: DryRun = False,
    fit: FitIn = None,
    yes: Yes = False,
    json: Json = False,
    file: File = None,
    model: Model = None,
    loras: Loras = None,
    bytes_per_token: BytesPerToken = None,
    cut: Cut = None,
    plan: Plan = None,
    data: Data = None,
    prompts: Prompts = None,
    clips_dir: ClipsDir = None,
    no_calibration: NoCalibration = False,
    changes: Changes = None,
) -> None:
    """Fit a cache codec to a dense checkpoint, or make a checkpoint with MLA layers.

    The checkpoint is read block by block and never changed. One codec serves every size.
    """
    from vmla_convert.fitting import convert as fitting
    from vmla_convert.fitting.plan import plan_output

    out.json = json
    options = {
        "source.checkpoint": checkpoint,
        "source.file": file,
        "source.model": model,
        "source.loras": loras,
        "convert.size.bytes_per_token": bytes_per_token,
        "convert.size.cut": cut,
        "convert.size.plan": to_dict(fitting.read_plan(plan)) if plan else None,
        "convert.data.source": data,
        "convert.data.prompts": read_prompt_file(prompts),
        "media.clips_dir": clips_dir,
        "convert.calibrate": False if no_calibration else None,
    }
    started = {"convert": _preset(preset, fitting.PRESETS)} if preset else None

    def read(more: Sequence[str]) -> Recipe:
        tables = ("source", "model", "convert", "media")
        return command_recipe(tables, options, [*(changes or ()), *more], started)

    recipe = read(())
    if fit is not None or not dry_run:
        from vmla_convert.loading.load import open_named

        given = {key for key, value in options.items() if value is not None} | given_keys(changes)
        dense = open_named(recipe.dense).config
        recipe = fitted(dense, read, "convert", fit, folder, given)
    config = recipe.convert or ConvertConfig()
    planned = plan_output(recipe.dense, folder, config, resume, layout, recipe.media)
    if dry_run:
        show_planned_output(planned)
        return
    agree(planned.work, yes, CHEAPER)
    try:
        with out.progress() as progress:
            done = fitting.convert(
                recipe.dense, folder, config, progress, resume, layout, recipe.media
            )
    except KeyboardInterrupt:
        _say_how_to_resume(folder)
        raise
    show_conversion(done, folder, _next_command(recipe, folder))


def _preset(name: str, known: dict[str, ConvertConfig]) -> dict[str, Any]:
    if name not in known:
        raise ConfigError(f"unknown preset '{name}'", did_you_mean(name, known))
    return to_dict(known[name])


def _say_how_to_resume(folder: Path) -> None:
    from vmla_convert.fitting.convert import can_resume

    if can_resume(folder):
        out.say("finished layers are kept; to continue: the same command with --resume")


def _next_command(recipe: Recipe, folder: Path) -> str:
    config = recipe.convert or ConvertConfig()
    words = ["vmla", "recover", str(folder)]
    words += ["--teacher", recipe.source.checkpoint] if config.product == "mla" else []
    words += ["-o", f"{folder}-recovered"]
    words += ["--data", config.data.source] if config.data != ConvertConfig().data else []
    return shlex.join(words)
