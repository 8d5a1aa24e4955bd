"""Contents of files that hypothesis draws, near the sound ones and far from them.

PYTEST_DONT_REWRITE, because the runner imports this module without pytest.
"""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from((0, -1, 1, 2**31, 2**63, 10**9, 10**30)),
    st.floats(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def json_files(sound: bytes) -> SearchStrategy[bytes]:
    """A JSON table with one or two other values somewhere, or any JSON at all."""
    near = _changed(json.loads(sound)).map(_json)
    return st.one_of(near, near, near, VALUES.map(_json))


def toml_files(sound: bytes) -> SearchStrategy[bytes]:
    """A TOML file with one or two other values somewhere, or text."""
    return st.one_of(_changed(tomllib.loads(sound.decode())).map(_toml), text_files(sound))


def text_files(sound: bytes) -> SearchStrategy[bytes]:
    """The sound file with other text in the middle, in several encodings."""
    places = st.integers(0, len(sound))
    encoded = st.one_of(
        st.text().map(lambda text: text.encode("utf-8")),
        st.text().map(lambda text: text.encode("utf-16")),
        st.binary(max_size=64),
    )
    return st.builds(lambda at, text: sound[:at] + text + sound[at:], places, encoded)


def binary_files(sound: bytes) -> SearchStrategy[bytes]:
    """The start and the end of the sound file, with other bytes between them."""
    places = st.integers(0, len(sound))
    return st.builds(
        lambda start, middle, stop: sound[:start] + middle + sound[stop:],
        places,
        st.binary(max_size=256),
        places,
    )


def headers(sound: bytes) -> SearchStrategy[bytes]:
    """A safetensors file with other values in its header, and the sound content."""
    size = int.from_bytes(sound[:8], "little")
    table, content = json.loads(sound[8 : 8 + size]), sound[8 + size :]

    def file(header: Any) -> bytes:
        text = _json(header)
        return len(text).to_bytes(8, "little") + text + content

    return st.one_of(_changed(table).map(file), VALUES.map(file), binary_files(sound))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _toml(table: dict[str, Any]) -> bytes:
    lines: list[str] = []
    for name, section in table.items():
        if isinstance(section, dict):
            lines.append(f"[{json.dumps(name)}]")
            lines += [f"{json.dumps(key)} = {_inline(value)}" for key, value in section.items()]
        else:
            lines.insert(0, f"{json.dumps(name)} = {_inline(section)}")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        entries = (f"{json.dumps(key)} = {_inline(each)}" for key, each in value.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def _changed(table: Any) -> SearchStrategy[Any]:
    """A table with one or two values replaced, removed or added."""
    paths = list(_paths(table))

    def change(chosen: Sequence[tuple[tuple[Any, ...], str, Any]]) -> Any:
        made = copy.deepcopy(table)
        for path, how, value in chosen:
            _put(made, path, how, value)
        return made

    ways = st.sampled_from(("replace", "replace", "replace", "remove", "add"))
    step = st.tuples(st.sampled_from(paths), ways, VALUES)
    return st.lists(step, min_size=1, max_size=2).map(change)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:3])
        if isinstance(value, list)
        else ()
    )
    for key, inner in entries:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _put(table: Any, path: tuple[Any, ...], how: str, value: Any) -> None:
    for key in path[:-1]:
        try:
            table = table[key]
        except (LookupError, TypeError):  # an earlier change removed it
            return
    if not isinstance(table, dict):
        if isinstance(table, list) and path[-1] in range(len(table)):
            table[path[-1]] = value
    elif how == "remove":
        table.pop(path[-1], None)
    else:
        table[path[-1] if how == "replace" else f"{path[-1]}_"] = value
