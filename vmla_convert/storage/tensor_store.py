"""Stores of named groups of tensors: in memory, or in a folder that an interrupted run finds again.

Calibration, clips, the layers of a recovery and the parts of a conversion are kept in such stores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmla_convert.errors import OutputError, first_line
from vmla_convert.storage.output import (
    IDENTITY_NAME,
    draft_of,
    rename_synced,
    reported,
    write_whole,
)
from vmla_convert.tables import first_difference, read_json

Tensors = dict[str, Tensor]


class MemoryStore:
    """A store for models that fit in memory many times over."""

    def __init__(self) -> None:
        self._groups: dict[str, Tensors] = {}

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep a group, in place of an earlier one of the same name."""
        self._groups[name] = tensors

    def get(self, name: str) -> Tensors:
        """Return a group that is in the store."""
        return self._groups[name]

    def has(self, name: str) -> bool:
        """Whether a group is in the store."""
        return name in self._groups

    def drop(self, name: str) -> None:
        """Remove a group, if it is in the store."""
        self._groups.pop(name, None)


class FolderStore:
    """A folder with one safetensors file per group, each there whole or not at all.

    Args:
        folder: Made for the first group.
        identity: Everything that the tensors depend on, JSON-able. A later run with an equal
            identity finds the groups again.
        hint: What to do when the disk refuses.

    Raises:
        OutputError: The folder holds something else, or groups of another identity.
    """

    def __init__(
        self,
        folder: Path,
        identity: Any,
        hint: str = "check the space and rights there, then start again: what is done is kept",
    ) -> None:
        self.folder, self._hint = folder, hint
        self._identity, self._file = json.dumps(identity, sort_keys=True), folder / IDENTITY_NAME
        if folder.exists() and not self._is_empty():
            self._check_identity()

    def put(self, name: str, tensors: Tensors) -> None:
        """Write a group, in place of an earlier one of the same name.

        Raises:
            OutputError: The disk refuses.
        """
        with reported(self.folder, self._hint):
            file = self.file(name)
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._file.is_file():
                write_whole(self._file, self._identity)
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".partial")
            save_tensors({key: _own(t) for key, t in tensors.items()}, draft)
            rename_synced(draft, file)

    def get(self, name: str) -> Tensors:
        """Read a group that is in the store."""
        return load_file(self.file(name))

    def has(self, name: str) -> bool:
        """Whether a group is in the store."""
        return self.file(name).is_file()

    def drop(self, name: str) -> None:
        """Remove a group, if it is in the store."""
        self.file(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def file(self, name: str) -> Path:
        """The file of a group."""
        return self.folder / f"{name}.safetensors"

    def _is_empty(self) -> bool:
        """Whether a process ended between making the folder and naming what the folder holds."""
        return self.folder.is_dir() and all(
            path.name == draft_of(self._file).name for path in self.folder.iterdir()
        )

    def _check_identity(self) -> None:
        try:
            found = read_json(self._file)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.folder} is in the way: it holds other files", "move or remove it"
            ) from error
        if difference := first_difference(found, json.loads(self._identity)):
            name = f": {difference[0]} differs" if difference[0] else ""
            raise OutputError(
                f"{self.folder} is in the way: it was begun with other settings{name}",
                "use the same settings as before, or remove it",
            )


TensorStore = MemoryStore | FolderStore


def save_tensors(tensors: Tensors, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that others can read like any new file."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, {"format": "pt", **(metadata or {})})
    # safetensors 0.8 makes files that only their owner can read.
    file.chmod(mode)


def save_pickle(value: Any, file: Path) -> None:
    """Write a torch pickle.

    Raises:
        OSError: The disk refuses, for which torch has no error of its own.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        raise OSError(first_line(error)) from error


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, and in memory that no other tensor of a group shares."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
