"""Writing a checkpoint folder: planned from shapes, one shard in memory, all there or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from vmla_convert.checkpoint.source import TensorSpec
from vmla_convert.errors import OutputError

INDEX_NAME = "model.safetensors.index.json"


class CheckpointWriter:
    """A folder of safetensors shards and text files that appears whole or not at all.

    Use as a context manager. Everything goes into `<out>.partial/` beside `out`, is synced to disk
    and renamed on a clean exit; on any exception the partial folder is removed. The plan of shards
    follows the order of `specs`: tensors added in that order keep one open shard in memory.
    """

    def __init__(
        self, out: Path, specs: dict[str, TensorSpec], shard_bytes: int = 4 * 1024**3
    ) -> None:
        """Plan the shards; nothing is written yet.

        Args:
            out: The folder to make; may exist when empty.
            specs: Every tensor that will be added.
            shard_bytes: Largest size of a shard; a tensor that is larger gets its own.

        Raises:
            OutputError: `out` is taken.
        """
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise OutputError(f"{out} is already there", "choose another -o or remove it")
        split = split_state_dict_into_shards_factory(
            specs,
            get_storage_size=_size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes,
        )
        self._out = out
        self._partial = out.with_name(f"{out.name}.partial")
        self._specs = dict(specs)
        self._file_of = split.tensor_to_filename
        self._sharded = split.is_sharded
        self._awaited = {file: set(names) for file, names in split.filename_to_tensors.items()}
        self._open: dict[str, dict[str, torch.Tensor]] = {}

    def __enter__(self) -> Self:
        """Make an empty partial folder.

        Raises:
            OutputError: It cannot be made there.
        """
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(self._partial, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publish after a clean run; leave nothing behind otherwise.

        Raises:
            OutputError: A planned tensor was never added, or the disk refuses.
        """
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one planned tensor; its shard is written as soon as it is complete.

        Raises:
            OutputError: The tensor is not planned, is added twice, or is of another shape or dtype.
        """
        if name not in self._specs:
            raise OutputError(f"'{name}' is not in the plan of {self._out}", _BUG)
        file = self._file_of[name]
        if name not in self._awaited[file]:
            raise OutputError(f"'{name}' was added twice to {self._out}", _BUG)
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if found != self._specs[name]:
            raise OutputError(f"'{name}' is {found}, planned was {self._specs[name]}", _BUG)
        # A copy: the caller may reuse its buffer, and a view would keep all of its base alive.
        kept = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._open.setdefault(file, {})[name] = kept
        self._awaited[file].discard(name)
        if not self._awaited[file]:
            self._flush(file)

    def write_json(self, name: str, obj: Any) -> None:
        """Write a JSON file beside the weights."""
        self.write_text(name, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file beside the weights.

        Raises:
            OutputError: The name leads elsewhere or is the weights' own, or the disk refuses.
        """
        if not name or Path(name).name != name or name in self._awaited or name == INDEX_NAME:
            raise OutputError(f"'{name}' cannot be a file beside the weights", _BUG)
        self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        try:
            (self._partial / name).write_text(text, "utf-8")
        except OSError as error:
            raise _unwritable(self._partial / name, error) from error

    def _flush(self, file: str) -> None:
        try:
            path = self._partial / file
            save_file(self._open.pop(file), path, metadata={"format": "pt"})
            # safetensors makes its files private; a checkpoint is as readable as its card.
            path.chmod(0o666 & ~_umask())
        except (OSError, SafetensorError) as error:
            raise _unwritable(self._partial / file, error) from error

    def _publish(self) -> None:
        if missing := sorted(set().union(*self._awaited.values())):
            raise OutputError(
                f"{len(missing)} planned tensors were never written: {', '.join(missing[:5])}", _BUG
            )
        if self._sharded:
            total = sum(map(_size, self._specs.values()))
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            self._write(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        try:
            for path in (*self._partial.iterdir(), self._partial):
                _sync(path)
            os.rename(self._partial, self._out)
            _sync(self._out.parent)
        except OSError as error:
            raise _unwritable(self._out, error) from error


def write_checkpoint(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, str | dict[str, Any]],
    shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write tensors that are already in memory, with text files and JSON tables beside them.

    Raises:
        OutputError: `out` is taken or cannot be written.
    """
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with CheckpointWriter(out, specs, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        for name, content in files.items():
            if isinstance(content, str):
                writer.write_text(name, content)
            else:
                writer.write_json(name, content)


_BUG = "this is a fault of the program: please report it"


def _size(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error}",
        "check the space and rights there, or choose another -o",
    )
