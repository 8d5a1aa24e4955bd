"""Commands that run whole jobs from a recipe, and list the recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.cli.cost import Yes, agree
from vmla_convert.cli.options import OTHER, ClipsDir
from vmla_convert.config import STAGES
from vmla_convert.console import out
from vmla_convert.errors import VmlaError
from vmla_convert.recipe.read import available_recipes, copy_recipe, read_recipe, suggest_demo
from vmla_convert.results import ROWS_NAME, count_failures
from vmla_convert.show import show_decision, show_planned_run

CHEAPER = "fewer clips and steps with --set, or the same recipe on the demo model: --demo"

recipes_app = typer.Typer(invoke_without_command=True)

RecipeFile = Annotated[
    str, typer.Argument(help="A TOML file, or a name from 'vmla recipes'.", metavar="RECIPE")
]
Folder = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for everything it writes.")
]
Demo = Annotated[
    bool, typer.Option("--demo", help="Scale the recipe to the demo model, for a CPU.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, show what it would do, and stop.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of the recipe: --set recover.training.steps=50",
        rich_help_panel=OTHER,
    ),
]


def sweep(
    recipe: RecipeFile,
    folder: Folder,
    demo: Demo = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    clips_dir: ClipsDir = None,
    changes: Set = None,
) -> None:
    """Run only the sweep of a recipe, and its report.

    Processes share the points: torchrun --nproc_per_node N -m vmla_convert sweep RECIPE -o DIR
    """
    _run(recipe, folder, _with(clips_dir, changes), ("sweep", "report"), demo, dry_run, yes)


def run(
    recipe: RecipeFile,
    folder: Folder,
    demo: Demo = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    clips_dir: ClipsDir = None,
    changes: Set = None,
) -> None:
    """Run all stages of a recipe. Repeat the command to continue an interrupted run."""
    _run(recipe, folder, _with(clips_dir, changes), STAGES, demo, dry_run, yes)


def demo(folder: Folder = Path("runs/quickstart")) -> None:
    """Do the whole job once, in minutes, on the small model in the package."""
    run("quickstart", folder)


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes, or copy one."""
    if context.invoked_subcommand is None:
        infos = [(name, read_recipe(path).recipe) for name, path in available_recipes().items()]
        rows = [[name, info.description] for name, info in infos]
        out.table("Recipes", ["name", "what it does"], rows)


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name from 'vmla recipes'.", metavar="NAME")],
    folder: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to copy into.")
    ] = Path(),
) -> None:
    """Copy a recipe, to edit it."""
    out.path("wrote", copy_recipe(name, folder))


def _with(clips_dir: str | None, changes: list[str] | None) -> list[str]:
    return [*([f"media.clips_dir={clips_dir}"] if clips_dir else []), *(changes or ())]


def _run(
    name: str,
    folder: Path,
    changes: list[str],
    only: tuple[str, ...],
    demo: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    recipe = read_recipe(name, changes, demo)
    from vmla_convert.recipe.plan import plan_recipe
    from vmla_convert.recipe.run import run_recipe

    leads = os.environ.get("RANK", "0") == "0"  # the first of several processes
    if dry_run or leads:
        with suggest_demo(name, demo):
            planned = plan_recipe(recipe, folder, only)
        if leads and dry_run:
            show_planned_run(planned)
        elif leads:
            agree(planned.work, yes, CHEAPER)
    if dry_run:
        return
    with suggest_demo(name, demo), out.progress() as progress:
        leads = run_recipe(recipe, folder, progress, only)
    if leads:
        _show_run(folder)


def _show_run(folder: Path) -> None:
    if (folder / ROWS_NAME).exists():
        show_decision(folder / ROWS_NAME)
    for path in sorted(folder.iterdir()):
        out.path("wrote", path)
    if failed := count_failures(folder / ROWS_NAME):
        raise VmlaError(
            f"{failed} of the sweep's points failed; the report says why",
            "run the same command again to try them once more",
        )
