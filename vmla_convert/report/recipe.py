"""The recipe that makes a setting, as TOML, and the commands that use the recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from vmla_convert.report.settings import DENSE, UNQUANTISED, Setting
from vmla_convert.sweep.grid import point_recipe
from vmla_convert.tables import dotted

RECIPE_FILE = "recipe.toml"
PROMPT = '--prompt "…" -o clip.mp4'


def recipe_toml(setting: Setting, recipe: Mapping[str, Any]) -> str:
    """The recipe that makes a setting, with all values that differ from the defaults.

    `recipe` is the recipe of the run, from `recipe.json`.

    Returns:
        TOML; empty where the recipe does not have the setting's point.

    Raises:
        ConfigError: The recipe has an unknown key or a wrong value.
    """
    tables = point_recipe(setting.key.point, recipe) if setting.key.point else None
    if tables is None:
        return ""
    return to_toml({"recipe": {"name": "recommended", "description": setting.name}, **tables})


def commands(setting: Setting, recipe: Mapping[str, Any], has_recipe: bool) -> str:
    """The commands that make a setting, and generate a clip.

    `has_recipe` says whether `recipe_toml` gave a recipe for the setting.
    """
    words: list[str] = []
    if setting.product == DENSE:
        source = {"checkpoint": "CKPT", **recipe.get("source", {})}
        checkpoint = str(source.pop("checkpoint"))
        options = dotted({"source": source, "model": recipe.get("model", {})})
        changes = (f"{key}={_value(value)}" for key, value in options)
        words = [checkpoint, *(word for change in changes for word in ("--set", change))]
        words += ["--cache-dtype", setting.key.dtype]
        return f"vmla generate {shlex.join(words)} {PROMPT}"
    words.append("DIR/converted" if has_recipe else "OUT")
    if setting.product == "codec":
        words += ["--bytes-per-token", f"{setting.key.nbytes:.10g}"]
    if setting.key.dtype == UNQUANTISED:
        words += ["--cache-dtype", UNQUANTISED]
    generate = f"vmla generate {shlex.join(words)} {PROMPT}"
    return f"vmla run {RECIPE_FILE} -o DIR\n{generate}" if has_recipe else generate


def to_toml(table: Mapping[str, Any], where: str = "") -> str:
    """Nested tables as TOML. Inner tables follow the plain values of the outer table.

    Args:
        table: Strings, numbers, truth values, lists of these, and tables.
        where: Dotted name of the table, empty for the document.
    """
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if key not in inner]
    if where and (lines or not inner):
        lines.insert(0, f"[{where}]")
    blocks = ["\n".join(lines)] if lines else []
    for key, value in inner.items():
        blocks.append(to_toml(value, f"{where}.{key}" if where else key))
    return "\n\n".join(blocks)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, float):
        return repr(value)
    # TOML writes strings and truth values as JSON does, and also escapes DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
