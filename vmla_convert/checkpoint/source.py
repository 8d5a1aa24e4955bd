"""Read named tensors from safetensors files, sharded folders and torch pickles, one at a time.

Opening a checkpoint reads headers only. A tensor is copied out of a memory map, and the map is
closed soon: its pages count as resident memory, so an open map of 28 GB would look like 28 GB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError

from vmla_convert.checkpoint.choose_file import (
    ENDINGS,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    choose_file,
)
from vmla_convert.checkpoint.specs import TensorSpec, refuse_many
from vmla_convert.checkpoint.torch_pickle import PickledState
from vmla_convert.errors import CheckpointError, did_you_mean
from vmla_convert.progress import Progress, Silent
from vmla_convert.storage.limits import opened_safetensors
from vmla_convert.tables import read_json


@dataclass(frozen=True)
class TensorSource:
    """An open checkpoint, which reads tensors by name.

    Attributes:
        path: The path that the user gave.
        key: The state dict that was picked from a pickle of several; None when there is only one.
    """

    path: Path
    key: str | None
    _specs: Mapping[str, TensorSpec]
    _read: Callable[[str], torch.Tensor]

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, by name."""
        return dict(self._specs)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor: contiguous, on the CPU, in memory of its own.

        Raises:
            CheckpointError: No tensor has this name, or the file has changed.
        """
        if name not in self._specs:
            raise CheckpointError(
                f"{self.path} has no tensor '{name}'", did_you_mean(name, self._specs)
            )
        try:
            return self._read(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} can no longer be read: {error}",
                "put the file back as it was, then start again",
            ) from error


def open_source(path: Path, key: str | None = None) -> TensorSource:
    """Open a checkpoint file or folder.

    Args:
        path: A .safetensors file, an index of shards, a torch pickle (.pt, .pth, .bin, .ckpt), or
            a folder that holds one of these.
        key: Name of the state dict in a pickle that holds several. None takes the first of
            `STATE_KEYS` that is there, or the whole file when the file is one state dict.

    Raises:
        CheckpointError: Nothing loadable is at `path`, the file is damaged, incomplete, unsafe or
            quantised, or the file has no such key.
    """
    file = located(path)
    if file.suffix in PICKLE_SUFFIXES:
        state = PickledState(file, key)
        return TensorSource(path, state.key, state.specs, state.read)
    if key is not None:
        raise CheckpointError(
            f"{file} has no '{key}': safetensors files hold one state dict", "leave the key out"
        )
    weight_map = _local_weight_map(file) if _is_index(file) else None
    shards = {shard: _read_header(shard) for shard in weight_files(file)}
    return _joined(path, shards, weight_map)


def open_headers(
    path: Path, headers: Mapping[str, Mapping[str, Any]], weight_map: Mapping[str, str] | None
) -> TensorSource:
    """A safetensors checkpoint of which only headers are here: `specs` works, `read` does not.

    Args:
        path: The checkpoint, for messages.
        headers: Entry of each tensor (`dtype`, `shape`), by file name and tensor name.
        weight_map: File name of each tensor, from an index; None for a single file.

    Raises:
        CheckpointError: The files do not fit each other, or are quantised.
    """
    shards = {
        Path(file): {
            name: TensorSpec.stored(path / file, name, entry["dtype"], entry["shape"])
            for name, entry in header.items()
        }
        for file, header in headers.items()
    }
    if weight_map is None:
        return _joined(path, shards, None)
    return _joined(path, shards, {name: Path(file) for name, file in weight_map.items()})


def located(path: Path) -> Path:
    """The one file that `open_source` opens: an index, a safetensors file or a pickle.

    Raises:
        CheckpointError: Nothing loadable is at `path`, or several checkpoints are there.
    """
    if path.is_dir():
        return _locate_in_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}", "give the path of a file or folder that exists"
        )
    if path.name.endswith(ENDINGS):
        return path
    raise CheckpointError(f"{path} is not a checkpoint", f"known endings: {', '.join(ENDINGS)}")


def weight_files(path: Path) -> list[Path]:
    """The files that hold the tensors of a checkpoint, sorted by name.

    Raises:
        CheckpointError: Nothing loadable is at `path`.
    """
    file = located(path)
    return sorted(set(_local_weight_map(file).values())) if _is_index(file) else [file]


def fingerprint(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 in hex of the weight files, one after the other in order of name.

    Raises:
        CheckpointError: Nothing loadable is at `path`.
    """
    digest = hashlib.sha256()
    for file in (progress or Silent()).track(weight_files(path), "hashing"):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def read_weight_map(index: Path, title: str) -> dict[str, str]:
    """Read an index of shards: the file name of each tensor, relative to the index's folder.

    Args:
        index: The index file.
        title: Name of the index in messages.

    Raises:
        CheckpointError: The file is no index, or names a file outside its folder.
    """
    try:
        weight_map = dict(read_json(index)["weight_map"])
        paths = [PurePosixPath(shard) for shard in sorted(set(weight_map.values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{title} is not a safetensors index", "download the checkpoint again"
        ) from error
    for path in paths:
        # Only the name counts: in the Hub's cache the files are links out of the folder.
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f"{title} points outside its folder: {path}", "do not use this checkpoint"
            )
    return weight_map


def _locate_in_folder(folder: Path) -> Path:
    files = (file for depth in ("*", "*/*") for file in folder.glob(depth) if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    found = choose_file(names, str(folder), lambda name: f"give the path {folder / name}")
    if found is None:
        raise CheckpointError(
            f"{folder} holds nothing that can be loaded",
            f"give a file, or a folder with a file, that ends in {', '.join(ENDINGS)}",
        )
    return folder / found


def _is_index(file: Path) -> bool:
    return file.name.endswith(INDEX_SUFFIX)


def _local_weight_map(index: Path) -> dict[str, Path]:
    """The shard of each tensor; every shard is there."""
    shards = {
        name: index.parent / file for name, file in read_weight_map(index, str(index)).items()
    }
    for shard in sorted(set(shards.values())):
        if not shard.is_file():
            raise CheckpointError(
                f"{index} needs {shard.name}, which is not there", "download the missing shard"
            )
    return shards


def _read_header(file: Path) -> dict[str, TensorSpec]:
    try:
        with opened_safetensors(file, "np") as handle:
            # Sorted, because the library gives names in no order.
            names = sorted(handle.keys())
            refuse_many(file, len(names))
            entries = {name: handle.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {reason}", "download it again"
        ) from error
    return {
        name: TensorSpec.stored(file, name, entry.get_dtype(), entry.get_shape())
        for name, entry in entries.items()
    }


def _joined(
    path: Path,
    shards: Mapping[Path, dict[str, TensorSpec]],
    weight_map: Mapping[str, Path] | None,
) -> TensorSource:
    """The tensors of all shards as one source, after a check that the index lists exactly them."""
    refuse_many(path, sum(map(len, shards.values())))
    held = {(name, shard) for shard, specs in shards.items() for name in specs}
    listed = held if weight_map is None else set(weight_map.items())
    if absent := sorted(name for name, _ in listed - held):
        raise CheckpointError(
            f"the index of {path} lists tensors that no shard holds: {', '.join(absent[:5])}",
            "download the checkpoint again",
        )
    if unlisted := sorted(f"{name} in {shard.name}" for name, shard in held - listed):
        raise CheckpointError(
            f"the index of {path} does not list tensors that shards hold: "
            f"{', '.join(unlisted[:5])}",
            "download the checkpoint again: its files may be of two versions",
        )
    if not held:
        raise CheckpointError(f"{path} holds no tensors", "download the checkpoint again")
    files = {name: shard for shard, specs in shards.items() for name in specs}
    specs = {name: shards[file][name] for name, file in files.items()}
    return TensorSource(
        path, None, specs, lambda name: _read_tensor(files[name], name, specs[name])
    )


def _read_tensor(file: Path, name: str, spec: TensorSpec) -> torch.Tensor:
    """Read one tensor of a safetensors file with ordinary file reads.

    safe_open's torch reader maps the whole file as private memory. The mapping fails for files that
    are larger than the machine's memory: 28.6 GB (a 14B model in one file) on 24 GB.
    """
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            start, _ = json.loads(stream.read(size))[name]["data_offsets"]
        except (ValueError, LookupError) as error:
            raise OSError("its header has changed") from error
        stream.seek(8 + size + start)
        if stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
            raise OSError("it has become shorter")
    return tensor
