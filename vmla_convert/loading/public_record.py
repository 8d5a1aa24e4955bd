"""Remove the folders of this machine from records before others see them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmla_convert.checkpoint.hub import is_repo

# The key says what a string is. Strings under other keys are taken for paths.
_PROMPTS, _LICENCES = "prompts", "licence"
_REPOS = ("checkpoint", "base_model", "repo")
_REPOS_OR_FOLDERS = ("_name_or_path", "name_or_path")
# The start of a text that can only be a path, unlike "MIT/X11".
_ROOTED = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:")


def without_folders(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a record in which every local path is cut to its last part.

    Hub ids stay whole under the keys `checkpoint`, `base_model` and `repo`, as does a `file` in
    such a repository. Under `name_or_path`, a text that looks like an id stays whole
    unless it exists as a path here.
    """
    in_repo = is_repo(str(record.get("checkpoint") or record.get("repo")))
    return {
        key: value if key == "file" and in_repo else public_value(key, value)
        for key, value in record.items()
    }


def public_value(key: str, value: Any) -> Any:
    """A value without folders, judged by its key."""
    if isinstance(value, Mapping):
        return without_folders(value)
    if isinstance(value, list | tuple):
        return [public_value(key, entry) for entry in value]
    if not isinstance(value, str) or key == _PROMPTS:
        return value
    stays = (
        (key == _LICENCES and not _ROOTED.match(value))
        or (key in _REPOS and is_repo(value))
        or (key in _REPOS_OR_FOLDERS and is_repo(value) and not Path(value).exists())
    )
    return value if stays else _last_part(value)


def _last_part(path: str) -> str:
    """The last part of a path of any system, with the scale that may follow a LoRA's path."""
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
