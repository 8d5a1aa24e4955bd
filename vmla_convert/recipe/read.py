"""Find, read and copy recipe files; no torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from vmla_convert.config import Recipe, parse_recipe
from vmla_convert.errors import ConfigError, NoClipsError, did_you_mean, refuse_existing
from vmla_convert.tables import merged, override, parse_toml, read_text


def available_recipes() -> dict[str, Path]:
    """Recipes by name: those shipped in the package, or the repository's in a checkout."""
    package = Path(str(files("vmla_convert")))
    # The package's own come first: any project may have a folder "recipes" beside the package.
    folders = (package / "recipes_data", package.parent / "recipes")
    folder = next((f for f in folders if f.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def copy_recipe(name: str, folder: Path) -> Path:
    """Copy a shipped recipe into a folder.

    Raises:
        ConfigError: There is no such recipe.
        OutputError: The file exists.
    """
    known = available_recipes()
    if name not in known:
        raise ConfigError(f"no recipe named '{name}'", did_you_mean(name, known))
    target = folder / f"{name}.toml"
    refuse_existing(target, "remove it, or copy into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(known[name], target)
    return target


def read_recipe(path: str | Path, changes: Sequence[str] = (), demo: bool = False) -> Recipe:
    """Parse a recipe file, or a shipped recipe by name.

    Args:
        path: File, or a name that `vmla recipes` lists.
        changes: `table.key=value` strings; values are TOML, bare words are strings.
        demo: Apply the recipe's table [demo], which scales the recipe to the demo model.

    Raises:
        ConfigError: No such recipe, no valid TOML, or a wrong key or value.
    """
    tables = _read_tables(path)
    if "recipe" not in tables:
        raise ConfigError(f"{path} has no table [recipe]", "give it a name and a description")
    scaled = tables.pop("demo", None)
    if demo:
        if scaled is None:
            raise ConfigError(f"{path} has no table [demo]", "leave --demo out")
        tables = merged(tables, scaled)
    for change in changes:
        override(tables, change)
    return parse_recipe(tables)


@contextmanager
def suggest_demo(path: str | Path, demo: bool) -> Iterator[None]:
    """Where clips are missing, suggest `--demo` if the recipe has a table [demo]."""
    try:
        yield
    except NoClipsError as error:
        if demo or "demo" not in _read_tables(path):
            raise
        hint = f"{error.hint}; --demo runs this recipe on the demo model"
        raise NoClipsError(error.message, hint) from error


def _read_tables(path: str | Path) -> dict[str, Any]:
    known = available_recipes()
    file = known.get(str(path), Path(path))
    if not file.is_file():
        raise ConfigError(
            f"no recipe at {path}",
            f"give a TOML file, or a name that 'vmla recipes' lists: {', '.join(known)}",
        )
    try:
        return parse_toml(read_text(file))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
