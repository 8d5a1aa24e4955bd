"""Recipes: one TOML file that says which stages to run, with which settings.

Each table is a stage; stages run in the order of `STAGES`, whatever the order in the file. What a
stage writes, later ones read: all land in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    MediaConfig,
    RecoverConfig,
    ReportConfig,
    SourceConfig,
    SweepConfig,
    TeacherConfig,
)
from vmla_convert.errors import (
    ConfigError,
    NoClipsError,
    OutputError,
    did_you_mean,
    refuse_existing,
)
from vmla_convert.progress import Progress, Silent
from vmla_convert.results import library_versions
from vmla_convert.tables import from_dict, override, to_dict

if TYPE_CHECKING:
    from vmla_convert.checkpoint.families import OpenCheckpoint
    from vmla_convert.results import Row
    from vmla_convert.sweep.team import Team

ROWS_NAME = "rows.jsonl"
STAGES = ("teacher", "convert", "recover", "sweep", "generate", "report")


@dataclass(frozen=True)
class RecipeInfo:
    """What a recipe says about itself."""

    name: str
    description: str


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; a stage that is None does not run."""

    recipe: RecipeInfo
    source: SourceConfig = field(default_factory=SourceConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    teacher: TeacherConfig | None = None
    convert: ConvertConfig | None = None
    recover: RecoverConfig | None = None
    sweep: SweepConfig | None = None
    generate: GenerateConfig | None = None
    report: ReportConfig | None = None

    def stages(self) -> list[str]:
        """Names of the stages that will run, in order.

        Beside a sweep, a `recover` without `convert` says how its points are recovered, no more;
        with `alone` this holds for both.
        """
        told = set[str]()
        if self.sweep is not None and (self.convert is None or self.sweep.alone):
            told = {"convert", "recover"}
        return [s for s in STAGES if getattr(self, s) is not None and s not in told]


def available_recipes() -> dict[str, Path]:
    """Recipes by name: those shipped in the package, or the repository's in a checkout."""
    package = Path(str(files("vmla_convert")))
    # The package's own first: beside an installed package, any project may have put a "recipes".
    folders = (package / "recipes_data", package.parent / "recipes")
    folder = next((f for f in folders if f.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def copy_recipe(name: str, folder: Path) -> Path:
    """Copy a recipe to own and edit.

    Raises:
        ConfigError: There is no such recipe.
        OutputError: The file exists already.
    """
    known = available_recipes()
    if name not in known:
        raise ConfigError(f"no recipe named '{name}'", did_you_mean(name, known))
    target = folder / f"{name}.toml"
    refuse_existing(target, "remove it, or copy into another folder")
    shutil.copy(known[name], target)
    return target


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Parse a recipe file, or one of the shipped ones by name.

    Args:
        path: File, or a name that `vmla recipes` lists.
        overrides: `stage.key=value` strings; values are TOML, bare words are strings. `demo=true`
            puts the settings of the recipe's table [demo] in place: the same recipe, scaled to the
            demo model.

    Raises:
        ConfigError: No such recipe, no valid TOML, or a wrong key or value.
    """
    data = _read_tables(path)
    scaled = data.pop("demo", {})
    if _wants_demo(overrides):
        _merge(data, scaled)
    for change in overrides or []:
        if not change.startswith(_DEMO):
            override(data, change)
    return from_dict(Recipe, data)


@contextmanager
def offering_demo(path: str | Path, overrides: list[str] | None = None) -> Iterator[None]:
    """Where clips are not there, hint at the same recipe scaled to the demo model, if it has that.

    Args:
        path: As of `read_recipe`.
        overrides: Likewise.
    """
    try:
        yield
    except NoClipsError as error:
        if _wants_demo(overrides) or "demo" not in _read_tables(path):
            raise
        hint = f"{error.hint}; --set demo=true runs this recipe on the demo model"
        raise NoClipsError(error.message, hint) from error


_DEMO = "demo="


def _wants_demo(overrides: list[str] | None) -> bool:
    wanted: dict[str, Any] = {}
    for change in overrides or []:
        if change.startswith(_DEMO):
            override(wanted, change)
    return bool(wanted.get("demo"))


def _read_tables(path: str | Path) -> dict[str, Any]:
    """The tables of a recipe's file as they stand there."""
    known = available_recipes()
    file = known.get(str(path), Path(path))
    if not file.is_file():
        raise ConfigError(
            f"no recipe at {path}",
            f"give a TOML file, or a name that 'vmla recipes' lists: {', '.join(known)}",
        )
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _merge(table: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put values in place of those of the same key, table by table."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def check_recipe(recipe: Recipe, out: Path, only: tuple[str, ...] = STAGES) -> None:
    """Refuse, before anything is written, what a stage would fail on later.

    Args:
        recipe: From `read_recipe`.
        out: Folder of the run; what an interrupted run left there counts as made.
        only: Stages that will run of those that the recipe has.

    Raises:
        ConfigError: No stage would run, one lacks its input, a setting does not fit the source, or
            clips are not there or do not fit it.
        CheckpointError: The source cannot be read, or cannot be converted.
        VmlaError: The model's text encoder cannot read a prompt.
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
    """How many points the sweep of a recipe has; 0 without one."""
    from vmla_convert.sweep.grid import sweep_points

    if recipe.sweep is None:
        return 0
    shared, recovery = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    return len(sweep_points(recipe.sweep, shared, recovery))


def run_recipe(
    recipe: Recipe,
    out: Path,
    progress: Progress | None = None,
    only: tuple[str, ...] = STAGES,
) -> bool:
    """Run the stages of a recipe into one folder.

    Stages that finished in an earlier, interrupted run of the same recipe are not repeated. Where a
    launcher started several processes they recover together, or share the points of a sweep; the
    first does the rest.

    Args:
        recipe: From `read_recipe`.
        out: Folder for everything.
        progress: Where to draw.
        only: Stages to run of those that the recipe has.

    Returns:
        Whether this is the process that has something to tell.

    Raises:
        ConfigError: Several processes were started for a sweep with other stages beside it.
        OutputError: The folder holds something else, a finished run, or one with other settings.
        VmlaError: A stage cannot do its work.
    """
    progress = progress or Silent()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_together(recipe, out, progress, only)
    check_recipe(recipe, out, only)
    stages = [stage for stage in recipe.stages() if stage in only]
    _claim_folder(recipe, out, stages)
    for stage in stages:
        _RUNNERS[stage](recipe, out, progress)
    (out / _RUNNING).unlink()
    return True


_RUNNING = ".running"
_SWEEPING = {"sweep", "report"}
RECIPE_NAME = "recipe.json"
"""What a run was made with, beside its rows."""


def _run_together(recipe: Recipe, out: Path, progress: Progress, only: tuple[str, ...]) -> bool:
    """A run as one of several processes; they know of each other only where they recover."""
    stages = [stage for stage in recipe.stages() if stage in only]
    if "sweep" not in stages:
        return _recover_together(recipe, out, progress, stages)
    if others := [stage for stage in stages if stage not in _SWEEPING]:
        raise ConfigError(
            f"several processes share a sweep by itself, not with {' and '.join(others)}",
            "start 'vmla sweep' on them, and 'vmla run' on one",
        )
    return _sweep_together(recipe, out, progress, stages)


def _recover_together(recipe: Recipe, out: Path, progress: Progress, stages: list[str]) -> bool:
    from vmla_convert.training.processes import processes

    state = processes()
    leads = state.is_main_process
    if leads:
        check_recipe(recipe, out, tuple(stages))
        _claim_folder(recipe, out, stages)
    state.wait_for_everyone()
    for stage in stages:
        if leads or stage == "recover":
            _RUNNERS[stage](recipe, out, progress)
        state.wait_for_everyone()
    if leads:
        (out / _RUNNING).unlink()
    return leads


def _sweep_together(recipe: Recipe, out: Path, progress: Progress, stages: list[str]) -> bool:
    from vmla_convert.sweep.team import join_team

    team = join_team()
    if team.leads:
        check_recipe(recipe, out, tuple(stages))
        _claim_folder(recipe, out, stages)
    team.follow_leader("claimed")
    _run_sweep(recipe, out, progress if team.leads else Silent(), team)
    if team.leads:
        if "report" in stages:
            _run_report(recipe, out, progress)
        (out / _RUNNING).unlink()
    return team.leads


def _check_inputs(recipe: Recipe, out: Path, stages: list[str]) -> None:
    """Each stage finds what it works on: left by an earlier run, or made by a stage before it."""
    step0, final, rows = _step0_folder(recipe, out), out / "converted", out / ROWS_NAME
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
    """The source opens, every conversion of it can be done, and clips and prompts can be read."""
    from vmla_convert.checkpoint.families import open_checkpoint
    from vmla_convert.loading.load import locate
    from vmla_convert.media.clips import source_kind
    from vmla_convert.media.open import check_prompts, open_media

    stages = [stage for stage in stages if not _is_made(recipe, out, stage)]
    for clips in _clips(recipe, stages):
        source_kind(clips.source)  # The source itself may have to be fetched, in hours.
    path, how = locate(recipe.source)
    if "teacher" in stages and path.resolve() == (out / "checkpoint").resolve():
        return  # This very run will make it.
    checkpoint = open_checkpoint(path, how)
    _check_stages(recipe, stages, checkpoint)
    if recipe.generate and "generate" in stages:
        open_media(checkpoint.config, MediaConfig(recipe.generate.base), path)
        check_prompts(checkpoint.config, recipe.generate.prompts)


def _clips(recipe: Recipe, stages: list[str]) -> list[DataConfig]:
    """Where the clips come from that the stages look at."""
    from vmla_convert.fitting.calibration_clips import measures

    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    recovers = recipe.sweep is not None and recipe.sweep.recover and "sweep" in stages
    looked_at = [
        (convert.data, "sweep" in stages or ("convert" in stages and measures(convert))),
        (recover.data, "recover" in stages or recovers),
        (recipe.evaluate.data, "recover" in stages or "sweep" in stages),
    ]
    return [data for data, asked in looked_at if asked]


def _check_stages(recipe: Recipe, stages: list[str], checkpoint: OpenCheckpoint) -> None:
    """Settings, clips and the prompts of a sweep fit the model, by a look at one clip of each."""
    from vmla_convert.fitting.calibration_clips import measures, open_calibration
    from vmla_convert.fitting.dense_source import refuse_converted
    from vmla_convert.fitting.plan import plan_conversion
    from vmla_convert.recovery.checks import check_recovery
    from vmla_convert.sweep.sweep import check_sweep

    convert, recover = recipe.convert or ConvertConfig(), recipe.recover or RecoverConfig()
    refuse_converted(checkpoint)
    if "convert" in stages:
        plan_conversion(checkpoint, convert)
        if measures(convert):
            open_calibration(checkpoint.config, convert)
    if "recover" in stages:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_recovery(checkpoint, recover, recipe.evaluate, world)
    if "sweep" in stages and recipe.sweep:
        check_sweep(checkpoint.config, recipe.sweep, convert, recover, recipe.evaluate)


def _claim_folder(recipe: Recipe, out: Path, stages: Collection[str]) -> None:
    """Take an empty folder, one that this recipe left unfinished, or a sweep to go on with."""
    marker, settings = out / _RUNNING, json.dumps(to_dict(recipe), indent=2)
    if marker.is_file():
        if marker.read_text() == settings:
            return
        raise OutputError(
            f"{out} holds an unfinished run with other settings",
            "choose another -o, or the settings it was started with",
        )
    goes_on = set(stages) <= _SWEEPING and _swept_before(recipe, out)
    if not goes_on:
        refuse_existing(out)
    out.mkdir(parents=True, exist_ok=True)
    told = {"recipe": to_dict(recipe), "versions": library_versions()}
    (out / RECIPE_NAME).write_text(json.dumps(told, indent=2) + "\n")
    marker.write_text(settings)


def _swept_before(recipe: Recipe, out: Path) -> bool:
    """Whether a folder holds points of this recipe; its grid and its report may have changed."""
    try:
        told = json.loads((out / RECIPE_NAME).read_text())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    now = json.loads(json.dumps(to_dict(recipe)))
    tables = (set(told) | set(now)) - {"recipe", *_SWEEPING}
    return all(told.get(table) == now.get(table) for table in tables)


def _run_teacher(recipe: Recipe, out: Path, progress: Progress) -> None:
    from vmla_convert.training.pretrain import pretrain

    assert recipe.teacher is not None
    if not (out / "checkpoint").exists():
        pretrain(recipe.teacher, out, progress)


def _run_convert(recipe: Recipe, out: Path, progress: Progress) -> None:
    from vmla_convert.fitting.convert import convert
    from vmla_convert.measuring.rows import conversion_rows
    from vmla_convert.results import append_rows

    assert recipe.convert is not None
    folder = _step0_folder(recipe, out)
    if _is_made(recipe, out, "convert"):
        return
    conversion = convert(recipe.source, folder, recipe.convert, progress, resume=True)
    append_rows(out / ROWS_NAME, _as_point(recipe, conversion_rows(conversion)))


def _run_recover(recipe: Recipe, out: Path, progress: Progress) -> None:
    from vmla_convert.loading.load import open_named
    from vmla_convert.measuring.rows import memory_rows
    from vmla_convert.recovery.recover import recover
    from vmla_convert.results import append_rows
    from vmla_convert.training.processes import processes

    assert recipe.recover is not None
    target, before = out / "converted", _step0_folder(recipe, out)
    if _is_made(recipe, out, "recover"):
        return
    rows = recover(before, recipe.source, target, recipe.recover, recipe.evaluate, progress)
    if processes().is_main_process:
        # A sweep takes this point, and the dense model's rows, as they are.
        for source in (recipe.source, SourceConfig(str(target))):
            rows += memory_rows(open_named(source).config)
        append_rows(out / ROWS_NAME, _as_point(recipe, rows))
        shutil.rmtree(before)


def _as_point(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """Rows of the convert and recover stages under the key that a sweep would give them."""
    from vmla_convert.sweep.grid import SweepPoint
    from vmla_convert.sweep.point import labelled

    if recipe.convert is None:  # an earlier run made it, with settings that nobody kept
        return rows
    point = SweepPoint(recipe.convert, recipe.recover)
    return [labelled(row, point) for row in rows]


def _run_sweep(recipe: Recipe, out: Path, progress: Progress, team: Team | None = None) -> None:
    from vmla_convert.loading.load import compute_device, load
    from vmla_convert.sweep.sweep import sweep

    assert recipe.sweep is not None
    teacher = load(recipe.source, compute_device())
    sweep(
        teacher,
        recipe.sweep,
        recipe.convert or ConvertConfig(),
        recipe.recover or RecoverConfig(),
        recipe.evaluate,
        out / ROWS_NAME,
        progress,
        team,
    )


def _run_generate(recipe: Recipe, out: Path, progress: Progress) -> None:
    from vmla_convert.loading.load import build, compute_device, load, open_named
    from vmla_convert.measuring.compare import compare
    from vmla_convert.media.open import open_media
    from vmla_convert.results import append_rows

    assert recipe.generate is not None
    if not (out / "compare.png").exists():
        device, source = compute_device(), open_named(recipe.source)
        models = build(source, device), load(out / "converted", device)
        how = MediaConfig(recipe.generate.base)
        media = open_media(source.config, how, source.model_path, device)
        rows = compare(*models, recipe.generate, out / "compare.mp4", progress, media)
        append_rows(out / ROWS_NAME, _as_point(recipe, rows))


def _run_report(recipe: Recipe, out: Path, progress: Progress) -> None:  # noqa: ARG001
    from vmla_convert.report.report import write_report

    assert recipe.report is not None
    write_report(out, recipe.report.title, recipe.report.loss_bound)


_RUNNERS: dict[str, Callable[[Recipe, Path, Progress], None]] = {
    "teacher": _run_teacher,
    "convert": _run_convert,
    "recover": _run_recover,
    "sweep": _run_sweep,
    "generate": _run_generate,
    "report": _run_report,
}


def _step0_folder(recipe: Recipe, out: Path) -> Path:
    """Where the conversion goes: its final place, unless it is still to be recovered."""
    return out / ("converted" if recipe.recover is None else "converted-step0")


def _is_made(recipe: Recipe, out: Path, stage: str) -> bool:
    """Whether an interrupted run left what a stage makes of the source."""
    final = out / "converted"
    made = {"convert": (_step0_folder(recipe, out), final), "recover": (final,)}
    return any(folder.exists() for folder in made.get(stage, ()))


assert set(_RUNNERS) == set(STAGES) <= {f.name for f in fields(Recipe)}
