"""The recipe that makes a setting, as TOML, and the commands that run it."""

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
    """The recipe that makes a setting, with the values that differ from the defaults.

    Args:
        setting: From `read_settings`.
        recipe: Recipe of the run, from its `recipe.json`.

    Returns:
        TOML; empty where the recipe has no such point.

    Raises:
        ConfigError: The recipe has an unknown key or a wrong value.
    """
    tables = point_recipe(setting.key.point, recipe) if setting.key.point else None
    if tables is None:
        return ""
    return to_toml({"recipe": {"name": "recommended", "description": setting.name}, **tables})


def commands(setting: Setting, recipe: Mapping[str, Any], has_recipe: bool) -> str:
    """The commands that make a setting and a clip with it.

    Args:
        setting: From `read_settings`.
        recipe: Recipe of the run.
        has_recipe: Whether `recipe_toml` gives the setting's recipe.
    """
    words: list[str] = []
    if setting.product == DENSE:
        source = {"checkpoint": "CKPT", **recipe.get("source", {})}
        checkpoint = str(source.pop("checkpoint"))
        options = dotted({"source": source, "model": recipe.get("model", {})})
        changes = (f"{key}={_value(value)}" for key, value in options)
        words = [checkpoint, *(word for change in changes for word in ("--set", change))]
        words += ["--cache-dtype", setting.key.kept]
        return f"vmla generate {shlex.join(words)} {PROMPT}"
    words.append("DIR/converted" if has_recipe else "OUT")
    if setting.product == "codec":
        words += ["--bytes-per-token", f"{setting.key.nbytes:.10g}"]
    if setting.key.kept == UNQUANTISED:
        words += ["--cache-dtype", UNQUANTISED]
    generate = f"vmla generate {shlex.join(words)} {PROMPT}"
    return f"vmla run {RECIPE_FILE} -o DIR\n{generate}" if has_recipe else generate


def to_toml(table: Mapping[str, Any], where: str = "") -> str:
    """Plain nested tables as TOML, each after the values of its parent.

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
    # Strings and truth values are as in JSON, but for one control character that TOML escapes too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
