"""Let diffusers open a pushed pipeline with `trust_remote_code=True`.

diffusers imports a class of another package only from a Python file in the repository. The two
files here import the class from vmla-convert; the index and the config name the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmla_convert.checkpoint.layouts import DIFFUSERS, PIPELINE_NAME

_PIPELINE = ("vmla_pipeline", "VMLAPipeline")
_TRANSFORMER = ("vmla_transformer", "VMLATransformer")
_SHIM = '"""Needs: pip install vmla-convert"""\n\nfrom vmla_convert import {}  # noqa: F401\n'

SHIMS = {
    f"{_PIPELINE[0]}.py": _SHIM.format(_PIPELINE[1]),
    DIFFUSERS.place(f"{_TRANSFORMER[0]}.py"): _SHIM.format(_TRANSFORMER[1]),
}
"""Text of the Python files, by path in the repository."""


def _with_auto_map(table: dict[str, Any]) -> dict[str, Any]:
    """Add the class that `AutoModel` makes."""
    return table | {"auto_map": {"AutoModel": ".".join(_TRANSFORMER)}}


def _with_classes(index: dict[str, Any]) -> dict[str, Any]:
    """Name the classes of the files in a pipeline's index.

    `AutoModel` looks for `auto_map` in the index alone when the index lists the transformer.
    """
    classes = {"_class_name": list(_PIPELINE), "transformer": list(_TRANSFORMER)}
    return _with_auto_map(index) | classes


TABLES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    PIPELINE_NAME: _with_classes,
    DIFFUSERS.place("config.json"): _with_auto_map,
}
"""Changes of JSON tables, by path in the repository."""
