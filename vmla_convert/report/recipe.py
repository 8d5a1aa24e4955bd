"""How to make a setting again: its recipe as TOML, and the commands to run and to use it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from vmla_convert.config import EvaluateConfig, SourceConfig
from vmla_convert.report.settings import DENSE, UNQUANTISED, Setting
from vmla_convert.sweep.grid import find_point
from vmla_convert.tables import from_dict

RECIPE_FILE = "recipe.toml"
PROMPT = '--prompt "…" -o clip.mp4'


def recipe_toml(setting: Setting, recipe: Mapping[str, Any]) -> str:
    """The recipe that makes a setting, with what differs from the defaults.

    Args:
        setting: As `read_settings` gives it.
        recipe: Recipe of the run, as its `recipe.json` holds it.

    Returns:
        TOML; empty where the recipe has no such point, or where there is nothing to convert.

    Raises:
        ConfigError: The recipe has a key or a value that is none.
    """
    point = find_point(setting.key.point, recipe) if setting.key.point else None
    if point is None:
        return ""
    source = from_dict(SourceConfig, recipe.get("source") or {})
    evaluate = from_dict(EvaluateConfig, recipe.get("evaluate") or {})
    tables: dict[str, Any] = {
        "recipe": {"name": "recommended", "description": setting.name},
        "source": {**changes(source), "checkpoint": source.checkpoint},
        "evaluate": changes(evaluate),
        "convert": {"product": point.conversion.product, **changes(point.conversion)},
    }
    if point.recovery is not None:
        tables["recover"] = changes(point.recovery)
    return to_toml({name: table for name, table in tables.items() if table or name == "recover"})


def commands(setting: Setting, recipe: Mapping[str, Any], made_here: bool) -> str:
    """The commands that make a setting and draw a clip from it.

    Args:
        setting: As for `recipe_toml`.
        recipe: Likewise.
        made_here: Whether there is a recipe for it.
    """
    if setting.product == DENSE:
        source = from_dict(SourceConfig, recipe.get("source") or {"checkpoint": "CKPT"})
        return f"vmla generate {_opened(source)} --cache-dtype {setting.key.kept} {PROMPT}"
    options: list[str] = []
    if setting.product == "codec":
        options.append(f"--bytes-per-token {setting.key.nbytes:.10g}")
    if setting.key.kept == UNQUANTISED:
        options.append(f"--cache-dtype {UNQUANTISED}")
    folder = "DIR/converted" if made_here else "OUT"
    generate = " ".join(["vmla generate", folder, *options, PROMPT])
    return f"vmla run {RECIPE_FILE} -o DIR\n{generate}" if made_here else generate


def changes(config: Any) -> dict[str, Any]:
    """What of a config differs from its defaults, as a plain table that `from_dict` reads."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        made = entry.default_factory
        usual = entry.default if made is dataclasses.MISSING else made()
        if value is not None and value != usual:
            # A table of its own starts from its own defaults, not from those of the outer config.
            found[entry.name] = changes(value) if dataclasses.is_dataclass(value) else value
    return found


def to_toml(table: Mapping[str, Any], where: str = "") -> str:
    """Plain nested tables as TOML, each after the values of the table that it is in.

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


def _opened(source: SourceConfig) -> str:
    """A source as arguments of a command."""
    words = [source.checkpoint]
    for option in ("file", "key", "model"):
        value = getattr(source, option)
        words += [f"--{option}", value] if value else []
    for option, values in (("--set", source.overrides), ("--lora", source.loras)):
        words += [word for value in values for word in (option, value)]
    return shlex.join(words)
