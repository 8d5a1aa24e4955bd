"""The plan of a recipe: checked and known before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmla_convert.config import STAGES, ConvertConfig, ModelConfig, Recipe, RecoverConfig
from vmla_convert.fitting.calibration_clips import calibration_passes
from vmla_convert.fitting.codec import plan_codec
from vmla_convert.fitting.memory import conversion_memory
from vmla_convert.generating.clip_cost import PlannedWork, clip_shape, plan_work
from vmla_convert.generating.clip_sets import clips_folder
from vmla_convert.generating.make_clips import Clips, check_needs
from vmla_convert.layers.memory import Memory
from vmla_convert.loading.load import open_named
from vmla_convert.recipe.check import check_recipe, count_points, recipe_needs, unmade
from vmla_convert.recovery.checks import recovery_passes
from vmla_convert.recovery.memory import recovery_memory


@dataclass(frozen=True)
class PlannedRun:
    """The work of a recipe.

    Attributes:
        recipe: Name of the recipe.
        stages: Stages that would run.
        points: Points of the sweep; 0 without one.
        out: Folder that would be written.
        work: Clips, and the time that sampling, calibrating and training take.
    """

    recipe: str
    stages: tuple[str, ...]
    points: int
    out: str
    work: PlannedWork


def plan_recipe(recipe: Recipe, out: Path, only: Sequence[str] = STAGES) -> PlannedRun:
    """Check a recipe as `check_recipe` does, and return what it would do."""
    check_recipe(recipe, out, only)
    stages = [stage for stage in recipe.stages() if stage in only]
    points = count_points(recipe) if "sweep" in stages else 0
    work = PlannedWork(str(clips_folder(recipe.media)), Memory(0))
    left = unmade(recipe, out, stages)
    if "teacher" not in stages and (needs := recipe_needs(recipe, left)):
        dense = open_named(recipe.dense)
        works = check_needs(dense, needs, recipe.media)
        memory = _memory(recipe, left, dense.config, works)
        work = plan_work(dense, works, _passes(recipe, left, points), recipe.media, memory)
    return PlannedRun(recipe.recipe.name, tuple(stages), points, str(out), work)


def _memory(
    recipe: Recipe, stages: Sequence[str], dense: ModelConfig, works: Sequence[Clips]
) -> Memory:
    """Peak of the stages that convert and recover; those of a sweep are like them."""
    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    shapes = [clip_shape(dense, work) for work in works]
    memory = Memory(0)
    if "recover" not in stages or "convert" in stages:
        memory = memory.peak(conversion_memory(dense, convert, shapes[0]))
    if "recover" in stages:
        converted = plan_codec(dense, ConvertConfig())
        memory = memory.peak(recovery_memory(converted, recover, shapes[-1]))
    return memory


def _passes(recipe: Recipe, stages: Sequence[str], points: int) -> list[float]:
    """Forward passes of a clip, for each need of `recipe_needs`."""
    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    passes: list[float] = []
    if "convert" in stages:
        passes += calibration_passes(convert)
    if "recover" in stages:
        passes += recovery_passes(recover, recipe.evaluate)
    if "sweep" in stages and recipe.sweep:
        trained, *measured = (points * each for each in recovery_passes(recover, recipe.evaluate))
        calibrated = sum(calibration_passes(convert)) * len(recipe.sweep.products)
        passes += [calibrated, sum(measured), trained if recipe.sweep.recover else 0.0]
    return passes
