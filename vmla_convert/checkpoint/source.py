"""Named tensors out of safetensors files, sharded folders and torch pickles, one at a time.

Opening reads headers only. Reading a tensor reads its bytes and no others, with ordinary file
reads: pages of a memory map would stay resident until the whole checkpoint is.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from vmla_convert.checkpoint.choose_file import (
    ENDINGS,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    choose_file,
)
from vmla_convert.errors import CheckpointError, did_you_mean
from vmla_convert.progress import Progress, Silent

# Trainers keep several state dicts in one file; the averaged generator is the one that is meant
# to be sampled from. "generator_lora" is left out: it is no model without its base.
STATE_KEYS = ("generator_ema", "generator", "model", "ema", "state_dict")

# Every dtype whose numbers stand one by one: those left out are quantised or packed.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK = 1 << 24  # bytes hashed at once
_LONGEST_HEADER = 100_000_000  # as in the safetensors library
_UNQUANTISED = "use a bf16, fp16 or fp32 version of this checkpoint"


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before its bytes are read or written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return prod(self.shape) * self.dtype.itemsize


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
        """One tensor, contiguous, on the CPU, its memory shared with no other.

        Raises:
            CheckpointError: There is no tensor of that name, or its file is no longer whole.
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
        CheckpointError: Nothing loadable is there, or the file is damaged, unsafe, incomplete or
            quantised, or has no such key.
    """
    file = located(path)
    if file.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path, file, key)
    if key is not None:
        raise CheckpointError(
            f"{file} has no '{key}': safetensors files are flat", "leave the key out"
        )
    index = _read_index(file) if _is_index(file) else None
    return _joined(path, file, {shard: _read_header(shard) for shard in weight_files(file)}, index)


def open_headers(
    path: Path, headers: Mapping[str, Mapping[str, Any]], index: Mapping[str, str] | None
) -> TensorSource:
    """A safetensors checkpoint of which only the headers are here: `specs`, but nothing to read.

    Args:
        path: What the user pointed at.
        headers: File name to what its header says of each tensor.
        index: Tensor to file name, where there are several.

    Raises:
        CheckpointError: As `open_source`, where the files do not fit each other or are quantised.
    """
    for name, header in headers.items():
        _refuse_packed(path / name, header)
    places = {Path(name): _placed(path / name, 0, header) for name, header in headers.items()}
    shards = None if index is None else {name: Path(file) for name, file in index.items()}
    return _joined(path, path, places, shards)


def _joined(
    path: Path,
    file: Path,
    headers: Mapping[Path, dict[str, _Place]],
    index: Mapping[str, Path] | None,
) -> TensorSource:
    """One source of several files, each tensor in the file that the index says."""
    files = index
    if files is None:
        files = {name: shard for shard, header in headers.items() for name in header}
    if absent := sorted(name for name, shard in files.items() if name not in headers[shard]):
        raise CheckpointError(
            f"{file} lists tensors that its shards do not hold: {', '.join(absent[:5])}",
            "download the checkpoint again",
        )
    held = ((shard, name) for shard, header in headers.items() for name in header)
    if unlisted := sorted(f"{name} in {s.name}" for s, name in held if files.get(name) != s):
        raise CheckpointError(
            f"{file} does not list tensors that its shards hold: {', '.join(unlisted[:5])}",
            "download the checkpoint again: its files may be of two versions",
        )
    if not files:
        raise CheckpointError(f"{file} holds no tensors", "download the checkpoint again")
    return _FileSource(path, None, {name: headers[shard][name] for name, shard in files.items()})


def located(path: Path) -> Path:
    """The one file that `open_source` opens: an index, a safetensors file or a pickle.

    Raises:
        CheckpointError: Nothing loadable is at `path`, or more than one thing.
    """
    if path.is_dir():
        return _locate_in_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}", "give the path of a file or folder that exists"
        )
    if path.name.endswith(ENDINGS):
        return path
    raise CheckpointError(
        f"{path} is not a checkpoint",
        f"known endings: {', '.join(ENDINGS)}",
    )


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, in order of name.

    Raises:
        CheckpointError: Nothing loadable is at `path`.
    """
    file = located(path)
    return sorted(set(_read_index(file).values())) if _is_index(file) else [file]


