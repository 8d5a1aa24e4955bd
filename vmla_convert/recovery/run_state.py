"""The folder of an interrupted recovery, `OUT.state`: its settings and its curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vmla_convert.errors import OutputError
from vmla_convert.recovery.stages import Folders
from vmla_convert.results import Row, read_rows
from vmla_convert.storage.output import partial_folder
from vmla_convert.tables import first_difference, read_json

_SETTINGS, _CURVE = "settings.json", "curve.jsonl"


def is_begun(out: Path) -> bool:
    """Whether an interrupted recovery left something to resume from."""
    state, _, clips = Folders.beside(out)
    left = (state, clips, partial_folder(clips))
    return not out.exists() and any(path.exists() for path in left)


def claim_state(state: Path, settings: dict[str, Any], write: bool) -> None:
    """Check that a state folder is new or belongs to equal settings; with `write`, store them.

    Raises:
        OutputError: The folder belongs to a run of other settings.
    """
    file = state / _SETTINGS
    try:
        was = read_json(file) if file.exists() else settings
    except ValueError as error:
        raise OutputError(f"{file} is damaged: {error}", f"remove {state}") from error
    if was != settings:
        raise OutputError(
            f"{state} holds an unfinished recovery with {_other_settings(was, settings)}",
            f"remove it, or use the settings in {file}",
        )
    if write:
        state.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))


def drop_if_new(state: Path) -> None:
    """Remove a state folder without any work in it, so that other settings can be tried."""
    if state.is_dir() and [path.name for path in state.iterdir()] == [_SETTINGS]:
        shutil.rmtree(state)


def curve_file(state: Path) -> Path:
    """File that collects the recovery curve."""
    return state / _CURVE


def read_curve(state: Path) -> list[Row]:
    """Rows of the curve; empty where nothing was measured."""
    file = curve_file(state)
    return read_rows(file) if file.is_file() else []


def _other_settings(was: dict[str, Any], settings: dict[str, Any]) -> str:
    """Name the first setting that differs."""
    found = first_difference(was, settings)
    if found is None:
        return "other settings"
    name, *values = found
    there, here = ("not set" if v is None else json.dumps(v, ensure_ascii=False) for v in values)
    return f"other settings: {name} is {there} there and {here} here"
