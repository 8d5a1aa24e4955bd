"""Where a long walk puts what it needs again later: memory, or a folder that a new start finds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmla_convert.errors import OutputError

Tensors = dict[str, Tensor]


class TensorStore(Protocol):
    """Groups of tensors by name."""

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep a group, in place of one of the same name."""
        ...

    def get(self, name: str) -> Tensors:
        """A group that is there."""
        ...

    def has(self, name: str) -> bool:
        """Whether a group is there."""
        ...

    def drop(self, name: str) -> None:
        """Forget a group, if it is there."""
        ...


class MemoryStore:
    """For models that fit in memory many times over."""

    def __init__(self) -> None:
        self._groups: dict[str, Tensors] = {}

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep a group."""
        self._groups[name] = tensors

    def get(self, name: str) -> Tensors:
        """A group that is there."""
        return self._groups[name]

    def has(self, name: str) -> bool:
        """Whether a group is there."""
        return name in self._groups

    def drop(self, name: str) -> None:
        """Forget a group."""
        self._groups.pop(name, None)


class FolderStore:
    """A file for each group, there whole or not at all; found again by the same work.

    Args:
        folder: Made for the first group.
        identity: What the work depends on, JSON-able.

    Raises:
        OutputError: The folder holds something else, or other work.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        self.folder = folder
        self._told, self._identity = folder / "identity.json", json.dumps(identity, sort_keys=True)
        if folder.exists() and (
            not self._told.is_file() or self._told.read_text() != self._identity
        ):
            raise OutputError(
                f"{folder} is in the way: it holds other files, or work of other settings",
                "go on with the settings it was begun with, or remove it",
            )

    def put(self, name: str, tensors: Tensors) -> None:
        """Write a group.

        Raises:
            OutputError: The disk refuses.
        """
        try:
            self._write(name, tensors)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.folder} cannot be written: {error}",
                "check the space and rights there, then start again: what is done is kept",
            ) from error

    def _write(self, name: str, tensors: Tensors) -> None:
        if not self._told.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._told.write_text(self._identity)
        partial = self.folder / f"{name}.partial"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self._file(name))

    def get(self, name: str) -> Tensors:
        """Read a group."""
        return load_file(self._file(name))

    def has(self, name: str) -> bool:
        """Whether a group is there."""
        return self._file(name).is_file()

    def drop(self, name: str) -> None:
        """Remove a group."""
        self._file(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
