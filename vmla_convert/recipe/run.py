"""Run the stages of a recipe into one folder, in one process or several."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from vmla_convert.config import (
    STAGES,
    ConvertConfig,
    Recipe,
    RecoverConfig,
    SourceConfig,
)
from vmla_convert.errors import ConfigError, OutputError, refuse_existing
from vmla_convert.fitting.convert import convert, read_conversion
from vmla_convert.loading.load import build, compute_device, load, open_named
from vmla_convert.measuring.compare import compare
from vmla_convert.measuring.rows import conversion_rows, memory_rows
from vmla_convert.media.open import open_media
from vmla_convert.progress import Progress, Silent
from vmla_convert.recipe.check import check_recipe, is_made, step0_folder
from vmla_convert.recovery.recover import recover
from vmla_convert.report.report import write_report
from vmla_convert.results import RECIPE_NAME, ROWS_NAME, Row, library_versions, put_rows
from vmla_convert.storage.lock import sole_writer
from vmla_convert.sweep.grid import SweepPoint
from vmla_convert.sweep.point import labelled
from vmla_convert.sweep.sweep import sweep
from vmla_convert.sweep.team import Team, join_team
from vmla_convert.tables import to_dict
from vmla_convert.training.pretrain import pretrain
from vmla_convert.training.processes import processes

_RUNNING = ".running"
_SWEEPING = {"sweep", "report"}


def run_recipe(
    recipe: Recipe,
    out: Path,
    progress: Progress | None = None,
    only: Sequence[str] = STAGES,
) -> bool:
    """Run the stages of a recipe into one folder.

    Stages that an interrupted run of the same recipe finished are not repeated. Several processes
    of a launcher recover together, or share the points of a sweep; the first process does the rest.

    Args:
        recipe: From `read_recipe`.
        out: Folder for everything.
        progress: Receives the progress bars.
        only: Stages that may run.

    Returns:
        Whether this is the process that reports the results.

    Raises:
        ConfigError: Several processes were started for a sweep with other stages beside it.
        OutputError: The folder holds something else, a finished run, or one with other settings, or
            another process writes it.
        VmlaError: A stage cannot do its work.
    """
    progress = progress or Silent()
    stages = [stage for stage in recipe.stages() if stage in only]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_together(recipe, out, progress, stages)
    check_recipe(recipe, out, only)
    with _claimed(recipe, out, stages):
        for stage in stages:
            _RUNNERS[stage](recipe, out, progress)
    return True


def _run_together(recipe: Recipe, out: Path, progress: Progress, stages: list[str]) -> bool:
    if "sweep" not in stages:
        return _recover_together(recipe, out, progress, stages)
    if others := [stage for stage in stages if stage not in _SWEEPING]:
        raise ConfigError(
            f"several processes share a sweep by itself, not with {' and '.join(others)}",
            "start 'vmla sweep' on them, and 'vmla run' on one",
        )
    return _sweep_together(recipe, out, progress, stages)


def _recover_together(recipe: Recipe, out: Path, progress: Progress, stages: list[str]) -> bool:
    state = processes()
    leads = state.is_main_process
    if leads:
        check_recipe(recipe, out, stages)
    with _claimed(recipe, out, stages) if leads else nullcontext():
        state.wait_for_everyone()
        for stage in stages:
            if leads or stage == "recover":
                _RUNNERS[stage](recipe, out, progress)
            state.wait_for_everyone()
    return leads


def _sweep_together(recipe: Recipe, out: Path, progress: Progress, stages: list[str]) -> bool:
    team = join_team()
    if team.leads:
        check_recipe(recipe, out, stages)
    with _claimed(recipe, out, stages) if team.leads else nullcontext():
        team.follow_leader("claimed")
        _run_sweep(recipe, out, progress if team.leads else Silent(), team)
        if team.leads and "report" in stages:
            _run_report(recipe, out, progress)
    return team.leads


@contextmanager
def _claimed(recipe: Recipe, out: Path, stages: Collection[str]) -> Iterator[None]:
    """Keep a folder for this run; the run is finished where the context ends without an error."""
    with sole_writer(out):
        _claim_folder(recipe, out, stages)
        yield
        (out / _RUNNING).unlink()


def _claim_folder(recipe: Recipe, out: Path, stages: Collection[str]) -> None:
    """Take an empty folder, one that this recipe left unfinished, or a sweep to continue."""
    marker, settings = out / _RUNNING, json.dumps(to_dict(recipe), indent=2)
    if marker.is_file():
        if marker.read_text() == settings:
            return
        raise OutputError(
            f"{out} holds an unfinished run with other settings",
            "choose another -o, or the settings it was started with",
        )
    continues = set(stages) <= _SWEEPING and _swept_before(recipe, out)
    if not continues:
        refuse_existing(out)
    out.mkdir(parents=True, exist_ok=True)
    record = {"recipe": to_dict(recipe), "versions": library_versions()}
    (out / RECIPE_NAME).write_text(json.dumps(record, indent=2) + "\n")
    marker.write_text(settings)


def _swept_before(recipe: Recipe, out: Path) -> bool:
    """Whether a folder holds points of this recipe; its grid and its report may have changed."""
    try:
        before = json.loads((out / RECIPE_NAME).read_text())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    now = json.loads(json.dumps(to_dict(recipe)))
    tables = (set(before) | set(now)) - {"recipe", *_SWEEPING}
    return all(before.get(table) == now.get(table) for table in tables)


def _run_teacher(recipe: Recipe, out: Path, progress: Progress) -> None:
    assert recipe.teacher is not None
    if not (out / "checkpoint").exists():
        pretrain(recipe.teacher, out, progress)


def _run_convert(recipe: Recipe, out: Path, progress: Progress) -> None:
    assert recipe.convert is not None
    folder = step0_folder(recipe, out)
    if not is_made(recipe, out, "convert"):
        convert(recipe.dense, folder, recipe.convert, progress, resume=True)
    # Also after a kill that came between the folder and its rows.
    if folder.exists():
        put_rows(out / ROWS_NAME, _as_point(recipe, conversion_rows(read_conversion(folder))))


def _run_recover(recipe: Recipe, out: Path, progress: Progress) -> None:
    assert recipe.recover is not None
    target, before = out / "converted", step0_folder(recipe, out)

    def keep(rows: list[Row]) -> None:
        # A sweep reuses this point and the dense model's rows.
        for source in (recipe.dense, SourceConfig(str(before))):
            rows = rows + memory_rows(open_named(source).config)
        put_rows(out / ROWS_NAME, _as_point(recipe, rows))

    if not is_made(recipe, out, "recover"):
        settings = recipe.recover, recipe.evaluate, progress
        recover(before, recipe.dense, target, *settings, keep_rows=keep)
    if processes().is_main_process:
        shutil.rmtree(before, ignore_errors=True)


def _as_point(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """Rows of the convert and recover stages under the key that a sweep would give them."""
    if recipe.convert is None:  # an earlier run made the conversion, with unknown settings
        return rows
    point = SweepPoint(recipe.convert, recipe.recover)
    return [labelled(row, point) for row in rows]


def _run_sweep(recipe: Recipe, out: Path, progress: Progress, team: Team | None = None) -> None:
    assert recipe.sweep is not None
    sweep(
        load(recipe.dense, compute_device()),
        recipe.sweep,
        recipe.convert or ConvertConfig(),
        recipe.recover or RecoverConfig(),
        recipe.evaluate,
        out / ROWS_NAME,
        progress,
        team,
    )


def _run_generate(recipe: Recipe, out: Path, progress: Progress) -> None:
    assert recipe.generate is not None
    if (out / "compare.png").exists():
        return
    device, source = compute_device(), open_named(recipe.dense)
    dtype = getattr(torch, recipe.runtime.dtype or "float32")
    models = build(source, device, dtype), load(out / "converted", device, dtype)
    media = open_media(source.config, recipe.media, source.model_path, device)

    def keep(rows: list[Row]) -> None:
        put_rows(out / ROWS_NAME, _as_point(recipe, rows))

    video = out / "compare.mp4"
    compare(*models, recipe.generate, video, keep, progress, media, recipe.runtime)


def _run_report(recipe: Recipe, out: Path, progress: Progress) -> None:  # noqa: ARG001
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
