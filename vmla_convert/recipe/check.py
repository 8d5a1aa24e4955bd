"""Refuse, before anything is written, what a stage of a recipe would fail on later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vmla_convert.checkpoint.families import OpenCheckpoint, open_checkpoint
from vmla_convert.config import STAGES, ConvertConfig, Recipe, RecoverConfig
from vmla_convert.errors import ConfigError
from vmla_convert.fitting.calibration_clips import calibration_needs
from vmla_convert.fitting.dense_source import refuse_converted
from vmla_convert.fitting.plan import plan_conversion
from vmla_convert.generating.make_clips import Need, check_needs
from vmla_convert.loading.load import locate
from vmla_convert.media.clips import source_kind
from vmla_convert.media.open import check_prompts, open_media
from vmla_convert.recovery.checks import check_recovery, recovery_needs
from vmla_convert.results import ROWS_NAME
from vmla_convert.sweep.grid import sweep_points
from vmla_convert.sweep.sweep import check_sweep, sweep_needs


def check_recipe(recipe: Recipe, out: Path, only: Sequence[str] = STAGES) -> None:
    """Check the settings, the source, the clips and the prompts of the stages that will run.

    Args:
        recipe: From `read_recipe`.
        out: Folder of the run. What an interrupted run left there counts as made.
        only: Stages that may run.

    Raises:
        ConfigError: No stage would run, a stage lacks its input, a setting does not fit the source,
            or clips are missing or do not fit the source.
        CheckpointError: The source cannot be read or converted.
        VmlaError: The text encoder cannot encode a prompt.
    """
    stages = [stage for stage in recipe.stages() if stage in only]
    if not stages:
        tables = ", ".join(f"[{stage}]" for stage in only)
        raise ConfigError(
            f"recipe '{recipe.recipe.name}' has no stage to run", f"give it one of {tables}"
        )
    _check_inputs(recipe, out, stages)
    if set(stages) - {"teacher", "report"}:
        _check_source(recipe, out, stages)


def count_points(recipe: Recipe) -> int:
    """Number of points in a recipe's sweep; 0 without one."""
    if recipe.sweep is None:
        return 0
    shared, recovery = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    return len(sweep_points(recipe.sweep, shared, recovery))


def step0_folder(recipe: Recipe, out: Path) -> Path:
    """Folder of the conversion: the final one, unless a recovery follows."""
    return out / ("converted" if recipe.recover is None else "converted-step0")


def is_made(recipe: Recipe, out: Path, stage: str) -> bool:
    """Whether an interrupted run left the output of a stage."""
    final = out / "converted"
    made = {"convert": (step0_folder(recipe, out), final), "recover": (final,)}
    return any(folder.exists() for folder in made.get(stage, ()))


def unmade(recipe: Recipe, out: Path, stages: Sequence[str]) -> list[str]:
    """The stages whose output an interrupted run did not leave."""
    return [stage for stage in stages if not is_made(recipe, out, stage)]


def _check_inputs(recipe: Recipe, out: Path, stages: list[str]) -> None:
    """Each stage finds its input: left by an earlier run, or made by a stage before it."""
    step0, final, rows = step0_folder(recipe, out), out / "converted", out / ROWS_NAME
    makes = {"convert": step0, "recover": final}
    needs = {
        "recover": ({step0, final}, "convert"),
        "generate": ({final}, "convert"),
        "report": ({rows}, "sweep"),
    }
    made = {path for path in (step0, final, rows) if path.exists()}
    for stage in stages:
        if stage in needs and made.isdisjoint(needs[stage][0]):
            raise ConfigError(
                f"the {stage} stage has nothing to work on",
                f"add a table [{needs[stage][1]}] to the recipe",
            )
        made |= {rows, makes.get(stage, rows)}


def _check_source(recipe: Recipe, out: Path, stages: list[str]) -> None:
    stages = unmade(recipe, out, stages)
    for need in recipe_needs(recipe, stages):
        if need.data.source != "auto":
            source_kind(need.data.source)  # before a source is downloaded for hours
    path, how = locate(recipe.dense)
    if "teacher" in stages and path.resolve() == (out / "checkpoint").resolve():
        return  # the teacher stage of this run will make the source
    checkpoint = open_checkpoint(path, how)
    _check_stages(recipe, stages, checkpoint)
    if recipe.generate and "generate" in stages:
        open_media(checkpoint.config, recipe.media, path)
        check_prompts(checkpoint.config, recipe.generate.prompts)


def recipe_needs(recipe: Recipe, stages: Sequence[str]) -> list[Need]:
    """The clips of the stages that will run."""
    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    needs: list[Need] = []
    if "convert" in stages:
        needs += calibration_needs(convert)
    if "recover" in stages:
        needs += recovery_needs(recover, recipe.evaluate)
    if "sweep" in stages and recipe.sweep:
        needs += sweep_needs(recipe.sweep, convert, recover, recipe.evaluate)
    return needs


def _check_stages(recipe: Recipe, stages: list[str], checkpoint: OpenCheckpoint) -> None:
    """Settings, clips and prompts fit the model; one clip of each source is read."""
    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    refuse_converted(checkpoint)
    if "convert" in stages:
        plan_conversion(checkpoint, convert)
    if "recover" in stages:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_recovery(recover, world)
    if "sweep" in stages and recipe.sweep:
        check_sweep(checkpoint.config, recipe.sweep, convert, recover)
    check_needs(checkpoint, recipe_needs(recipe, stages), recipe.media)