def fingerprint(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of the weights in hex: of the file, or of a folder's shards in order of name.

    Raises:
        CheckpointError: Nothing loadable is at `path`.
    """
    digest, files = hashlib.sha256(), weight_files(path)
    total = sum(-(-file.stat().st_size // _BLOCK) for file in files)
    for block in (progress or Silent()).track(_blocks(files), "hashing", total):
        digest.update(block)
    return digest.hexdigest()


def _blocks(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                yield block


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: `start` counts bytes of the file, `stride` elements."""

    file: Path
    start: int
    spec: TensorSpec
    stride: tuple[int, ...]

    def span(self) -> int:
        """Elements from the first to the last, those skipped by the stride included."""
        if 0 in self.spec.shape:
            return 0
        steps = zip(self.spec.shape, self.stride, strict=True)
        return 1 + sum((side - 1) * step for side, step in steps)


@dataclass(frozen=True)
class _FileSource:
    path: Path
    key: str | None
    _places: dict[str, _Place]

    def specs(self) -> dict[str, TensorSpec]:
        return {name: place.spec for name, place in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._places:
            raise CheckpointError(
                f"{self.path} has no tensor '{name}'", did_you_mean(name, self._places)
            )
        place = self._places[name]
        numbers = torch.empty(place.span(), dtype=place.spec.dtype)
        try:
            with place.file.open("rb") as stream:
                stream.seek(place.start)
                count = stream.readinto(numbers.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(
                f"{place.file} can no longer be read: {error.strerror}",
                "put it back and start again",
            ) from error
        if count != numbers.nbytes:
            raise CheckpointError(
                f"{place.file} has become shorter since it was opened", "download it again"
            )
        return numbers.as_strided(place.spec.shape, place.stride).contiguous()


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


def read_weight_map(index: Path, title: str) -> dict[str, str]:
    """Read which shard holds each tensor, from an index of safetensors shards.

    Args:
        index: The index.
        title: The name of the index for messages.

    Raises:
        CheckpointError: The file is not an index, or names a shard outside its folder.
    """
    try:
        weight_map = dict(_parse_json(index.read_bytes())["weight_map"])
        shards = [PurePosixPath(shard) for shard in sorted(set(weight_map.values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{title} is not a safetensors index", "download the checkpoint again"
        ) from error
    for shard in shards:
        # The name decides: in the Hub's cache the files themselves are links to another folder.
        if shard.is_absolute() or ".." in shard.parts:
            raise CheckpointError(
                f"{title} points outside its folder: {shard}",
                "do not use this checkpoint, or correct its index by hand",
            )
    return weight_map


def _read_index(index: Path) -> dict[str, Path]:
    """Read which shard holds each tensor, and check that every shard exists."""
    weight_map = read_weight_map(index, str(index))
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index} needs {shard}, which is not there", "download the missing shard"
            )
    return {name: index.parent / shard for name, shard in weight_map.items()}


def _read_header(file: Path) -> dict[str, _Place]:
    try:
        start, header = _parse_header(file)
        _refuse_packed(file, header)
        with safe_open(file, framework="np"):
            pass  # the library has now checked every shape and offset against the file's size
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {reason}", "download it again"
        ) from error
    return _placed(file, start, header)


def _refuse_packed(file: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in header.items():
        dtype = entry.get("dtype")
        if isinstance(dtype, str) and dtype not in _DTYPES:
            raise _quantised(file, name, dtype)


def _placed(file: Path, start: int, header: Mapping[str, Mapping[str, Any]]) -> dict[str, _Place]:
    """Every tensor of a header whose data begin at `start`."""
    return {
        name: _Place(
            file,
            start + entry["data_offsets"][0],
            TensorSpec(shape := tuple(entry["shape"]), _DTYPES[entry["dtype"]]),
            stride=tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))),
        )
        for name, entry in header.items()
    }


def _parse_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors' bytes begin, and what is said of each tensor, not yet to be trusted."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size - 8:
            raise ValueError("it ends within its header")
        if size > _LONGEST_HEADER:
            raise ValueError(f"its header is said to be {size} bytes long")
        header = _parse_json(stream.read(size))
    if not isinstance(header, dict) or not all(isinstance(e, dict) for e in header.values()):
        raise ValueError("its header is not a table of tensors")
    header.pop("__metadata__", None)
    return 8 + size, header


def _parse_json(text: bytes) -> Any:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in unique if names.count(name) > 1)
            raise ValueError(f"it names '{twice}' twice")
        return unique

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=table)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("its header is not JSON") from error


def _quantised(file: Path, name: str, dtype: object) -> CheckpointError:
    return CheckpointError(f"{file} is quantised: {name} is stored as {dtype}", _UNQUANTISED)


def _open_pickle(path: Path, file: Path, key: str | None) -> TensorSource:
    payload, records = _load_pickle(file)
    if not isinstance(payload, dict):
        raise CheckpointError(
            f"{file} holds no state dict but a {type(payload).__name__}",
            "save the model's state dict with torch.save",
        )
    key = _pick_state(payload, key, file)
    state = payload if key is None else payload[key]
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd or not state:
        raise CheckpointError(
            f"{file} holds entries that are not tensors: {', '.join(odd[:5])}"
            if odd
            else f"{file} is empty",
            _hint_at_states(_nested(payload)),
        )
    places = {
        str(name): _place_in_pickle(file, str(name), tensor, records)
        for name, tensor in state.items()
    }
    return _FileSource(path, key, places)


def _nested(payload: dict[Any, Any]) -> list[str]:
    """Keys of state dicts; an average that has not begun, or an optimiser's, has no tensors."""
    return [
        key
        for key, value in payload.items()
        if isinstance(key, str)
        and isinstance(value, dict)
        and any(isinstance(entry, torch.Tensor) for entry in value.values())
    ]


def _hint_at_states(nested: list[str]) -> str:
    if nested == ["generator_lora"]:
        return "this is a LoRA alone: give the model that it was trained on"
    if nested:
        return f"save one of these alone with torch.save: {', '.join(nested)}"
    return "save the model's state dict alone with torch.save"


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


def _load_pickle(file: Path) -> tuple[Any, Mapping[int, int]]:
    """What was pickled, its tensors on the meta device, and the zip's records."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} is not a whole torch checkpoint",
            "download it again; if it is older than torch 1.6, save it again with torch.save",
        )
    try:
        records = _stored_records(file)
        return torch.load(file, map_location="meta", weights_only=True), records
    except CheckpointError:
        raise
    except NotImplementedError as error:  # the meta device has no such tensors
        raise CheckpointError(f"{file} holds quantised or nested tensors", _UNQUANTISED) from error
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} needs more than tensors to load: {culprit[1]}"
            if culprit
            else f"{file} does not load as tensors alone",
            "where you trust it, load it with weights_only=False and torch.save its state dict",
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{file} is not a torch checkpoint, or is damaged", "download it again"
        ) from error


def _stored_records(file: Path) -> dict[int, int]:
    """Size of every record of a torch zip, by the place of its first byte.

    Read from the zip itself: torch reckons the places from the order in which it writes, and
    would be wrong about a file that another program packed.
    """
    length, records = file.stat().st_size, {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{file} is compressed: {info.filename}", "load it and torch.save it again"
                )
            stream.seek(info.header_offset)
            magic, name_size, extra_size = struct.unpack("<4s22x2H", stream.read(30))
            start = info.header_offset + 30 + name_size + extra_size
            if magic != b"PK\x03\x04" or start + info.file_size > length:
                raise zipfile.BadZipFile(info.filename)
            records[start] = info.file_size
            stream.seek(start)
            if info.filename.endswith("/byteorder") and stream.read(3) == b"big":
                raise CheckpointError(
                    f"{file} was written on a big-endian machine",
                    "load it and torch.save it again on a machine that is not",
                )
    return records


def _place_in_pickle(
    file: Path, name: str, tensor: torch.Tensor, records: Mapping[int, int]
) -> _Place:
    if tensor.dtype not in _DTYPES.values():
        raise _quantised(file, name, str(tensor.dtype).removeprefix("torch."))
    # Conjugates and negatives may be flags on bytes that say otherwise.
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(
            f"{file} does not hold {name} as plain numbers",
            "load it, make this tensor dense with resolve_conj, resolve_neg or to_dense, and "
            "torch.save it again",
        )
    storage, size = tensor.untyped_storage(), tensor.element_size()
    first = int(tensor.storage_offset())
    spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
    offset = storage._checkpoint_offset  # see PyTorch's notes on serialization
    place = _Place(file, (offset or 0) + first * size, spec, tensor.stride())
    # On the meta device a storage grows to fit whatever view of it a file asks for.
    end = (first + place.span()) * size
    whole = offset is not None and records.get(offset) == storage.nbytes() >= end
    if not whole and 0 not in spec.shape:
        raise CheckpointError(
            f"{file} is damaged: it does not hold the bytes of {name}",
            "download it again; if another program repacked it, load it and torch.save it again",
        )
    return place
