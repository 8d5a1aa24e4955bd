"""Whole jobs from a recipe, and the recipes themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vmla_convert.console import out
from vmla_convert.errors import VmlaError
from vmla_convert.show import show_decision

recipes_app = typer.Typer(invoke_without_command=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the recipe: --set recover.training.steps=50"),
]
DryRun = Annotated[bool, typer.Option(help="Check the recipe, show what it would do, and stop.")]
RecipeFile = Annotated[
    str, typer.Argument(help="A TOML file, or a name from 'vmla recipes'.", metavar="RECIPE")
]


def sweep(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for rows and report.")],
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run the sweep of a recipe, and nothing else of it but the report.

    Points are shared by processes: torchrun --nproc_per_node N -m vmla_convert sweep RECIPE -o DIR
    """
    _run(recipe, folder, overrides, ("sweep", "report"), dry_run)


def run(
    recipe: RecipeFile,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything it writes.")],
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe from its first stage to its last; an interrupted run goes on where it was."""
    from vmla_convert.recipe import STAGES

    _run(recipe, folder, overrides, STAGES, dry_run)


def demo(
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything it writes.")
    ] = Path("runs/quickstart"),
) -> None:
    """Do the whole job once, in minutes, on the small model that ships with the package."""
    run("quickstart", folder)


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes, or copy one to own."""
    from vmla_convert.recipe import available_recipes, read_recipe

    if context.invoked_subcommand is None:
        infos = [(name, read_recipe(path).recipe) for name, path in available_recipes().items()]
        rows = [[name, info.description] for name, info in infos]
        out.table("Recipes", ["name", "what it does"], rows)


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name from 'vmla recipes'.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to copy into.")] = Path(),
) -> None:
    """Copy a recipe to own and edit."""
    from vmla_convert.recipe import copy_recipe

    out.path("wrote", copy_recipe(name, folder))


def _run(
    recipe: str,
    folder: Path,
    overrides: list[str] | None,
    only: tuple[str, ...],
    dry_run: bool,
) -> None:
    from vmla_convert.recipe import (
        ROWS_NAME,
        check_recipe,
        count_points,
        offering_demo,
        read_recipe,
        run_recipe,
    )
    from vmla_convert.results import count_failures

    parsed = read_recipe(recipe, overrides)
    if dry_run:
        with offering_demo(recipe, overrides):
            check_recipe(parsed, folder, only)
        stages = [stage for stage in parsed.stages() if stage in only]
        points = {"points": count_points(parsed)} if "sweep" in stages else {}
        told = {"recipe": parsed.recipe.name, "stages": stages, **points, "would write": folder}
        if os.environ.get("RANK", "0") == "0":  # one of those that were started together
            out.data(told)
        return
    with offering_demo(recipe, overrides), out.progress() as progress:
        leads = run_recipe(parsed, folder, progress, only)
    if not leads:
        return
    if (folder / ROWS_NAME).exists():
        show_decision(folder / ROWS_NAME)
    for path in sorted(folder.iterdir()):
        out.path("wrote", path)
    if failed := count_failures(folder / ROWS_NAME):
        raise VmlaError(
            f"{failed} of the sweep's points failed; the report says why",
            "start the same command again to try them once more",
        )
