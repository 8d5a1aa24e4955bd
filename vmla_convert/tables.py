"""Settings to and from plain tables: JSON, TOML, and `key=value` on a command line; strict."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

from vmla_convert.errors import ConfigError, did_you_mean

T = TypeVar("T")

LARGEST_FILE = 32 * 2**20
"""Most bytes of a file of settings. The config of MLA layers with phases takes a few MB."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists, ready for JSON or TOML; None fields are left out."""
    return {
        f.name: _plain(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) is not None
    }


def changes(config: Any) -> dict[str, Any]:
    """The values of a config that differ from its defaults, as a table that `from_dict` reads."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        if value == default:
            continue
        plain, usual = _plain(value), _plain(default)
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(default):
            plain = {key: each for key, each in plain.items() if each != usual.get(key)}
        found[field.name] = plain
    return found


def dotted(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a table of tables, as `--set` takes them."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from dotted(typing.cast(Mapping[str, Any], value), _join(where, key))
        else:
            yield _join(where, key), value


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build a config from parsed JSON or TOML, strictly.

    Args:
        cls: A dataclass of plain values, tuples and dataclasses.
        data: A mapping; nested tables for nested configs.
        where: Dotted path for messages.

    Raises:
        ConfigError: An unknown key (with the nearest known one), a missing key, or a value of the
            wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"'{where or cls.__name__}' must be a table, not {data!r}")
    table = typing.cast(dict[str, Any], data)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    for key in table:
        if key not in names:
            raise ConfigError(f"unknown key '{_join(where, key)}'", did_you_mean(key, names))
    values: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast(Any, cls)):
        if f.name in table:
            value, default = table[f.name], _default(f)
            # A nested table changes the default of its field, which need not be its class's own.
            if isinstance(value, dict) and dataclasses.is_dataclass(default):
                value = merged(to_dict(default), typing.cast(dict[str, Any], value))
            values[f.name] = _coerce(hints[f.name], value, _join(where, f.name))
    missing = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, cls))
        if f.name not in values and _default(f) is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key '{_join(where, missing[0])}'")
    return cls(**values)


def read_text(file: Path) -> str:
    """Read a file of settings, which is small.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, or too large for settings.
    """
    if (size := file.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
    return file.read_text("utf-8")


def read_json(file: Path) -> Any:
    """Read a JSON file of settings; errors as in `read_text` and `parse_json`."""
    return parse_json(read_text(file))


def parse_json(text: str) -> Any:
    """Parse JSON without `NaN` and `Infinity`, which JSON does not have.

    Raises:
        ValueError: The text is not JSON, or nested too deep.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: The text is not TOML, or nested too deep.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def override(table: dict[str, Any], text: str) -> None:
    """Set a dotted key of a table of tables by `a.b=value`; values are TOML, bare words strings.

    Raises:
        ConfigError: The text is no such thing, or goes through a value.
    """
    key, found, typed = text.partition("=")
    if not found or not re.fullmatch(r"[\w.]+", key):
        raise ConfigError(f"'{text}' is not key=value", "write it as --set key=value")
    try:
        value = parse_toml(f"value = {typed}")["value"]
    except ValueError:
        value = typed
    set_key(table, key, value)


def set_key(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a table of tables.

    Raises:
        ConfigError: A part of the key names a value.
    """
    *parts, name = key.split(".")
    for part in parts:
        inner: Any = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{key}' cannot be set", f"'{part}' is a value, not a table")
        table = typing.cast(dict[str, Any], inner)
    table[name] = value


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a table of tables with other values for some keys, at any depth."""
    table = dict(base)
    for key, value in changes.items():
        inner = table.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merged(typing.cast(dict[str, Any], inner), typing.cast(dict[str, Any], value))
        table[key] = value
    return table


def first_difference(one: Any, other: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The dotted key of the first value that differs between two plain tables, and both values.

    None stands for a value that one of them lacks, as `to_dict` leaves it out.
    """
    found: tuple[str, Any, Any] = where, one, other
    if one == other:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        first, second = typing.cast(dict[str, Any], one), typing.cast(dict[str, Any], other)
        inner = [(first.get(k), second.get(k), _join(where, k)) for k in first | second]
    elif isinstance(one, list) and isinstance(other, list):
        pairs = zip_longest(typing.cast(list[Any], one), typing.cast(list[Any], other))
        inner = [(*pair, f"{where}[{i}]") for i, pair in enumerate(pairs)]
    else:
        return found
    return next(filter(None, (first_difference(*values) for values in inner)), None)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in typing.cast(tuple[Any, ...], value)]
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """One value to the type that the dataclass declares."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _coerce(args[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"'{where}' is {value!r}", did_you_mean(str(value), map(str, args)))
        return value
    if origin is tuple:
        return _coerce_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"'{where}' must be a table, not {value!r}")
        return typing.cast(dict[str, Any], value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"'{where}' must be {hint.__name__}, not {value!r}")
    return value


def _coerce_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"'{where}' must be a list, not {value!r}")
    items = list(typing.cast(list[Any], value))
    kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(items):
        raise ConfigError(f"'{where}' must have {len(kinds)} items, not {len(items)}")
    return tuple(
        _coerce(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )
