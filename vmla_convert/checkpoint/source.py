"""Named tensors out of safetensors files, sharded folders and torch pickles, one at a time."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from vmla_convert.errors import CheckpointError, did_you_mean

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# Trainers keep several state dicts in one file; the averaged generator is the one that is meant
# to be sampled from.
STATE_KEYS = ("generator_ema", "generator", "model", "ema")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before its bytes are read or written."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Tensors by name, read when asked for."""

    @property
    def path(self) -> Path:
        """What the user pointed at."""
        ...

    @property
    def key(self) -> str | None:
        """The nested state dict that was picked from a pickle; None when the names are flat."""
        ...

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, without reading any."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        ...


def open_source(path: Path, key: str | None = None) -> TensorSource:
    """Open a checkpoint file or folder.

    Args:
        path: A .safetensors file, an index of shards, a torch pickle (.pt, .pth, .bin, .ckpt), or
            a folder that holds one of these.
        key: The state dict wanted from a pickle that holds several; None takes the first of
            `STATE_KEYS` that is there, or the whole file when it is flat.

    Raises:
        CheckpointError: Nothing loadable is there, or the file is damaged, unsafe or incomplete,
            or has no such key.
    """
    file = _locate(path)
    if file.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path, file, key)
    if key is not None:
        raise CheckpointError(
            f"{file} has no '{key}': safetensors files are flat", "leave the key out"
        )
    headers = {shard: _read_header(shard) for shard in _weight_files(file)}
    files = _read_index(file) if _is_index(file) else dict.fromkeys(headers[file], file)
    if absent := sorted(name for name, shard in files.items() if name not in headers[shard]):
        raise CheckpointError(
            f"{file} lists tensors that its shards do not hold: {', '.join(absent[:5])}",
            "download the checkpoint again",
        )
    if not files:
        raise CheckpointError(f"{file} holds no tensors", "download the checkpoint again")
    return _SafetensorsSource(
        path, {name: headers[shard][name] for name, shard in files.items()}, files
    )


def fingerprint(path: Path) -> str:
    """SHA-256 of the weights in hex: of the file, or of a folder's shards in order of name.

    Raises:
        CheckpointError: Nothing loadable is at `path`.
    """
    digest = hashlib.sha256()
    for file in _weight_files(_locate(path)):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _SafetensorsSource:
    path: Path
    _specs: dict[str, TensorSpec]
    _files: dict[str, Path]
    key: None = None

    def specs(self) -> dict[str, TensorSpec]:
        return dict(self._specs)

    def read(self, name: str) -> torch.Tensor:
        _check_known(name, self._specs, self.path)
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class _PickleSource:
    path: Path
    key: str | None
    _state: dict[str, torch.Tensor]

    def specs(self) -> dict[str, TensorSpec]:
        return {k: TensorSpec(tuple(t.shape), t.dtype) for k, t in self._state.items()}

    def read(self, name: str) -> torch.Tensor:
        _check_known(name, self._state, self.path)
        return self._state[name]


def _check_known(name: str, known: dict[str, Any], path: Path) -> None:
    if name not in known:
        raise CheckpointError(f"{path} has no tensor '{name}'", did_you_mean(name, known))


def _locate(path: Path) -> Path:
    """The one file to open: an index, a safetensors file or a pickle."""
    if path.is_dir():
        return _locate_in_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}", "give the path of a file or folder that exists"
        )
    if _is_index(path) or path.suffix in (".safetensors", *PICKLE_SUFFIXES):
        return path
    raise CheckpointError(
        f"{path} is not a checkpoint",
        f"known endings: .safetensors, {INDEX_SUFFIX}, {', '.join(PICKLE_SUFFIXES)}",
    )


def _locate_in_folder(folder: Path) -> Path:
    pickles = [f"*{suffix}" for suffix in PICKLE_SUFFIXES]
    for patterns in ([f"*{INDEX_SUFFIX}"], ["*.safetensors"], pickles):
        found = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{folder} holds {len(found)} checkpoints",
                f"give the path of one of them: {', '.join(file.name for file in found[:5])}",
            )
    transformer = folder / "transformer"
    raise CheckpointError(
        f"{folder} holds nothing that can be loaded",
        f"try {transformer}"
        if transformer.is_dir()
        else "give a folder with an index of shards, or one file that ends in .safetensors or "
        + ", ".join(PICKLE_SUFFIXES),
    )


def _is_index(file: Path) -> bool:
    return file.name.endswith(INDEX_SUFFIX)


def _weight_files(file: Path) -> list[Path]:
    return sorted(set(_read_index(file).values())) if _is_index(file) else [file]


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name to shard, every shard inside the index's folder and there."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = {str(name): PurePosixPath(shard) for name, shard in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index", "download the checkpoint again"
        ) from error
    for shard in sorted(set(shards.values())):
        # Judged by name: in the Hub's cache the files themselves are links out of the folder.
        if shard.is_absolute() or ".." in shard.parts:
            raise CheckpointError(
                f"{index} points outside its folder: {shard}",
                "do not use this checkpoint, or mend its index by hand",
            )
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index} needs {shard}, which is not there", "download the missing shard"
            )
    return {name: index.parent / shard for name, shard in shards.items()}


def _read_header(file: Path) -> dict[str, TensorSpec]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            kinds = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {error}", "download it again"
        ) from error
    if odd := sorted(name for name, (_, dtype) in kinds.items() if dtype not in _DTYPES):
        raise CheckpointError(
            f"'{odd[0]}' in {file} is stored as {kinds[odd[0]][1]}",
            "use a bf16, fp16 or fp32 version of this checkpoint",
        )
    return {
        name: TensorSpec(tuple(shape), _DTYPES[dtype]) for name, (shape, dtype) in kinds.items()
    }


def _open_pickle(path: Path, file: Path, key: str | None) -> TensorSource:
    payload = _load_pickle(file)
    if not isinstance(payload, dict):
        raise CheckpointError(
            f"{file} holds no state dict but a {type(payload).__name__}",
            "save the model's state dict with torch.save",
        )
    key = _pick_state(payload, key, file)
    state = payload if key is None else payload[key]
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd or not state:
        nested = _nested(payload)
        raise CheckpointError(
            f"{file} holds entries that are not tensors: {', '.join(odd[:5])}"
            if odd
            else f"{file} is empty",
            f"save one of these alone with torch.save: {', '.join(nested)}"
            if nested
            else "save the model's state dict alone with torch.save",
        )
    return _PickleSource(path, key, {str(name): tensor for name, tensor in state.items()})


def _nested(payload: dict[Any, Any]) -> list[str]:
    """Keys under which there may be a state dict; trainers may leave an empty average behind."""
    return [
        key
        for key, value in payload.items()
        if isinstance(key, str) and isinstance(value, dict) and value
    ]


def _pick_state(payload: dict[Any, Any], key: str | None, file: Path) -> str | None:
    nested = _nested(payload)
    if key is None:
        return next((known for known in STATE_KEYS if known in nested), None)
    if key not in nested:
        raise CheckpointError(
            f"{file} has no '{key}'",
            f"it holds: {', '.join(nested)}" if nested else "it is flat: leave the key out",
        )
    return key


def _load_pickle(file: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} is not a whole torch checkpoint",
            "download it again; if it is older than torch 1.6, save it again with torch.save",
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} needs more than tensors to load" + (f": {culprit[1]}" if culprit else ""),
            "where you trust it, load it with weights_only=False and torch.save its state dict",
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{file} is not a torch checkpoint, or is damaged", "download it again"
        ) from error
